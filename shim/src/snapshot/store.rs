//! The directory of all snapshots.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::{DISKS, Draft, MANIFEST, Manifest, SnapshotError, VM, check, failed, verify};
use crate::{files, task::check_id};

/// The store in a directory, which need not exist.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// A snapshot in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// What it is.
    pub manifest: Manifest,
    /// Bytes on disk; those that it shares with others are counted for each.
    pub disk_bytes: u64,
}

impl Store {
    /// The store in `dir`.
    pub fn at(dir: &Path) -> Store {
        Store { dir: dir.into() }
    }

    /// Its directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the snapshot `name` is, or would be.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Name`]: a name never leads out of the store.
    pub fn path(&self, name: &str) -> Result<PathBuf, SnapshotError> {
        check_id("snapshot", name).map_err(|_| SnapshotError::Name(name.into()))?;
        Ok(self.dir.join(name))
    }

    /// The name of the snapshot that `text` means: its name, or its path. The path of anything outside of
    /// the store is refused: whoever may set annotations may not read the host's files by that.
    pub fn resolve<'a>(&self, text: &'a str) -> Result<&'a str, SnapshotError> {
        if !text.starts_with('/') {
            return Ok(text);
        }
        let path = Path::new(text);
        let name = path.file_name().and_then(|name| name.to_str());
        let is_here = path.parent().is_some_and(|parent| files::is_same(parent, &self.dir));
        let name = name.filter(|name| is_here && check_id("snapshot", name).is_ok());
        name.ok_or_else(|| SnapshotError::Outside { path: text.into(), dir: self.dir.clone() })
    }

    /// Begins the snapshot `name`. Nobody sees it before [`Draft::finish`].
    pub fn begin(&self, name: &str) -> Result<Draft, SnapshotError> {
        let target = self.path(name)?;
        let taken = |state| SnapshotError::Exists { name: name.into(), state };
        make_dir(&self.dir)?;
        let dir = self.dir.join(format!(".{name}.new"));
        make_dir(&dir)?;
        if !is_part(&dir) {
            return Err(failed("something else is at", &dir)(ErrorKind::AlreadyExists.into()));
        }
        let file = File::open(&dir).map_err(failed("cannot open", &dir))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| taken("is being made"))?;
        if target.exists() {
            remove(&dir)?;
            return Err(taken("exists"));
        }
        // What one that died has left.
        for entry in list(&dir)? {
            remove(&entry)?;
        }
        Draft::new(name, dir, target, lock)
    }

    /// The snapshot `name`, checked as far as that takes no reading of its large files.
    ///
    /// # Errors
    ///
    /// Those of a manifest that this build cannot read, of files that are missing, have another length or are
    /// none of the snapshot, and [`SnapshotError::Protocol`] for an agent that could not be talked to.
    pub fn open(&self, name: &str) -> Result<(Manifest, PathBuf), SnapshotError> {
        let dir = self.path(name)?;
        let manifest = check::read(name, &dir)?;
        check::usable(name, &manifest)?;
        check::lengths(name, &manifest, &dir)?;
        Ok((manifest, dir))
    }

    /// All that are complete, by name, and what cannot be read of them.
    pub fn list(&self) -> Result<Vec<Result<Listed, SnapshotError>>, SnapshotError> {
        let entries = match list(&self.dir) {
            Err(SnapshotError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Vec::new(),
            entries => entries?,
        };
        let names = entries.iter().filter_map(|path| path.file_name()?.to_str());
        let complete = names.filter(|name| !name.starts_with('.'));
        let read = |name: &str| {
            let dir = self.path(name)?;
            let manifest = check::read(name, &dir)?;
            Ok(Listed { manifest, disk_bytes: files::size_below(&dir) })
        };
        Ok(complete.map(read).collect())
    }

    /// Removes the snapshot `name`. Sandboxes that were restored from it go on.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::InUse`] while it is read from: a restore would fail at some point or other.
    pub fn remove(&self, name: &str) -> Result<(), SnapshotError> {
        let dir = self.path(name)?;
        let file = File::open(&dir).map_err(|source| match source.kind() {
            ErrorKind::NotFound => self.not_found(name),
            _ => failed("cannot open", &dir)(source),
        })?;
        let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| SnapshotError::InUse { name: name.into() })?;
        // Away from its name first: what is half removed is no snapshot.
        let doomed = self.dir.join(format!(".{name}.old"));
        remove(&doomed)?;
        match fs::rename(&dir, &doomed) {
            Ok(()) => remove(&doomed),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(self.not_found(name)),
            Err(e) => Err(failed("cannot remove", &dir)(e)),
        }
    }

    pub(super) fn not_found(&self, name: &str) -> SnapshotError {
        SnapshotError::NotFound { name: name.into(), dir: self.dir.clone() }
    }

    /// Removes what was left half made, or half removed. Gives what was, or with `dry_run` would be.
    pub fn collect(&self, dry_run: bool) -> Result<Vec<PathBuf>, SnapshotError> {
        let entries = match list(&self.dir) {
            Err(SnapshotError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Vec::new(),
            entries => entries?,
        };
        let mut removed = Vec::new();
        for path in entries {
            if !is_part(&path) {
                continue;
            }
            let Ok(file) = File::open(&path) else { continue };
            // Locked by whoever is making it.
            let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            if !dry_run {
                remove(&path)?;
            }
            removed.push(path);
        }
        Ok(removed)
    }
}

/// Whether this is a directory that [`Store::begin`] or [`Store::remove`] makes. A wrong `snapshot.dir` must not cost
/// somebody else's files: the name is one of ours, and so is all that is in it.
fn is_part(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('.'));
    let name = name.and_then(|name| name.strip_suffix(".new").or_else(|| name.strip_suffix(".old")));
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        [VM, DISKS, MANIFEST, verify::STAMP].contains(&name.strip_suffix(".new").unwrap_or(name))
    };
    name.is_some_and(|name| check_id("snapshot", name).is_ok())
        && is_dir
        && list(path).is_ok_and(|entries| entries.iter().all(is_ours))
}

pub(super) fn make_dir(dir: &Path) -> Result<(), SnapshotError> {
    files::make_dir(dir).map_err(failed("cannot create", dir))
}

pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, SnapshotError> {
    files::entries(dir).map_err(failed("cannot list", dir))
}

pub(super) fn remove(path: &Path) -> Result<(), SnapshotError> {
    files::remove(path).map_err(failed("cannot remove", path))
}
