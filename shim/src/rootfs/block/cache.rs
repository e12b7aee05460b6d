//! Packed layers on this host, shared by every shim process.
//!
//! An identity's directory is also its lock, flock(2), so that removing it leaves nothing behind, as
//! with run directories. Whoever packs holds the lock; whoever dies while packing leaves a temporary
//! file that the next holder removes. An image is in use while a sandbox has a hard link to it: that
//! needs no process, neither shim nor VMM, to hold anything, and making or removing a link sets the
//! file's ctime, which thus says when a sandbox last began or ended to use it.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tracing::{info, warn};

use super::{super::failed, Identity, Limits, RootfsError, SandboxDisks};
use crate::{
    files::{self, LOCK_LIMIT, Lock},
    state::RunDir,
};

/// The packed layers in an identity's directory.
const IMAGE: &str = "rootfs.erofs";

/// How often a lock that somebody holds is tried. flock(2) has no time limit of its own.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// `rootfs.cache_dir`.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

/// What was, or would be, removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// A directory of the cache.
    pub path: PathBuf,
    /// Its size on disk in bytes.
    pub bytes: u64,
}

/// An identity's directory, as eviction sees it.
struct Entry {
    identity: Identity,
    bytes: u64,
    /// Of the image; the directory's own if there is none.
    ctime: (i64, i64),
}

impl Cache {
    /// The cache in `dir`, which is made, mode 0700: it holds every file of every image.
    pub fn open(dir: &Path) -> Result<Cache, RootfsError> {
        let cache = Cache { dir: dir.into() };
        for dir in [&cache.images(), &cache.sandboxes()] {
            make_dir(dir)?;
        }
        Ok(cache)
    }

    fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    pub(super) fn sandboxes(&self) -> PathBuf {
        self.dir.join("sandboxes")
    }

    /// Where packers mount what they pack.
    pub(super) fn tree(&self) -> Result<PathBuf, RootfsError> {
        let tree = self.dir.join("tree");
        make_dir(&tree).map(|()| tree)
    }

    /// A directory that stays empty.
    pub(super) fn empty(&self) -> Result<PathBuf, RootfsError> {
        let empty = self.dir.join("empty");
        make_dir(&empty).map(|()| empty)
    }

    /// Makes `to` a hard link to the image of `identity`, after `pack` has made that in the file that
    /// it is given, unless it is there already. Tells whether it was made. Of several callers, in
    /// whatever processes, one packs and the others wait.
    pub(super) fn link(
        &self,
        identity: &Identity,
        to: &Path,
        limits: &Limits,
        pack: impl FnOnce(&Path) -> Result<(), RootfsError>,
    ) -> Result<bool, RootfsError> {
        let dir = self.images().join(identity.as_str());
        let _lock = lock(&dir, limits)?;
        let image = dir.join(IMAGE);
        let packed = !image.exists();
        if packed {
            remove_all_but(&dir, IMAGE)?;
            // A packer that outlived its shim may still write to the file of its own pid.
            let new = dir.join(format!("{}.new", process::id()));
            let made = pack(&new).and_then(|()| publish(&new, &image));
            made.inspect_err(|_| drop(files::remove(&dir)))?;
        }
        fs::hard_link(&image, to).map_err(failed("cannot link", to))?;
        Ok(packed)
    }

    /// Removes images that no sandbox uses, those that were not used for longest first, until all of
    /// them take `limit` bytes at most; and what packers that died have left.
    pub fn evict(&self, limit: u64, dry_run: bool) -> Result<Vec<Collected>, RootfsError> {
        let mut entries = self.entries()?;
        entries.sort_by_key(|entry| entry.ctime);
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut removed = Vec::new();
        for Entry { identity, bytes, .. } in entries {
            let dir = self.images().join(identity.as_str());
            let unfinished = !dir.join(IMAGE).exists();
            if (total <= limit && !unfinished) || !remove_unused(&dir, dry_run)? {
                continue;
            }
            total -= bytes;
            info!(%identity, mib = bytes >> 20, dry_run, "removing packed layers that no sandbox uses");
            removed.push(Collected { path: dir, bytes });
        }
        if total > limit {
            warn!(total, limit, "the packed layers in use alone exceed rootfs.cache_limit");
        }
        Ok(removed)
    }

