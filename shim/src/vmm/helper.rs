//! Processes of a sandbox: VMMs, virtiofsd, vhost-device-vsock, the agent of the `process` backend.
//!
//! They are in the sandbox's cgroup before they run their program, so that whoever has the state
//! file can end them, and they outlive the shim: when it dies, `shim delete` still drains the logs.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    future::Future,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixListener, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use tokio::{
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    VmmError,
    console::{PROGRAM_OUTPUT, Ring},
};

/// What a process is started with.
#[derive(Debug)]
pub(crate) struct Launch {
    /// An existing executable, [`super::program::find`].
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// cgroup v2 directory, a leaf.
    pub(crate) cgroup: PathBuf,
    /// Passed on under the numbers that they have here, which `args` name.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether it gets a network namespace of its own, without any interface.
    pub(crate) own_network: bool,
    /// Where its standard output goes if not to where its standard error goes.
    pub(crate) stdout: Option<Ring>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) success: bool,
    /// "exit status 1", "signal 9".
    pub(crate) status: String,
}

/// A process that was started. Clones mean the same; dropping this leaves it running.
#[derive(Debug, Clone)]
pub(crate) struct Helper {
    program: PathBuf,
    pid: u32,
    ended: watch::Receiver<Option<Ended>>,
    output: Ring,
}

