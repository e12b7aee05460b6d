//! The sandbox's cgroup on the host: what the VMM and its helpers run in, and what ends them.
//!
//! Cgroup version 2 only, wherever it is mounted; in a hybrid layout it has no controllers and still
//! does what is needed here: it knows every process of a sandbox, whatever they forked, and kills
//! them at once. See the kernel's `Documentation/admin-guide/cgroup-v2.rst`.
//!
//! The functions block: they take milliseconds, but at most the limit that they are given.

use std::{
    fs,
    io::{self, ErrorKind},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::rootfs::mountinfo;

/// Directory of all sandboxes, below the cgroup2 mount.
const PARENT: &str = "cube";

/// Controllers that containers' limits need. Those that the host does not have are left out.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// How often to look at what should happen. The kernel tells of it, too, but for each file at most once in
/// 10 ms (kernel/cgroup/cgroup.c, CGROUP_FILE_NOTIFY_MIN_INTV): of a freeze that soon follows a thaw, late.
const LOOK: Duration = Duration::from_millis(1);

/// The cgroup of one sandbox. A name only: it need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxCgroup {
    dir: PathBuf,
}

/// What cgroup operations fail with.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has no cgroup version 2.
    #[error(
        "no cgroup2 file system is mounted: mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`"
    )]
    NotMounted,
    /// A directory that is not a cgroup was to be removed as one.
    #[error("{path} is not a cgroup")]
    NotACgroup {
        /// The directory.
        path: PathBuf,
    },
    /// Processes did not end in time, or new ones kept appearing.
    #[error("processes in the cgroup {path} still live {limit:?} after SIGKILL")]
    Alive {
        /// The cgroup.
        path: PathBuf,
        /// The deadline.
        limit: Duration,
    },
    /// Processes could not be stopped, or started again, in time: one in uninterruptible sleep can't be.
    #[error("the cgroup {path} did not become {event:?} within {limit:?}")]
    Unfrozen {
        /// The cgroup.
        path: PathBuf,
        /// The line of `cgroup.events` that was awaited.
        event: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The kernel refused an operation.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Io { action, path: path.into(), source }
}

impl SandboxCgroup {
    /// The cgroup of the sandbox with this key: `<cgroup2 mount>/cube/<key>`. Creates nothing, so
    /// that the path can be written down first.
    pub fn for_key(key: &str) -> Result<SandboxCgroup, CgroupError> {
        let mounts = mountinfo::read().map_err(failed("cannot read", Path::new("/proc/self/mountinfo")))?;
        let mount = mounts.into_iter().find(|m| m.fs_type == "cgroup2").ok_or(CgroupError::NotMounted)?;
        Ok(SandboxCgroup { dir: mount.mount_point.join(PARENT).join(key) })
    }

    /// The cgroup at a path that was written down before.
    pub fn at(dir: impl Into<PathBuf>) -> SandboxCgroup {
        SandboxCgroup { dir: dir.into() }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The leaf of the VMM and its helpers.
    pub fn helpers(&self) -> PathBuf {
        self.dir.join("helpers")
    }

    /// The subtree that the agent of the `process` backend manages.
    pub fn guest(&self) -> PathBuf {
        self.dir.join("guest")
    }

    /// Makes the cgroup with its leaf and subtree, and hands down the controllers that the host has.
    pub fn create(&self) -> Result<(), CgroupError> {
        for dir in [self.helpers(), self.guest()] {
            fs::create_dir_all(&dir).map_err(failed("cannot create", &dir))?;
        }
        // A controller reaches a cgroup only if each of its ancestors hands it down.
        let mut ancestors: Vec<&Path> =
            self.dir.ancestors().take_while(|dir| dir.join("cgroup.subtree_control").exists()).collect();
        ancestors.reverse();
        for dir in ancestors {
            enable_controllers(dir);
        }
        Ok(())
    }

    /// Ends every process in the cgroup and below with SIGKILL, and returns when there is none left.
    /// A cgroup that does not exist is done.
    pub fn kill(&self, limit: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + limit;
        if !self.exists()? {
            return Ok(());
        }
        loop {
            self.send_sigkill()?;
            if self.wait_until_empty(deadline)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(CgroupError::Alive { path: self.dir.clone(), limit });
            }
        }
    }

