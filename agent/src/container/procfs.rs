//! The proc file systems that are kept for containers which join the pid namespace of another.
//!
//! proc shows the pid namespace of the process that mounts it. Of a container that joins a namespace that is
//! not sure to be its own, no process with the right to mount may come into that namespace: a process with
//! `CAP_SYS_PTRACE` that lives there could take it over. So the stage that is alone in a new pid namespace
//! mounts a second proc, where the agent can see it, and stages of later containers bind that.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use nix::mount::{MntFlags, umount2};

use super::ContainerError;
use crate::errors::lock;

/// Inode number of a pid namespace, and where its proc is.
static KEPT: Mutex<Vec<(u64, PathBuf)>> = Mutex::new(Vec::new());

/// A directory for a proc of a container. Unmounted and removed when dropped.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
}

impl Kept {
    /// Makes the directory, for the stage to mount on.
    pub(super) fn prepare(path: PathBuf) -> Result<Self, ContainerError> {
        fs::create_dir_all(&path)
            .map_err(|source| ContainerError::stage(format!("make {}", path.display()), source))?;
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets it be found by the pid namespace of process `pid`, which is alive.
    pub(super) fn publish(&self, pid: i32) {
        // A process that has ended meanwhile has a namespace that nobody can join.
        if let Some(namespace) = inode(Path::new(&format!("/proc/{pid}/ns/pid"))) {
            lock(&KEPT).push((namespace, self.path.clone()));
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        lock(&KEPT).retain(|(_, path)| *path != self.path);
        // EINVAL: the stage did not come as far as to mount it.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        if let Err(error) = fs::remove_dir(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Where the pid namespace `file` leads to.
pub(super) enum Home {
    /// To the agent's own.
    Guest,
    /// To that of a container, whose proc is there.
    Container(PathBuf),
    /// To one that some process in a container has made.
    Unknown,
}

/// Looks at a file such as /proc/1/ns/pid.
pub(super) fn home(file: &Path) -> Home {
    let namespace = inode(file);
    if namespace == inode(Path::new("/proc/self/ns/pid")) {
        return Home::Guest;
    }
    let kept = lock(&KEPT);
    let found = kept.iter().find(|(kept, _)| Some(*kept) == namespace);
    found.map_or(Home::Unknown, |(_, path)| Home::Container(path.clone()))
}

fn inode(file: &Path) -> Option<u64> {
    fs::metadata(file).ok().map(|metadata| metadata.ino())
}
