//! The sandbox's cgroup on the host: what the VMM and its helpers run in, and what ends them.
//!
//! ```text
//! <sandbox>/            limits: VMM, helpers and shim together
//!           vm/helpers  VMM and helpers; what is in vm/ is killed and frozen as a whole
//!           vm/guest    the agent of the `process` backend, with its containers
//!           shim        the shim, which has to survive that, and the programs that take its logs
//! ```
//!
//! What is written down of it is the path of `vm`; versions before this layout had `helpers` and `guest` in the
//! sandbox's directory itself, and no `shim`.
//!
//! Cgroup version 2 only, wherever it is mounted; in a hybrid layout it has no controllers and still
//! does what is needed here: it knows every process of a sandbox, whatever they forked, and kills
//! them at once. See the kernel's `Documentation/admin-guide/cgroup-v2.rst`.
//!
//! The functions block: they take milliseconds, but at most the limit that they are given.

mod limits;
mod place;
mod scope;

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

pub use self::{
    limits::{Limited, Limits},
    place::Hierarchy,
};

/// The part of a sandbox's cgroup that is killed.
const VM: &str = "vm";

/// The part that the shim is in.
const SHIM: &str = "shim";

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
    /// The spec's path is none.
    #[error("linux.cgroupsPath in config.json is {path:?}: it must be {rule}")]
    Path {
        /// The path.
        path: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// The spec's path is systemd's, and systemd does not run.
    #[error(
        "linux.cgroupsPath in config.json is {path:?}, which asks for a scope of systemd, and systemd does not run on this host: use the cgroupfs driver, with a path such as /pods/name"
    )]
    NoSystemd {
        /// The path.
        path: String,
    },
    /// systemd has not made the scope.
    #[error("systemd did not make {unit} in {slice}: {why}")]
    Scope {
        /// The scope.
        unit: String,
        /// Where it was to be.
        slice: String,
        /// What systemd, or busctl, says.
        why: String,
    },
    /// The shim is to be in one cgroup and has to be in another.
    #[error(
        "the runtime options place the shim in a cgroup of its own (ShimCgroup), but a scope of systemd, which linux.cgroupsPath asks for, needs it: leave one of the two out"
    )]
    ShimCgroup,
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
    /// The cgroup of the sandbox with this key whose spec names no place: `<cgroup2 mount>/cube/<key>/vm`.
    /// Creates nothing, so that the path can be written down first.
    pub fn for_key(key: &str) -> Result<SandboxCgroup, CgroupError> {
        Ok(Hierarchy::find()?.default_place(key))
    }

    /// The cgroup at a path that was written down before.
    pub fn at(dir: impl Into<PathBuf>) -> SandboxCgroup {
        SandboxCgroup { dir: dir.into() }
    }

    /// Its directory: of all that is killed and frozen.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of the whole sandbox, with the shim.
    pub fn sandbox(&self) -> &Path {
        match (self.dir.file_name(), self.dir.parent()) {
            (Some(name), Some(sandbox)) if name == VM => sandbox,
            _ => &self.dir,
        }
    }

    fn shim(&self) -> PathBuf {
        self.sandbox().join(SHIM)
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
        if self.is_scope() { Err(CgroupError::ShimCgroup) } else { self.make() }
    }

    /// As [`create`](Self::create), and moves this process there, which is the shim.
    pub fn create_with_shim(&self) -> Result<(), CgroupError> {
        let sandbox = self.sandbox();
        if self.is_scope() && !sandbox.exists() {
            scope::start(sandbox)?;
        }
        let shim = self.shim();
        fs::create_dir_all(&shim).map_err(failed("cannot create", &shim))?;
        // Before controllers are handed down: no process may be in a cgroup that does so.
        enter(&shim)?;
        cube_fault::point("create.shim_moved");
        self.make()
    }

    fn make(&self) -> Result<(), CgroupError> {
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
        if !is_cgroup(&self.dir)? {
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

    /// [`kill`](Self::kill), then removes the cgroup and all below. What is in it beside the VM goes to `home`,
    /// where the shim came from, or to another place if that is gone: the shim, which may be the one that calls
    /// this, and programs that take the last of its logs. Can be repeated, and run by two processes at once.
    pub fn destroy(&self, limit: Duration, home: Option<&Path>) -> Result<(), CgroupError> {
        let deadline = Instant::now() + limit;
        self.kill(limit)?;
        cube_fault::point("destroy.processes_killed");
        remove_until(deadline, || remove_tree(&self.dir))?;
        cube_fault::point("destroy.vm_cgroup_removed");
        let sandbox = self.sandbox();
        if sandbox == self.dir || !is_cgroup(sandbox)? {
            return Ok(());
        }
        remove_until(deadline, || {
            let shim = self.shim();
            self.evacuate(&shim, home)?;
            remove_empty(&shim)?;
            self.evacuate(sandbox, home)?;
            if self.is_scope() && scope::is_gone(sandbox, deadline) {
                return Ok(());
            }
            remove_empty(sandbox)
        })
    }

    /// Whether the sandbox's cgroup is systemd's.
    fn is_scope(&self) -> bool {
        self.sandbox().to_string_lossy().ends_with(scope::SUFFIX)
    }

    /// Moves every process of `dir` elsewhere.
    fn evacuate(&self, dir: &Path, home: Option<&Path>) -> Result<(), CgroupError> {
        let pids = pids_of(dir);
        if pids.is_empty() {
            return Ok(());
        }
        let own = Hierarchy::find().ok().and_then(|hierarchy| hierarchy.own());
        // The root takes every process, also where controllers are handed down.
        let root = self.dir.ancestors().filter(|dir| dir.join("cgroup.procs").exists()).last();
        let elsewhere = [home, own.as_deref(), root].into_iter().flatten();
        let elsewhere: Vec<_> = elsewhere.filter(|to| !to.starts_with(self.sandbox())).collect();
        pids.into_iter()
            .try_for_each(|pid| move_to_first(pid, &elsewhere))
            .map_err(failed("cannot move a process out of", dir))
    }

    /// Whether a process is in the cgroup, or below: cgroup.events speaks for the whole subtree. In doubt, yes.
    pub fn has_processes(&self) -> bool {
        match fs::read_to_string(self.dir.join("cgroup.events")) {
            Ok(events) => !events.lines().any(|line| line == "populated 0"),
            Err(e) => e.kind() != ErrorKind::NotFound,
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

/// Moves this process, all of its threads.
pub(crate) fn enter(dir: &Path) -> Result<(), CgroupError> {
    let procs = dir.join("cgroup.procs");
    fs::write(&procs, "0").map_err(failed("cannot write", &procs))
}

/// Moves a process to the first of these cgroups that takes it.
fn move_to_first(pid: Pid, places: &[&Path]) -> io::Result<()> {
    let mut moved = Err(ErrorKind::NotFound.into());
    for place in places {
        moved = match fs::write(place.join("cgroup.procs"), pid.to_string()) {
            // It has ended meanwhile.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            written => written,
        };
        if moved.is_ok() {
            break;
        }
    }
    moved
}

/// Whether there is a cgroup; what is there and is none must not be touched.
fn is_cgroup(dir: &Path) -> Result<bool, CgroupError> {
    if dir.join("cgroup.procs").exists() {
        return Ok(true);
    }
    match dir.try_exists() {
        Ok(false) => Ok(false),
        Ok(true) => Err(CgroupError::NotACgroup { path: dir.into() }),
        Err(source) => Err(failed("cannot look at", dir)(source)),
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

fn pids_of(dir: &Path) -> Vec<Pid> {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    procs.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw).collect()
}

fn pids_below(dir: &Path) -> Vec<Pid> {
    let below = subdirs(dir);
    pids_of(dir).into_iter().chain(below.iter().flat_map(|sub| pids_below(sub))).collect()
}

/// Repeats `remove` while the kernel is busy: for a moment after a cgroup has become empty, it still counts a dying
/// process.
fn remove_until(
    deadline: Instant,
    mut remove: impl FnMut() -> Result<(), CgroupError>,
) -> Result<(), CgroupError> {
    loop {
        match remove() {
            Err(CgroupError::Io { source, .. })
                if source.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}

/// `rmdir` from the leaves up: the files of a cgroup cannot be removed and need not be.
fn remove_tree(dir: &Path) -> Result<(), CgroupError> {
    for sub in subdirs(dir) {
        remove_tree(&sub)?;
    }
    remove_empty(dir)
}

fn remove_empty(dir: &Path) -> Result<(), CgroupError> {
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
            let _ = self.0.destroy(LIMIT, None);
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
        cgroup.destroy(LIMIT, None).unwrap();
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
        scratch.0.destroy(LIMIT, None).unwrap();
        scratch.0.destroy(LIMIT, None).unwrap();
    }

    /// The cgroup of a process in the version 2 hierarchy.
    fn cgroup_of(pid: u32) -> String {
        let listing = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        listing.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned()
    }

    #[test]
    fn what_is_beside_the_vm_survives_its_end_and_goes_home() {
        let home = Scratch::new("home");
        let own = cgroup_of(std::process::id());
        for (name, home, expected) in [
            ("beside", Some(home.0.helpers()), cgroup_of(sleeper_in(&home.0.helpers()).id())),
            ("homeless", Some("/no/such/cgroup".into()), own.clone()),
            ("stateless", None, own.clone()),
        ] {
            let scratch = Scratch::new(name);
            let shim = scratch.0.shim();
            fs::create_dir(&shim).unwrap();
            let (mut vm, mut beside) = (sleeper_in(&scratch.0.helpers()), sleeper_in(&shim));
            scratch.0.kill(LIMIT).unwrap();
            vm.wait().unwrap();
            assert!(!scratch.0.has_processes(), "the shim is no process of the VM");
            scratch.0.destroy(LIMIT, home.as_deref()).unwrap();
            scratch.0.destroy(LIMIT, home.as_deref()).unwrap();
            assert!(!scratch.0.sandbox().exists(), "{name}");
            assert_eq!(beside.try_wait().unwrap(), None, "{name}: it lives");
            assert_eq!(cgroup_of(beside.id()), expected, "{name}");
            // It and its child, which went along.
            for pid in [beside.id().to_string(), child_of(beside.id())] {
                kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
            }
            beside.wait().unwrap();
        }
    }

    fn child_of(pid: u32) -> String {
        fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap().trim().to_owned()
    }

    #[test]
    fn an_end_that_was_interrupted_goes_on_where_it_was() {
        let scratch = Scratch::new("half");
        fs::create_dir(scratch.0.shim()).unwrap();
        remove_tree(scratch.0.dir()).unwrap();
        scratch.0.destroy(LIMIT, None).unwrap();
        assert!(!scratch.0.sandbox().exists());
    }

    #[test]
    fn a_sandbox_of_the_layout_before_is_ended_as_it_was() {
        let scratch = Scratch::new("older");
        let older = SandboxCgroup::at(scratch.0.sandbox().join("older"));
        older.create().unwrap();
        assert_eq!(older.sandbox(), older.dir());
        let mut child = sleeper_in(&older.helpers());
        older.destroy(LIMIT, None).unwrap();
        child.wait().unwrap();
        assert!(!older.dir().exists() && scratch.0.dir().exists());
    }

    #[test]
    fn a_scope_of_systemd_is_not_made_without_the_shim_in_it() {
        let scope = Hierarchy::find().unwrap().root().join("cube-test.scope/vm");
        let error = SandboxCgroup::at(&scope).create().unwrap_err();
        assert!(matches!(error, CgroupError::ShimCgroup), "{error}");
        assert!(!scope.exists());
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
        for cgroup in [dir.path().to_owned(), dir.path().join(VM)] {
            let error = SandboxCgroup::at(cgroup).destroy(LIMIT, None).unwrap_err();
            assert!(matches!(error, CgroupError::NotACgroup { .. }), "{error}");
        }
        assert!(dir.path().join("file").exists());
    }
}