    /// [`kill`](Self::kill), then removes the cgroup and all below. Can be repeated, and run by two
    /// processes at once.
    pub fn destroy(&self, limit: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + limit;
        self.kill(limit)?;
        cube_fault::point("destroy.processes_killed");
        loop {
            match remove_tree(&self.dir) {
                Ok(()) => return Ok(()),
                // For a moment after it has become empty, the kernel still counts a dying process.
                Err(CgroupError::Io { source, .. })
                    if source.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a process is in the cgroup, or below: cgroup.events speaks for the whole subtree. In doubt, yes.
    pub fn has_processes(&self) -> bool {
        match fs::read_to_string(self.dir.join("cgroup.events")) {
            Ok(events) => !events.lines().any(|line| line == "populated 0"),
            Err(e) => e.kind() != ErrorKind::NotFound,
        }
    }

    fn exists(&self) -> Result<bool, CgroupError> {
        if self.dir.join("cgroup.procs").exists() {
            return Ok(true);
        }
        match self.dir.try_exists() {
            Ok(false) => Ok(false),
            Ok(true) => Err(CgroupError::NotACgroup { path: self.dir.clone() }),
            Err(source) => Err(failed("cannot look at", &self.dir)(source)),
        }
    }

    fn send_sigkill(&self) -> Result<(), CgroupError> {
        let file = self.dir.join("cgroup.kill");
        match fs::write(&file, "1") {
            Ok(()) => Ok(()),
            // Before Linux 5.14; or somebody else has removed the cgroup, then it has no pids either.
            Err(e) if e.kind() == ErrorKind::NotFound => {
                for pid in pids_below(&self.dir) {
                    // ESRCH: it has gone meanwhile.
                    let _ = kill(pid, Signal::SIGKILL);
                }
                Ok(())
            }
            Err(source) => Err(failed("cannot write", &file)(source)),
        }
    }

    /// Whether the cgroup became empty within 100 ms: without `cgroup.kill`, a process may have
    /// forked behind the back of whoever listed it.
    fn wait_until_empty(&self, deadline: Instant) -> Result<bool, CgroupError> {
        self.wait_for_event("populated 0", deadline.min(Instant::now() + Duration::from_millis(100)))
    }

    /// Stops every process in the cgroup and below, or lets them run again, and returns when it is so.
    /// A frozen process can still be killed.
    pub fn freeze(&self, frozen: bool, limit: Duration) -> Result<(), CgroupError> {
        let (value, event) = if frozen { ("1", "frozen 1") } else { ("0", "frozen 0") };
        let file = self.dir.join("cgroup.freeze");
        fs::write(&file, value).map_err(failed("cannot write", &file))?;
        match self.wait_for_event(event, Instant::now() + limit)? {
            true => Ok(()),
            false => Err(CgroupError::Unfrozen { path: self.dir.clone(), event, limit }),
        }
    }

    /// Whether `cgroup.events` said `event` before `deadline`. A cgroup that is gone says anything.
    fn wait_for_event(&self, event: &str, deadline: Instant) -> Result<bool, CgroupError> {
        let path = self.dir.join("cgroup.events");
        loop {
            // Opened anew each time: the kernel reports changes since the last read.
            let mut file = match fs::File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(true),
                Err(source) => return Err(failed("cannot open", &path)(source)),
            };
            let events = match io::read_to_string(&mut file) {
                Ok(events) => events,
                Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return Ok(true),
                Err(source) => return Err(failed("cannot read", &path)(source)),
            };
            if events.lines().any(|line| line == event) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let timeout = PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO);
            match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(failed("cannot poll", &path)(errno.into())),
            }
        }
    }
}