impl Helper {
    /// Starts a process: in the cgroup, in a session of its own, with no input, and nothing of this
    /// process's environment but `PATH`.
    pub(crate) fn launch(launch: Launch) -> Result<Helper, VmmError> {
        let procs = launch.cgroup.join("cgroup.procs");
        let procs = OpenOptions::new().write(true).open(&procs).map_err(|source| VmmError::Io {
            action: "cannot open",
            path: procs,
            source,
        })?;
        let mut command = Command::new(&launch.program);
        command.args(&launch.args).env_clear().env("RUST_LOG", "warn").kill_on_drop(false);
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(cube_fault::environment());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let inherited: Vec<RawFd> = launch.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let own_network = launch.own_network;
        // SAFETY: `enter` makes system calls only; it neither allocates nor takes a lock.
        unsafe { command.pre_exec(move || enter(&procs, own_network, &inherited)) };
        let mut child =
            command.spawn().map_err(|source| VmmError::Spawn { program: launch.program.clone(), source })?;

        let output = Ring::new(PROGRAM_OUTPUT);
        let stdout = launch.stdout.unwrap_or_else(|| output.clone());
        let drains: Vec<JoinHandle<()>> = [
            child.stdout.take().map(|pipe| tokio::spawn(stdout.fill_from(pipe))),
            child.stderr.take().map(|pipe| tokio::spawn(output.clone().fill_from(pipe))),
        ]
        .into_iter()
        .flatten()
        .collect();
        let pid = child.id().unwrap_or(0);
        let (sender, ended) = watch::channel(None);
        tokio::spawn(reap(child, drains, sender));
        tracing::debug!(program = %launch.program.display(), pid, "started");
        Ok(Helper { program: launch.program, pid, ended, output })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// What it printed last.
    pub(crate) fn last_lines(&self) -> String {
        self.output.last_lines()
    }

    /// Resolves when it has ended and its output has been read. Cancel safe; may be repeated.
    pub(crate) async fn ended(&self) -> Ended {
        match self.ended.clone().wait_for(Option::is_some).await.map(|ended| ended.clone()) {
            Ok(Some(ended)) => ended,
            // The task that reaps goes away with the runtime only.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// The end of this process as an error of whoever still needed it.
    pub(crate) async fn died(&self) -> VmmError {
        let ended = self.ended().await;
        VmmError::Died { program: self.program.clone(), status: ended.status, output: self.last_lines() }
    }

    /// Awaits `ready`, but not beyond the end of this process, and not longer than `limit`.
    pub(crate) async fn until<T>(
        &self,
        what: &'static str,
        limit: Duration,
        ready: impl Future<Output = Result<T, VmmError>>,
    ) -> Result<T, VmmError> {
        let first = async {
            tokio::select! {
                biased;
                result = ready => result,
                error = self.died() => Err(error),
            }
        };
        timeout(limit, first).await.unwrap_or(Err(VmmError::Timeout { what, limit }))
    }
}

/// In the child, between fork and exec.
fn enter(procs: &File, own_network: bool, inherited: &[RawFd]) -> io::Result<()> {
    nix::unistd::write(procs, b"0")?;
    // Signals that a terminal or a supervisor sends to the shim's group are not meant for it.
    nix::unistd::setsid()?;
    if own_network {
        unshare(CloneFlags::CLONE_NEWNET)?;
    }
    for fd in inherited {
        // SAFETY: F_SETFD touches no memory; the descriptor belongs to `Launch::fds`.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

async fn reap(mut child: Child, drains: Vec<JoinHandle<()>>, sender: watch::Sender<Option<Ended>>) {
    let ended = match child.wait().await {
        Ok(status) => Ended { success: status.success(), status: describe(status) },
        Err(error) => Ended { success: false, status: format!("an unknown status ({error})") },
    };
    // A grandchild may hold the pipes for ever.
    let _ = timeout(Duration::from_secs(1), futures::future::join_all(drains)).await;
    let _ = sender.send(Some(ended));
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// A listening socket at `path`, to be inherited by a program. Whoever connects is served as soon as
/// the program gets to it, so nobody has to wait for it to be ready.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, VmmError> {
    remove_stale(path)?;
    UnixListener::bind(path).map_err(|source| VmmError::Io {
        action: "cannot listen on",
        path: path.into(),
        source,
    })
}

/// Removes the socket of an earlier VM in the same run directory: nobody can listen where a file is.
pub(crate) fn remove_stale(path: &Path) -> Result<(), VmmError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(VmmError::Io { action: "cannot remove the stale socket", path: path.into(), source })
        }
        _ => Ok(()),
    }
}

/// Resolves when some process of this network namespace listens at `path`. For programs that make
/// their own socket and would take a mere attempt to connect for their one client.
pub(crate) async fn listening(path: &Path) -> Result<(), VmmError> {
    // The kernel has no event for it; a file exists from bind(2) on, which is before listen(2).
    loop {
        if is_listening(path)? {
            return Ok(());
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// `Num RefCount Protocol Flags Type St Inode Path`; `__SO_ACCEPTCON` is 0x10000. See proc_net(5).
fn is_listening(path: &Path) -> Result<bool, VmmError> {
    const TABLE: &str = "/proc/net/unix";
    let table = std::fs::read(TABLE).map_err(|source| VmmError::Io {
        action: "cannot read",
        path: TABLE.into(),
        source,
    })?;
    let suffix = [b" ", path.as_os_str().as_bytes()].concat();
    let listens = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
        fields.nth(3) == Some(b"00010000") && line.ends_with(&suffix)
    };
    Ok(table.split(|byte| *byte == b'\n').any(listens))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;
    use crate::cgroup::SandboxCgroup;

    const LIMIT: Duration = Duration::from_secs(20);

    struct Scratch(SandboxCgroup);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let cgroup = SandboxCgroup::for_key(&format!("helper-{name}-{}", std::process::id())).unwrap();
            cgroup.create().unwrap();
            Scratch(cgroup)
        }

        fn sh(&self, script: &str) -> Launch {
            Launch {
                program: "/bin/sh".into(),
                args: vec!["-c".into(), script.into()],
                cgroup: self.0.helpers(),
                fds: Vec::new(),
                own_network: false,
                stdout: None,
            }
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            self.0.destroy(LIMIT, None).unwrap();
        }
    }

    #[tokio::test]
    async fn it_runs_in_the_cgroup_and_in_a_session_of_its_own_from_the_first_instruction() {
        let scratch = Scratch::new("place");
        let helper = Helper::launch(scratch.sh("cat /proc/self/cgroup; ps -o sid= $$; env")).unwrap();
        assert!(timeout(LIMIT, helper.ended()).await.unwrap().success);
        let output = helper.last_lines();
        assert!(
            output.contains(&format!("/cube/helper-place-{}/vm/helpers\n", std::process::id())),
            "{output}"
        );
        assert!(output.lines().any(|line| line.trim() == helper.pid().to_string()), "{output}");
        assert!(!output.contains("CARGO"), "the environment is not passed on: {output}");
    }

    #[tokio::test]
    async fn one_that_dies_before_it_is_ready_says_its_status_and_its_last_words() {
        let scratch = Scratch::new("dies");
        let helper = Helper::launch(scratch.sh("echo cannot open the thing >&2; exit 7")).unwrap();
        let never = std::future::pending::<Result<(), VmmError>>();
        let error = helper.until("the thing", LIMIT, never).await.unwrap_err().to_string();
        assert_eq!(error, "/bin/sh ended with exit status 7 before it was ready: cannot open the thing");
    }

    #[tokio::test]
    async fn one_that_is_killed_says_the_signal() {
        let scratch = Scratch::new("killed");
        let helper = Helper::launch(scratch.sh("sleep 600")).unwrap();
        scratch.0.kill(LIMIT).unwrap();
        assert_eq!(timeout(LIMIT, helper.ended()).await.unwrap().status, "signal 9");
    }

    #[tokio::test]
    async fn one_that_is_never_ready_is_a_timeout() {
        let scratch = Scratch::new("slow");
        let helper = Helper::launch(scratch.sh("sleep 600")).unwrap();
        let never = std::future::pending::<Result<(), VmmError>>();
        let error = helper.until("the thing", Duration::from_millis(20), never).await.unwrap_err();
        assert!(matches!(error, VmmError::Timeout { what: "the thing", .. }), "{error}");
    }

    #[tokio::test]
    async fn a_descriptor_is_passed_on_and_others_are_not() {
        let scratch = Scratch::new("fds");
        let dir = tempfile::tempdir().unwrap();
        let mut file = fs::File::create_new(dir.path().join("given")).unwrap();
        file.write_all(b"x").unwrap();
        let kept = fs::File::open(dir.path().join("given")).unwrap();
        let number = file.as_raw_fd();
        let mut launch = scratch
            .sh(&format!("test -e /proc/self/fd/{number} && ! test -e /proc/$$/fd/{}", kept.as_raw_fd()));
        launch.fds = vec![file.into()];
        let helper = Helper::launch(launch).unwrap();
        let ended = timeout(LIMIT, helper.ended()).await.unwrap();
        assert!(ended.success, "{ended:?}: {}", helper.last_lines());
    }

    #[tokio::test]
    async fn a_socket_counts_once_somebody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a socket");
        assert!(!is_listening(&path).unwrap());
        let _listener = listen(&path).unwrap();
        timeout(LIMIT, listening(&dir.path().join("a socket"))).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_executed_is_named() {
        let scratch = Scratch::new("noexec");
        let mut launch = scratch.sh("");
        launch.program = "/etc/passwd".into();
        let error = Helper::launch(launch).unwrap_err();
        assert!(matches!(&error, VmmError::Spawn { program, .. } if program == Path::new("/etc/passwd")));
    }
}