    /// Removes the disks of sandboxes whose run directory is gone, as after a reboot of the host.
    pub fn remove_orphans(&self, dry_run: bool) -> Result<Vec<Collected>, RootfsError> {
        let _lock = self.lock_sandboxes()?;
        let mut removed = Vec::new();
        for entry in list(&self.sandboxes())? {
            // With the lock nobody is about to make the link: without one, somebody died doing so. In doubt,
            // there is a sandbox.
            if !is_ours(&entry) || !matches!(entry.join(SandboxDisks::RUN_DIR).try_exists(), Ok(false)) {
                continue;
            }
            let bytes = files::size_below(&entry);
            if !dry_run {
                remove(&entry)?;
            }
            removed.push(Collected { path: entry, bytes });
        }
        Ok(removed)
    }

    /// For whoever makes the directory of a sandbox, or takes one for an orphan. Held for
    /// milliseconds.
    pub(super) fn lock_sandboxes(&self) -> Result<Flock<File>, RootfsError> {
        let dir = self.sandboxes();
        let file = File::open(&dir).map_err(failed("cannot open", &dir))?;
        files::lock(file, Lock::Exclusive, LOCK_LIMIT).map_err(failed("cannot lock", &dir))
    }

    fn entries(&self) -> Result<Vec<Entry>, RootfsError> {
        let mut entries = Vec::new();
        for dir in list(&self.images())? {
            let Some(identity) = dir.file_name().and_then(Identity::from_name) else { continue };
            let meta = fs::metadata(dir.join(IMAGE)).or_else(|_| fs::metadata(&dir));
            // Somebody else may have removed it.
            let Ok(meta) = meta else { continue };
            let ctime = (meta.ctime(), meta.ctime_nsec());
            entries.push(Entry { identity, bytes: files::size_below(&dir), ctime });
        }
        Ok(entries)
    }
}

/// Locks the directory `dir`, after making it.
fn lock(dir: &Path, limits: &Limits) -> Result<Flock<File>, RootfsError> {
    let mut waited = false;
    loop {
        limits.check("waiting for another sandbox to pack the same image")?;
        make_dir(dir)?;
        let file = match File::open(dir) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(failed("cannot open", dir)(e)),
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) if files::is_at(&*lock, dir) => return Ok(lock),
            // Evicted, and perhaps made again, between open and lock.
            Ok(_) => {}
            Err((_, Errno::EWOULDBLOCK)) => {
                if !waited {
                    info!(dir = %dir.display(), "waiting for another sandbox that packs the same layers");
                }
                waited = true;
                thread::sleep(LOCK_POLL);
            }
            Err((_, errno)) => return Err(failed("cannot lock", dir)(errno.into())),
        }
    }
}

/// Removes the image in `dir` unless it is in use or somebody is at work there. Tells whether it did.
fn remove_unused(dir: &Path, dry_run: bool) -> Result<bool, RootfsError> {
    let Ok(file) = File::open(dir) else { return Ok(false) };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
    let used = fs::metadata(dir.join(IMAGE)).is_ok_and(|meta| meta.nlink() > 1);
    if used || !files::is_at(&*lock, dir) {
        return Ok(false);
    }
    if !dry_run {
        remove(dir)?;
    }
    Ok(true)
}

/// Renames `new`, which is on disk, and waits for the name to be there, too.
fn publish(new: &Path, image: &Path) -> Result<(), RootfsError> {
    cube_fault::point("create.image_packed");
    fs::rename(new, image).map_err(failed("cannot rename", new))?;
    let dir = image.parent().unwrap_or(image);
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(failed("cannot write out", dir))
}

/// Whether a directory has a name that a sandbox's has. A wrong `rootfs.cache_dir` must not cost somebody else's files.
fn is_ours(dir: &Path) -> bool {
    dir.file_name().and_then(|name| name.to_str()).is_some_and(RunDir::is_key)
}

fn make_dir(dir: &Path) -> Result<(), RootfsError> {
    files::make_dir(dir).map_err(failed("cannot create", dir))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, RootfsError> {
    files::entries(dir).map_err(failed("cannot list", dir))
}

fn remove_all_but(dir: &Path, kept: &str) -> Result<(), RootfsError> {
    let others = list(dir)?.into_iter().filter(|path| path.file_name().is_none_or(|name| name != kept));
    others.into_iter().try_for_each(|path| remove(&path))
}

pub(super) fn remove(path: &Path) -> Result<(), RootfsError> {
    files::remove(path).map_err(failed("cannot remove", path))
}

#[cfg(test)]
mod tests;
