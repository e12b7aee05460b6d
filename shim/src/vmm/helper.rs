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
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
    unistd::pipe2,
};
use tokio::{
    io::unix::AsyncFd,
    net::unix::pipe::Receiver,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    VmmError,
    console::{PROGRAM_OUTPUT, Ring},
    wall::{self, Wall},
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
    /// What it may reach.
    pub(crate) wall: Wall,
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
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<Option<Ended>>,
    output: Ring,
}

impl Helper {
    /// Starts a process: in the cgroup, in a session of its own, with no input, and nothing of this
    /// process's environment but `PATH`.
    pub(crate) fn launch(launch: Launch) -> Result<Helper, VmmError> {
        let Launch { program, args, cgroup, fds, wall, stdout } = launch;
        wall.prepare()?;
        let dir = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&cgroup);
        let dir = dir.map_err(|source| VmmError::Io { action: "cannot open", path: cgroup, source })?;
        let pipe = |source| VmmError::Io { action: "cannot make", path: "a pipe".into(), source };
        let (out, child_out) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| pipe(errno.into()))?;
        let (err, child_err) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| pipe(errno.into()))?;
        let null = File::open("/dev/null");
        let null =
            null.map_err(|source| VmmError::Io { action: "cannot open", path: "/dev/null".into(), source })?;
        let mut environment = vec![("RUST_LOG".into(), "warn".into())];
        environment.extend(std::env::var_os("PATH").map(|path| ("PATH".into(), path)));
        environment.extend(cube_fault::environment().into_iter().map(|(name, value)| (name.into(), value)));
        let inherited = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let stdio = [null.into(), child_out, child_err];
        let started = wall::spawn(&wall, &program, &args, environment, &dir, stdio, inherited)
            .map_err(|source| VmmError::Spawn { program: program.clone(), source })?;
        drop(fds);

        let output = Ring::new(PROGRAM_OUTPUT);
        let stdout = stdout.unwrap_or_else(|| output.clone());
        let drains: Vec<JoinHandle<()>> = vec![
            tokio::spawn(stdout.fill_from(Receiver::from_owned_fd(out).map_err(pipe)?)),
            tokio::spawn(output.clone().fill_from(Receiver::from_owned_fd(err).map_err(pipe)?)),
        ];
        let wall::Started { pid, pidfd } = started;
        let pidfd = Arc::new(pidfd);
        let (sender, ended) = watch::channel(None);
        tokio::spawn(reap(pidfd.clone(), drains, sender));
        tracing::debug!(program = %program.display(), pid, "started");
        Ok(Helper { program, pid, pidfd, ended, output })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Means this process and no other, also when it has ended.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
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

async fn reap(process: Arc<OwnedFd>, drains: Vec<JoinHandle<()>>, sender: watch::Sender<Option<Ended>>) {
    let ended = match exit_of(&process).await {
        Ok(status) => Ended { success: matches!(status, WaitStatus::Exited(_, 0)), status: describe(status) },
        Err(error) => Ended { success: false, status: format!("an unknown status ({error})") },
    };
    // A grandchild may hold the pipes for ever.
    let _ = timeout(Duration::from_secs(1), futures::future::join_all(drains)).await;
    let _ = sender.send(Some(ended));
}

/// A pidfd becomes readable when its process has ended.
async fn exit_of(process: &OwnedFd) -> io::Result<WaitStatus> {
    // SAFETY: the descriptor is borrowed until this returns, which is when the registration is gone.
    let watched = unsafe { AsyncFd::register_with_interest(process.as_fd(), tokio::io::Interest::READABLE)? };
    loop {
        let mut ready = watched.readable().await?;
        match waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)? {
            WaitStatus::StillAlive => ready.clear_ready(),
            status => return Ok(status),
        }
    }
}

fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("signal {}", signal as i32),
        other => format!("{other:?}"),
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

/// A directory of the run directory that a process of the sandbox writes to, as `user`.
pub(crate) fn own_dir(path: &Path, user: wall::User) -> Result<(), VmmError> {
    let io = |action| move |source| VmmError::Io { action, path: path.into(), source };
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io("cannot create")(source));
        }
        _ => {}
    }
    give(path, user)
}

/// Makes `user` the owner of a file or directory of ours.
pub(crate) fn give(path: &Path, user: wall::User) -> Result<(), VmmError> {
    let given = std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid));
    given.map_err(|source| VmmError::Io { action: "cannot change the owner of", path: path.into(), source })
}

