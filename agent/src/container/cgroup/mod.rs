//! The cgroup of a container, version 2.
//!
//! ```text
//! <parent>/<id>        limits, device program, statistics; root of the container's cgroup namespace
//! <parent>/<id>/init   its processes, because a cgroup with processes cannot delegate controllers
//! ```

mod devices;
mod freezer;
mod limits;
mod stats;

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};

use tokio::io::{Interest, unix::AsyncFd};

use super::ContainerError;

pub use self::freezer::Freezer;
pub(super) use self::limits::check;

const LEAF: &str = "init";

/// How often the removal of a cgroup that is empty, but busy, is tried.
const REMOVE_ATTEMPTS: usize = 5;

/// A cgroup that this container alone uses.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes `<parent>/<id>` with its leaf, and with every controller that `parent` can hand down.
    pub(super) fn create(parent: &Path, id: &str) -> Result<Self, ContainerError> {
        delegate(parent);
        let path = parent.join(id);
        match fs::create_dir(&path) {
            // What a create that was cancelled has left behind, if it is empty by now.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                remove_tree(&path).and_then(|()| fs::create_dir(&path))
            }
            created => created,
        }
        .map_err(|source| ContainerError::cgroup("cannot create", &path, source))?;
        let cgroup = Self { path };
        let leaf = cgroup.path.join(LEAF);
        fs::create_dir(&leaf).map_err(|source| ContainerError::cgroup("cannot create", &leaf, source))?;
        Ok(cgroup)
    }

    /// The directory of the cgroup, for `CLONE_INTO_CGROUP`.
    pub(super) fn open(&self) -> Result<OwnedFd, ContainerError> {
        open_directory(&self.path)
    }

    /// The directory of the leaf, for `CLONE_INTO_CGROUP`.
    pub(super) fn open_leaf(&self) -> Result<OwnedFd, ContainerError> {
        open_directory(&self.path.join(LEAF))
    }

    /// `cgroup.procs` of the leaf, for writing.
    pub(super) fn open_leaf_procs(&self) -> Result<OwnedFd, ContainerError> {
        let path = self.path.join(LEAF).join("cgroup.procs");
        let file = File::options().write(true).open(&path);
        file.map(OwnedFd::from).map_err(|source| ContainerError::cgroup("cannot open", path, source))
    }

    /// Hands the controllers down to the cgroups that the container makes itself. Only once there is no
    /// process left outside of the leaf.
    pub(super) fn delegate_controllers(&self) {
        delegate(&self.path);
    }

    /// Attaches the program that decides which devices may be made and opened.
    pub(super) fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<(), ContainerError> {
        let program = devices::program(rules)?;
        devices::attach(&self.open()?, &program)
            .map_err(|errno| ContainerError::cgroup("cannot attach the device rules to", &self.path, errno))
    }

    /// Writes the limits. One whose controller is missing is an error that names both.
    pub(super) fn limit(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        limits::apply(&self.path, resources)
    }

    pub(super) fn stats(&self) -> Result<Metrics, ContainerError> {
        stats::metrics(&self.path)
    }

    /// Every process of the cgroup and those below it.
    pub(super) fn pids(&self) -> Result<Vec<i32>, ContainerError> {
        let mut pids = Vec::new();
        for path in
            tree(&self.path).map_err(|source| ContainerError::cgroup("cannot list", &self.path, source))?
        {
            let procs = path.join("cgroup.procs");
            match fs::read_to_string(&procs) {
                // 0 is a process outside of the reader's pid namespace.
                Ok(text) => pids
                    .extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid != 0)),
                // Removed since, or a threaded cgroup, whose processes are listed above it.
                Err(error) if is_gone(&error) || error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(source) => return Err(ContainerError::cgroup("cannot read", procs, source)),
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    pub(super) fn freezer(&self) -> Freezer {
        Freezer::of_one(self.path.clone())
    }

    /// Signals every process.
    pub(super) fn signal(&self, signal: i32) -> Result<(), ContainerError> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        let signal = Signal::try_from(signal)
            .map_err(|_| ContainerError::invalid("signal", signal, "there is no such signal"))?;
        for pid in self.pids()? {
            match kill(Pid::from_raw(pid), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    return Err(ContainerError::cgroup(
                        format!("cannot send {signal} to {pid} in"),
                        &self.path,
                        errno,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Kills every process, even one that forks all the time.
    fn kill(&self) -> Result<(), ContainerError> {
        let path = self.path.join("cgroup.kill");
        match fs::write(&path, "1") {
            Err(error) if is_gone(&error) && !self.path.exists() => Ok(()),
            written => written.map_err(|source| ContainerError::cgroup("cannot write 1 to", path, source)),
        }
    }

    /// Kills what is left, waits until it is gone, and removes the cgroup. Can be repeated.
    pub(super) async fn remove(&self, limit: Duration) -> Result<(), ContainerError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        let emptied = tokio::time::timeout(limit, self.emptied()).await;
        let failed = |source| ContainerError::cgroup("cannot remove", &self.path, source);
        match emptied {
            Ok(emptied) => emptied?,
            Err(_elapsed) => {
                let text =
                    format!("its processes are still alive {} s after they were killed", limit.as_secs());
                return Err(failed(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
        }
        for _ in 1..REMOVE_ATTEMPTS {
            match remove_tree(&self.path) {
                // The last reference to a dying process goes a little later than the process.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                removed => return removed.map_err(failed),
            }
        }
        remove_tree(&self.path).map_err(failed)
    }

    /// Resolves when no process is left in the cgroup or below it.
    async fn emptied(&self) -> Result<(), ContainerError> {
        let path = self.path.join("cgroup.events");
        let failed = |source| ContainerError::cgroup("cannot watch", &path, source);
        let watch = match Watch::new(&path) {
            Err(error) if is_gone(&error) => return Ok(()),
            watch => watch.map_err(failed)?,
        };
        loop {
            match watch.text() {
                Ok(text) if stats::field(&text, "populated") == Some(0) => return Ok(()),
                Err(error) if is_gone(&error) => return Ok(()),
                Ok(_) => watch.changed().await.map_err(failed)?,
                Err(source) => return Err(ContainerError::cgroup("cannot read", path, source)),
            }
        }
    }

    /// See [`super::Container::oom_kills_after`].
    pub(super) async fn oom_kills_after(&self, seen: u64) -> u64 {
        let path = self.path.join("memory.events");
        match Watch::new(&path) {
            Ok(watch) => {
                while let Ok(text) = watch.text() {
                    match stats::field(&text, "oom_kill") {
                        Some(kills) if kills > seen => return kills,
                        _ => {}
                    }
                    if let Err(error) = watch.changed().await {
                        log::warn!("cannot watch {}: {error}", path.display());
                        break;
                    }
                }
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => log::warn!("cannot watch {}: {error}", path.display()),
        }
        std::future::pending().await
    }
}

/// Watches a file of a cgroup. The kernel announces a change to poll(2), as POLLPRI until the file is
/// read again, and to inotify(7), whose instances are limited per user: the containers of a guest could
/// take them all.
struct Watch(AsyncFd<File>);

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: a File refers to one open file for as long as it lives, and lives in the AsyncFd.
        Ok(Self(unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?))
    }

    /// What is in the file now.
    fn text(&self) -> io::Result<String> {
        let mut file = self.0.get_ref();
        let mut text = String::new();
        file.rewind()?;
        file.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Resolves when the file has changed since [`text`](Watch::text) was last called.
    async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, ContainerError> {
    let directory = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(path);
    directory.map(OwnedFd::from).map_err(|source| ContainerError::cgroup("cannot open", path, source))
}

/// The names in a `cgroup.controllers` file of a cgroup.
fn controllers(path: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(path.join("cgroup.controllers"))?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// Enables for the children of a cgroup every controller that it has. One that cannot be enabled is
/// missed, by its name, by the first limit that needs it.
fn delegate(path: &Path) {
    let control = path.join("cgroup.subtree_control");
    for controller in controllers(path).unwrap_or_default() {
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            log::warn!("cannot enable the {controller} controller in {}: {error}", control.display());
        }
    }
}

/// A cgroup and those below it, each before what is in it.
fn tree(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(parent) = found.get(next).cloned() {
        next += 1;
        let entries = match fs::read_dir(&parent) {
            Err(error) if is_gone(&error) => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for path in tree(path)?.iter().rev() {
        match fs::remove_dir(path) {
            Err(error) if is_gone(&error) => {}
            removed => removed?,
        }
    }
    Ok(())
}

/// A file of a cgroup that has been removed is missing, or open and dead.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}
