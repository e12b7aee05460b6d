//! The disks of one sandbox.
//!
//! They are as large as what the sandbox writes, so they are not in its run directory, which is on a
//! tmpfs. That has a link to them, made before anything that the link leads to, so that clean-up
//! needs nothing but the run directory; and they have a link back, so that they are known for orphans
//! after a reboot.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
};

use super::{
    super::{failed, plan::serial},
    Cache, RootfsError,
    cache::remove,
};
use crate::vmm::Disk;

/// Name of the link in the run directory.
const LINK: &str = "disks";

/// `<cache_dir>/sandboxes/<key>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxDisks {
    dir: PathBuf,
}

impl SandboxDisks {
    /// Name of the link back.
    pub(super) const RUN_DIR: &str = "run";

    /// Makes the directory for the sandbox with this run directory. May exist for a container that
    /// was created earlier.
    pub(super) fn create(run_dir: &Path, cache: &Cache) -> Result<SandboxDisks, RootfsError> {
        if let Some(disks) = SandboxDisks::of(run_dir)? {
            return Ok(disks);
        }
        let dir = cache.sandboxes().join(run_dir.file_name().unwrap_or(OsStr::new("")));
        let link = run_dir.join(LINK);
        symlink(&dir, &link).map_err(failed("cannot create", &link))?;
        let _lock = cache.lock_sandboxes()?;
        // Left by a sandbox of the same name, before a reboot.
        remove(&dir)?;
        DirBuilder::new().mode(0o700).create(&dir).map_err(failed("cannot create", &dir))?;
        let back = dir.join(Self::RUN_DIR);
        symlink(run_dir, &back).map_err(failed("cannot create", &back))?;
        Ok(SandboxDisks { dir })
    }

    /// The disks of the sandbox with this run directory, if it ever had any.
    pub fn of(run_dir: &Path) -> Result<Option<SandboxDisks>, RootfsError> {
        let link = run_dir.join(LINK);
        match fs::read_link(&link) {
            // Never removes what is not named after the sandbox.
            Ok(dir) if dir.file_name() == run_dir.file_name() => Ok(Some(SandboxDisks { dir })),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("cannot read", &link)(e)),
        }
    }

    /// The packed layers of container `id`.
    pub(super) fn image(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{}.erofs", serial(id, "image")))
    }

    /// What container `id` writes.
    pub(super) fn writable(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{}.ext4", serial(id, "writable")))
    }

    /// The disk of a snapshot that the guest knows by `serial`.
    pub(super) fn restored(&self, serial: &str) -> PathBuf {
        self.dir.join(format!("{serial}.restored"))
    }

    /// Where the copy of a disk waits that is to take its place.
    pub(super) fn staged(&self, serial: &str) -> PathBuf {
        self.dir.join(format!("{serial}.staged"))
    }

    /// Where what takes the place of `disk` belongs: where that is, if it is here.
    pub(super) fn home_of(&self, disk: &Disk) -> PathBuf {
        match disk.path.parent() {
            Some(parent) if parent == self.dir => disk.path.clone(),
            _ => self.restored(&disk.serial),
        }
    }

    /// Removes the disks of container `id`. May be repeated.
    pub fn remove_container(&self, id: &str) -> Result<(), RootfsError> {
        [self.image(id), self.writable(id)].iter().try_for_each(|path| remove(path))
    }

    /// Removes them all. May be repeated, and needs nothing but [`of`](SandboxDisks::of).
    pub fn remove(&self) -> Result<(), RootfsError> {
        remove(&self.dir)
    }
}
