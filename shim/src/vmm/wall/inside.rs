//! Changes to what a process behind a wall sees, while it runs.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns, unshare},
};

use super::{
    SpawnError, User,
    root::text,
    step::{Step, attach, detached},
};

fn other(error: SpawnError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// Lets the process behind `pidfd`, which has a root of its own, see the file or directory `path` of the
/// host at the same path, to write to unless `read_only`. Blocks for less than a millisecond.
pub(crate) fn show(pidfd: &impl AsFd, path: &Path, read_only: bool) -> io::Result<()> {
    let meta = std::fs::metadata(path)?;
    let access = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = access | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let at = text(path).map_err(other)?;
    let tree = detached(&at, attributes, false)?;
    // SAFETY: the descriptor is new and nobody else's.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let mut steps = parents(path)?;
    steps.push(match meta.is_dir() {
        true => Step::Dir { at: at.clone() },
        false => Step::File { at: at.clone() },
    });
    within(pidfd, move || {
        steps.iter().try_for_each(Step::take)?;
        attach(tree.as_raw_fd(), &at)?;
        Ok(())
    })
}

/// Gives the process behind `pidfd` a node of its own for the device `path` of the host.
pub(crate) fn show_device(pidfd: &impl AsFd, path: &Path, mode: u32, owner: User) -> io::Result<()> {
    let meta = std::fs::metadata(path)?;
    let mut steps = parents(path)?;
    let at = text(path).map_err(other)?;
    steps.push(Step::Node { at, kind: libc::S_IFBLK, device: meta.rdev(), mode, owner });
    within(pidfd, move || Ok(steps.iter().try_for_each(Step::take)?))
}

fn parents(path: &Path) -> io::Result<Vec<Step>> {
    let mut parents: Vec<PathBuf> = path.ancestors().skip(1).map(Path::to_owned).collect();
    parents.reverse();
    let below_root = parents.iter().filter(|dir| dir.parent().is_some());
    below_root.map(|dir| Ok(Step::Dir { at: text(dir).map_err(other)? })).collect()
}

/// Takes back what was [shown](show). What it has open stays open.
pub(crate) fn hide(pidfd: &impl AsFd, path: &Path) -> io::Result<()> {
    let at: CString = text(path).map_err(other)?;
    within(pidfd, move || Ok(umount2(at.as_c_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?))
}

/// Does `work` where the process is: in its mount namespace, with its root. A thread of its own, which ends.
fn within(pidfd: &impl AsFd, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let pidfd = pidfd.as_fd().try_clone_to_owned()?;
    let worker = thread::Builder::new().name("cube-inside".into()).spawn(move || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(pidfd, CloneFlags::CLONE_NEWNS)?;
        work()
    })?;
    worker.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}