/// Resolves when some process listens at `path` in the network namespace of the process `pid`. For programs
/// that make their own socket and would take a mere attempt to connect for their one client.
pub(crate) async fn listening(pid: u32, path: &Path) -> Result<(), VmmError> {
    // The kernel has no event for it; a file exists from bind(2) on, which is before listen(2).
    loop {
        if is_listening(pid, path)? {
            return Ok(());
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// `Num RefCount Protocol Flags Type St Inode Path`; `__SO_ACCEPTCON` is 0x10000. See proc_net(5).
fn is_listening(pid: u32, path: &Path) -> Result<bool, VmmError> {
    let path_of_table = format!("/proc/{pid}/net/unix");
    let table = match std::fs::read(&path_of_table) {
        // It has ended, which somebody else tells.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ESRCH)) => {
            return Ok(false);
        }
        table => table.map_err(|source| VmmError::Io {
            action: "cannot read",
            path: path_of_table.into(),
            source,
        })?,
    };
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

    use super::{
        wall::{Root, User},
        *,
    };
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
                wall: Wall::default(),
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

    /// A program in the place of a helper that does what it can to get out. What it achieves it prints.
    const ATTACK: &str = r#"
        attempt() { "$@" 2> /dev/null && echo "DONE: $*"; }
        read_file() { read -r line < "$1"; }
        write_file() { echo x > "$1"; }
        interfaces() { while read -r name rest; do case $name in lo:|Inter-*|face) ;; *) return 0;; esac; done < /proc/net/dev; return 1; }
        others() { for dir in /proc/[0-9]*; do [ "$dir" = /proc/$$ ] || return 0; done; return 1; }
        attempt read_file /etc/shadow
        attempt read_file /proc/1/root/etc/shadow
        attempt read_file "$OTHER"
        attempt kill -0 "$VICTIM"
        attempt kill -9 "$VICTIM"
        attempt mknod "$OWN/node" c 1 3
        attempt mount -t tmpfs tmpfs "$OWN"
        attempt write_file /new
        attempt write_file /bin/new
        attempt interfaces
        attempt others
        attempt mkdir "$OWN/dir"
        attempt ln -s /proc "$OWN/link"
        attempt mkfifo "$OWN/fifo"
        attempt write_file "$OWN/file" && :
    "#;

    /// What it can make in its own directory without Landlock.
    const MADE: &str = "DONE: mkdir OWN/dir\nDONE: ln -s /proc OWN/link\nDONE: mkfifo OWN/fifo\n";

    /// Runs [`ATTACK`] behind the wall that `make` gives for a root in which one directory can be written to.
    async fn attack(name: &str, owner: User, make: impl FnOnce(Root) -> Wall) -> String {
        let scratch = Scratch::new(name);
        let dir = tempfile::tempdir().unwrap();
        let [own, other] = ["own", "other"].map(|name| dir.path().join(name));
        own_dir(&own, owner).unwrap();
        fs::write(&other, "secret\n").unwrap();
        let mut victim = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let mut root = Root::new(&dir.path().join("root")).program(Path::new("/bin/sh")).write(&own).proc();
        for tool in ["mknod", "mount", "mkdir", "ln", "mkfifo"].map(|tool| Path::new("/usr/bin").join(tool)) {
            root = root.program(&tool);
        }
        let root = root.device(Path::new("/dev/null"), 0o666, owner);
        let set = format!(
            "OWN={} OTHER={} VICTIM={} PATH=/usr/bin:/bin",
            own.display(),
            other.display(),
            victim.id()
        );
        let mut launch = scratch.sh(&format!("{set}\n{ATTACK}"));
        launch.wall = make(root);
        let helper = Helper::launch(launch).unwrap();
        timeout(LIMIT, helper.ended()).await.unwrap();
        assert!(victim.try_wait().unwrap().is_none(), "it has killed a process of the host");
        victim.kill().unwrap();
        victim.wait().unwrap();
        helper.last_lines().replace(own.to_str().unwrap(), "OWN")
    }

    #[tokio::test]
    async fn a_compromised_helper_reaches_nothing_but_its_own_directory() {
        let user = User { uid: 1_900_200_001, gid: 1_900_200_001 };
        let reached = attack("attack", user, |root| Wall::helper(root, user)).await;
        let made = if wall::landlock::is_available() { "" } else { MADE };
        assert_eq!(reached, format!("{made}DONE: write_file OWN/file"));
    }

    #[tokio::test]
    async fn a_compromised_file_server_reaches_nothing_but_what_it_shares() {
        let root = User { uid: 0, gid: 0 };
        let reached = attack("attack-files", root, |root| Wall::file_server(root, 1024)).await;
        assert_eq!(reached, format!("{MADE}DONE: write_file OWN/file"));
    }

    #[tokio::test]
    async fn a_step_that_fails_is_named() {
        let scratch = Scratch::new("step");
        let dir = tempfile::tempdir().unwrap();
        let user = User { uid: 1_900_200_001, gid: 1_900_200_001 };
        let mut launch = scratch.sh("");
        launch.wall =
            Wall::helper(Root::new(&dir.path().join("root")).read(Path::new("/nonexistent/file")), user);
        let error = crate::errors::chain(&Helper::launch(launch).unwrap_err());
        assert!(error.contains("show /nonexistent/file") && error.contains("No such file"), "{error}");
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
        assert!(!is_listening(std::process::id(), &path).unwrap());
        let _listener = listen(&path).unwrap();
        timeout(LIMIT, listening(std::process::id(), &dir.path().join("a socket"))).await.unwrap().unwrap();
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