/// One by one, for a host may refuse some: in a hybrid hierarchy, or where cgroup version 1 has them.
fn enable_controllers(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for name in available.split_whitespace().filter(|name| CONTROLLERS.contains(name)) {
        if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), format!("+{name}")) {
            tracing::debug!(cgroup = %dir.display(), controller = name, %error, "controller not handed down");
        }
    }
}

fn subdirs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn pids_below(dir: &Path) -> Vec<Pid> {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let own = procs.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw);
    own.chain(subdirs(dir).iter().flat_map(|sub| pids_below(sub))).collect()
}

/// `rmdir` from the leaves up: the files of a cgroup cannot be removed and need not be.
fn remove_tree(dir: &Path) -> Result<(), CgroupError> {
    for sub in subdirs(dir) {
        remove_tree(&sub)?;
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed("cannot remove", dir)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A cgroup of its own, gone after the test whatever its end.
    struct Scratch(SandboxCgroup);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let cgroup = SandboxCgroup::for_key(&format!("test-{name}-{}", std::process::id())).unwrap();
            cgroup.create().unwrap();
            Scratch(cgroup)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = self.0.destroy(LIMIT);
        }
    }

    fn sleeper_in(dir: &Path) -> Child {
        let script = format!("echo $$ > '{}/cgroup.procs'; echo in; sleep 600 & wait", dir.display());
        let mut child =
            Command::new("sh").arg("-c").arg(script).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut line = [0; 3];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        child
    }

    #[test]
    fn destroy_ends_processes_at_any_depth_and_leaves_nothing() {
        let scratch = Scratch::new("depth");
        let cgroup = &scratch.0;
        let nested = cgroup.guest().join("container/leaf");
        fs::create_dir_all(&nested).unwrap();
        let children = [sleeper_in(&cgroup.helpers()), sleeper_in(&nested)];
        cgroup.destroy(LIMIT).unwrap();
        assert!(!cgroup.dir().exists());
        for mut child in children {
            child.wait().unwrap();
        }
    }

    #[test]
    fn frozen_processes_stand_still_run_on_and_can_be_killed() {
        let scratch = Scratch::new("freeze");
        let mut child = sleeper_in(&scratch.0.guest());
        let status = || fs::read_to_string(scratch.0.dir().join("cgroup.events")).unwrap();
        for _ in 0..2 {
            scratch.0.freeze(true, LIMIT).unwrap();
            scratch.0.freeze(true, LIMIT).unwrap();
            assert!(status().contains("frozen 1"));
            scratch.0.freeze(false, LIMIT).unwrap();
            assert!(status().contains("frozen 0"));
        }
        scratch.0.freeze(true, LIMIT).unwrap();
        scratch.0.kill(LIMIT).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn kill_keeps_the_cgroup_and_can_be_repeated() {
        let scratch = Scratch::new("kill");
        let mut child = sleeper_in(&scratch.0.helpers());
        scratch.0.kill(LIMIT).unwrap();
        scratch.0.kill(LIMIT).unwrap();
        assert!(scratch.0.helpers().exists());
        child.wait().unwrap();
    }

    #[test]
    fn a_cgroup_that_is_gone_is_destroyed_already() {
        let scratch = Scratch::new("gone");
        scratch.0.destroy(LIMIT).unwrap();
        scratch.0.destroy(LIMIT).unwrap();
    }

    #[test]
    fn create_can_be_repeated() {
        let scratch = Scratch::new("again");
        scratch.0.create().unwrap();
        assert!(scratch.0.guest().is_dir());
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = SandboxCgroup::at(dir.path()).destroy(LIMIT).unwrap_err();
        assert!(matches!(error, CgroupError::NotACgroup { .. }), "{error}");
        assert!(dir.path().join("file").exists());
    }
}
