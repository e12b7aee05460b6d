//! What can go wrong, and the exit codes that scripts rely on.

use std::{io, path::PathBuf, process::ExitCode, time::Duration};

use cube_shim::{
    bootstrap::BootstrapError,
    cgroup::CgroupError,
    config::ConfigError,
    errors::chain,
    log::{
        locate::{LocateError, Name},
        reader::ReadError,
    },
    snapshot::SnapshotError,
    state::StateError,
    task::ID_RULE,
    text::printable_lines,
};

use crate::containerd::ContainerdError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    #[error("cannot wait for the log to grow")]
    Wait(#[source] io::Error),
    #[error("{0:?} is no containerd namespace: it has {ID_RULE}")]
    NoNamespace(String),
    #[error("there is no process {0}")]
    NoProcess(u32),
    #[error("cannot enter the mount namespace of process {pid}")]
    Namespace {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the runtime that talks to the shims")]
    Runtime(#[source] io::Error),
    #[error(
        "no sandbox has the ID {id:?} or a container whose ID begins so: `cubecli cubebox ls` lists them, `cubecli logs` shows the output of a deleted container"
    )]
    NoSandbox { id: String },
    #[error("{id:?} is ambiguous, it could be:\n  {}", .candidates.iter().map(Name::to_string).collect::<Vec<_>>().join("\n  "))]
    Ambiguous { id: String, candidates: Vec<Name> },
    #[error(
        "the shim of sandbox {sandbox} is gone: containerd cleans up when it notices; if it does not, `cubecli cubebox rm --force {}` removes what is left", .sandbox.id
    )]
    ShimGone {
        sandbox: Name,
        #[source]
        source: io::Error,
    },
    #[error(
        "the shim of sandbox {sandbox} (process {pid}) does not answer: look for its messages in containerd's log; if it stays so, `kill -KILL {pid}` makes containerd end the sandbox and clean up"
    )]
    ShimSilent { sandbox: Name, pid: i32 },
    #[error(
        "the shim of sandbox {sandbox} (process {pid}) does not know this call; it may be of another version of Cubebox than cubecli"
    )]
    ShimRefuses {
        sandbox: Name,
        pid: i32,
        #[source]
        source: ttrpc::Error,
    },
    #[error("sandbox {sandbox} is not ready after {limit:?}: {waits_for}")]
    NotReady { sandbox: Name, limit: Duration, waits_for: String },
    #[error("sandbox {sandbox}: {text}")]
    Refused { sandbox: Name, code: ttrpc::Code, text: String },
    #[error(transparent)]
    CleanUp(#[from] BootstrapError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(
        "container {container} has not stopped: `cubecli cubebox kill` ends it, and `cubecli cubebox rm --force` ends and removes it"
    )]
    NotStopped { container: Name },
    #[error(
        "the shim of sandbox {sandbox} does not answer, and without it nothing but SIGKILL can be sent, which ends the whole sandbox"
    )]
    OnlyKill { sandbox: Name },
    #[error(
        "the shim of sandbox {sandbox} does not answer, and without it container {container} cannot be ended alone: `cubecli cubebox kill {}` ends the whole sandbox", .sandbox.id
    )]
    OnlyWhole { sandbox: Name, container: String },
    #[error(
        "one of SRC and DST is ID:PATH and the other one a local path, `./NAME` if it has a colon, or `-`"
    )]
    CopySides,
    #[error(
        "the container {container} has no program {program:?}, which `cp` runs in it: `ctr snapshots mount` shows the files of its image, and a volume brings in others"
    )]
    NoProgram { container: Name, program: &'static str },
    #[error("{program} in the container {container} ended with status {status}: {}", .said.trim_end())]
    InContainer { container: Name, program: &'static str, status: u32, said: String },
    #[error("{path:?} in what the container sent {why}")]
    Entry { path: String, why: &'static str },
    #[error("cannot {action} {path:?}, which the container sent")]
    Unpack {
        action: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot read what the container sent")]
    Received(#[source] io::Error),
    #[error("cannot send {path}")]
    Send {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0} files were left out, see above")]
    LeftOut(usize),
    #[error("container {container} did not end within {limit:?} of SIGKILL")]
    LivesOn { container: Name, limit: Duration },
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("an archive is nothing for a terminal: name a file, or redirect standard output")]
    Terminal,
    #[error("cannot be interrupted by signals")]
    Signal(#[source] io::Error),
    #[error("interrupted")]
    Interrupted { signal: i32 },
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(
        "the snapshot {name:?} has {containers} containers, and this version restores sandboxes with a single one"
    )]
    Several { name: String, containers: usize },
    #[error(
        "the snapshot {name:?} has a terminal, which somebody has to hold: `ctr run --tty --runtime io.containerd.cube.v2 --annotation cube.snapshot.restore={name} IMAGE ID` restores it (its image does not matter)"
    )]
    HasTerminal { name: String },
    #[error("{0} of the things to remove could not be removed, see above")]
    Incomplete(usize),
}

/// Says on standard error what went wrong, in words that may be those of others.
pub(crate) fn complain(error: &dyn std::error::Error) {
    eprintln!("cubecli: {}", printable_lines(&chain(error)));
}

impl CliError {
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            CliError::Locate(LocateError::Invalid { .. })
            | CliError::NoNamespace(_)
            | CliError::CopySides => 2,
            CliError::Locate(LocateError::NotFound { .. })
            | CliError::NoProcess(_)
            | CliError::NoSandbox { .. }
            | CliError::Snapshot(SnapshotError::NotFound { .. }) => 3,
            // As shells report the end by a signal.
            CliError::Interrupted { signal } => u8::try_from(128 + signal).unwrap_or(1),
            CliError::Locate(LocateError::Ambiguous { .. }) | CliError::Ambiguous { .. } => 4,
            _ => 1,
        })
    }
}
