//! What VMM backends fail with.

use std::{io, path::PathBuf, time::Duration};

pub use super::wall::SpawnError;
use crate::cgroup::CgroupError;

/// What a VMM backend can fail with. The texts name the file or program and what to do.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A program that the backend needs is not installed.
    #[error("{program} was not found: {hint}")]
    MissingProgram {
        /// As configured in `[tools]`.
        program: PathBuf,
        /// How to get it.
        hint: &'static str,
    },
    /// A file that the guest boots from does not exist.
    #[error(
        "the guest image file {path} does not exist: make it with `rootfs-scripts/build-guest`, or set guest.{key} in the configuration file"
    )]
    MissingImage {
        /// The file.
        path: PathBuf,
        /// The key of the `[guest]` table.
        key: &'static str,
    },
    /// A program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: SpawnError,
    },
    /// A thread was lost.
    #[error("a task of this process did not come to its end")]
    Task(#[from] tokio::task::JoinError),
    /// A running process could not be shown a file.
    #[error("cannot let {program} see {path}")]
    Show {
        /// The process's program.
        program: PathBuf,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program ended before it was ready.
    #[error("{program} ended with {status} before it was ready: {output}")]
    Died {
        /// The program.
        program: PathBuf,
        /// Exit status or signal.
        status: String,
        /// The last lines it printed.
        output: String,
    },
    /// A program did what it was asked too slowly.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was awaited.
        what: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The VMM refused a request.
    #[error("{program} refused {request}: {reply}")]
    Refused {
        /// The VMM.
        program: &'static str,
        /// Request and path, or QMP command.
        request: String,
        /// Its answer.
        reply: String,
    },
    /// A file or socket operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The sandbox's processes could not be ended or frozen.
    #[error("cannot end or freeze the processes of the sandbox")]
    Cgroup(#[from] CgroupError),
    /// The backend cannot do this.
    #[error("the {backend} backend does not support {what}: {hint}")]
    Unsupported {
        /// The backend's name in the configuration.
        backend: &'static str,
        /// What was asked.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
    /// The VMM is not new enough.
    #[error("{program} is version {found}, and version {needed} or newer is needed: {hint}")]
    TooOld {
        /// The program, or its name.
        program: PathBuf,
        /// As it calls itself.
        found: String,
        /// The oldest that will do.
        needed: u32,
        /// How to get it.
        hint: &'static str,
    },
    /// The VMM ended while it was asked for something.
    #[error("the VMM ended during {during}: {description}")]
    Ended {
        /// What it was asked for.
        during: &'static str,
        /// See [`VmmExit::description`](super::VmmExit::description).
        description: String,
    },
    /// A VM of this kind has no snapshots.
    #[error("the {backend} backend cannot take a snapshot of this sandbox: {reason}")]
    CannotSnapshot {
        /// The backend's name in the configuration.
        backend: &'static str,
        /// What is in the way, and what to do about it.
        reason: &'static str,
    },
    /// A snapshot was not written, or not in full.
    #[error("cannot write a snapshot to {dir}")]
    Snapshot {
        /// Where it was to be.
        dir: PathBuf,
        /// Why.
        source: Box<VmmError>,
    },
    /// A file of a snapshot that the VMM wrote, as it says, is not whole.
    #[error("{path} is not complete, which happens when its file system is full")]
    Incomplete {
        /// The file.
        path: PathBuf,
        /// How that was seen.
        source: io::Error,
    },
    /// No VM can be made from a snapshot.
    #[error("the snapshot in {dir} cannot be restored")]
    Restore {
        /// The snapshot's directory.
        dir: PathBuf,
        /// Why.
        source: SnapshotDefect,
    },
}

impl VmmError {
    /// Whether the connection to the VMM failed, or a file did, or its namespaces could not be entered: none of
    /// it works once the VMM has ended.
    pub(crate) fn is_io(&self) -> bool {
        match self {
            VmmError::Io { .. } | VmmError::Show { .. } => true,
            VmmError::Snapshot { source, .. } => source.is_io(),
            _ => false,
        }
    }
}

/// What keeps a VM from being made from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotDefect {
    /// One of its files cannot be read.
    #[error("cannot read {file}")]
    Unreadable {
        /// Its name in the directory.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Something that the VM of every snapshot of ours has is missing, or has another value.
    #[error("its config.json does not say {expected}")]
    Lacks {
        /// What was expected.
        expected: &'static str,
    },
    /// Something that no VM of ours has: nobody knows which files or devices of this host it would reach.
    #[error("its config.json has {key:?}, which Cubebox gives to no VM with a snapshot")]
    Foreign {
        /// Where in config.json.
        key: String,
    },
    /// The VMM may not know what it would have to read.
    #[error(
        "Cloud Hypervisor {theirs:?} has written it, and {ours:?}, which is older, cannot be sure to read it: {hint}"
    )]
    Newer {
        /// The version that wrote it.
        theirs: String,
        /// The one that was to read it.
        ours: String,
        /// How to get another one.
        hint: &'static str,
    },
    /// A disk of the snapshot is missing from [`VmSpec::disks`](super::VmSpec::disks).
    #[error("it has a disk with the serial {serial:?}, for which no file was given")]
    DiskNotGiven {
        /// The serial.
        serial: String,
    },
    /// A disk of [`VmSpec::disks`](super::VmSpec::disks) is missing from the snapshot.
    #[error("it has no disk with the serial {serial:?}: more disks can be added once the VM runs")]
    DiskNotInIt {
        /// The serial.
        serial: String,
    },
    /// The guest of the snapshot knows a disk as writable and is to get a read-only one, or the reverse.
    #[error("the guest knows the disk {serial:?} as {known}, and the file was given as {given}")]
    DiskAccess {
        /// The serial.
        serial: String,
        /// "read-only" or "writable".
        known: &'static str,
        /// The other one.
        given: &'static str,
    },
    /// [`VmSpec::share`](super::VmSpec::share) with a snapshot.
    #[error("it has no shared directory, and the new VM was to have one")]
    Share,
}
