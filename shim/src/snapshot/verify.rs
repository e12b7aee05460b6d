//! Whether the contents of a snapshot are those of which its manifest has the digests.
//!
//! That takes reading gigabytes, so it is done once: a stamp beside the manifest says of each file which
//! version of it was found to be right. As long as inode, length and time of change are the same, the file
//! is taken to be. A stamp protects from damage, not from an enemy: the store belongs to root.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::{
    FileDigest, Manifest, SnapshotError, Store,
    digest::digest,
    failed,
    meter::{Meter, Told, data_bytes},
};
use crate::{
    errors::chain,
    files::{self, LOCK_LIMIT, Lock},
    tenant::Tenant,
};

/// Name of the stamp.
pub(super) const STAMP: &str = "verified.json";

/// A version of a file that has the digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    sha256: String,
    bytes: u64,
    inode: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Version {
    fn of(path: &Path, sha256: &str) -> Result<Version, SnapshotError> {
        let meta = fs::symlink_metadata(path).map_err(failed("cannot open", path))?;
        Ok(Version {
            sha256: sha256.into(),
            bytes: meta.len(),
            inode: meta.ino(),
            modified_s: meta.mtime(),
            modified_ns: meta.mtime_nsec(),
        })
    }
}

type Stamp = BTreeMap<String, Version>;

/// A snapshot whose contents are right, and which cannot be removed while this lives.
#[derive(Debug)]
pub struct Held {
    /// What it is.
    pub manifest: Manifest,
    /// Where it is.
    pub dir: PathBuf,
    _lock: Flock<File>,
}

impl Store {
    /// The snapshot `name` to be read from. Files that have changed since they were last found to be right
    /// are read, which takes seconds per GiB.
    ///
    /// # Errors
    ///
    /// Those of [`Store::open`], and [`SnapshotError::Damaged`].
    pub fn hold(&self, name: &str, told: Told<'_>) -> Result<Held, SnapshotError> {
        self.checked(self.held(name)?, told)
    }

    /// As [`Store::hold`], for `tenant`.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::NotOwned`] for what is not its own, whether it exists or not. Nothing of that is read but
    /// the manifest.
    pub fn hold_for(&self, tenant: &Tenant, name: &str, told: Told<'_>) -> Result<Held, SnapshotError> {
        if !tenant.is_pod() {
            return self.hold(name, told);
        }
        let refused = |why: &str| {
            warn!(snapshot = name, %tenant, "a pod was refused a snapshot: {why}");
            SnapshotError::NotOwned { name: name.into(), tenant: tenant.clone() }
        };
        let held = self.held(name).map_err(|e| refused(&chain(&e)))?;
        match held.manifest.owner.as_ref() {
            owner if tenant.may_restore(owner) => self.checked(held, told),
            Some(owner) => Err(refused(&format!("it belongs to {owner}"))),
            None => Err(refused("it belongs to nobody: an older version has made it")),
        }
    }

    fn checked(&self, held: Held, told: Told<'_>) -> Result<Held, SnapshotError> {
        let stamp = read_stamp(&held.dir);
        let changed = |file: &&FileDigest| {
            let now = Version::of(&held.dir.join(&file.path), &file.sha256).ok();
            now.is_none() || now.as_ref() != stamp.get(&file.path)
        };
        let changed: Vec<_> = held.manifest.files.iter().filter(changed).collect();
        if !changed.is_empty() {
            compare(&held.dir, &changed, told)?;
            restamp(&held);
        }
        Ok(held)
    }

    /// Reads every file of the snapshot `name`, changed or not.
    ///
    /// # Errors
    ///
    /// As [`Store::hold`].
    pub fn verify(&self, name: &str, told: Told<'_>) -> Result<(), SnapshotError> {
        let held = self.held(name)?;
        compare(&held.dir, &held.manifest.files.iter().collect::<Vec<_>>(), told)?;
        restamp(&held);
        Ok(())
    }

    fn held(&self, name: &str) -> Result<Held, SnapshotError> {
        let dir = self.path(name)?;
        let file = File::open(&dir).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => self.not_found(name),
            _ => failed("cannot open", &dir)(source),
        })?;
        // Waits for one that is being given its name, or removed: then it is gone when this has the lock.
        let lock = files::lock(file, Lock::Shared, LOCK_LIMIT).map_err(failed("cannot lock", &dir))?;
        let (manifest, dir) = self.open(name)?;
        Ok(Held { manifest, dir, _lock: lock })
    }
}

fn compare(dir: &Path, files: &[&FileDigest], told: Told<'_>) -> Result<(), SnapshotError> {
    let total = data_bytes(files.iter().map(|file| dir.join(&file.path)));
    let mut meter = Meter::new(total, told);
    for file in files {
        let path = dir.join(&file.path);
        let digested = File::open(&path).and_then(|file| digest(&file, &mut |bytes| meter.add(bytes)));
        let found = digested.map_err(failed("cannot read", &path))?.sha256;
        if found != file.sha256 {
            return Err(SnapshotError::Damaged { path, found, expected: file.sha256.clone() });
        }
    }
    Ok(())
}

/// Says that the files in `dir` are right. They must be on disk, and not be written to any more.
pub(super) fn stamp(dir: &Path, files: &[FileDigest]) -> Result<(), SnapshotError> {
    let versions =
        files.iter().map(|file| Ok((file.path.clone(), Version::of(&dir.join(&file.path), &file.sha256)?)));
    let stamp = versions.collect::<Result<Stamp, SnapshotError>>()?;
    let path = dir.join(STAMP);
    let text = serde_json::to_vec(&stamp)
        .map_err(|source| SnapshotError::Manifest { path: path.clone(), source })?;
    crate::files::replace(&path, &text).map_err(failed("cannot write", &path))
}

/// The store may be on a read-only file system; then the files are read again the next time.
fn restamp(held: &Held) {
    if let Err(e) = stamp(&held.dir, &held.manifest.files) {
        debug!("a verified snapshot has no stamp: {}", chain(&e));
    }
}

/// What is missing or cannot be read says nothing.
fn read_stamp(dir: &Path) -> Stamp {
    fs::read(dir.join(STAMP)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}
