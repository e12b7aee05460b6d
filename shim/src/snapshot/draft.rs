//! A snapshot that is being made.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use nix::fcntl::Flock;

use super::{
    DISKS, DiskFile, FileDigest, Listed, MANIFEST, Manifest, SnapshotError, VM, WrittenBy,
    digest::{Digested, digest},
    failed,
    store::{list, make_dir, remove},
    verify,
};
use crate::{
    files,
    vmm::{self, Disk},
};

/// Copies that must be made while the guest stands still.
#[derive(Debug)]
pub struct Copies(Vec<(Disk, PathBuf)>);

impl Copies {
    /// Copies the disks that the guest can write to. Of the others it takes the file itself where that is
    /// possible, for nobody ever changes it, and the sandbox may be deleted soon; else [`Draft::finish`]
    /// copies them, when the guest runs again.
    pub fn make(&self) -> Result<(), SnapshotError> {
        self.0.iter().try_for_each(|(disk, to)| {
            if disk.read_only {
                let _ = fs::hard_link(&disk.path, to);
                return Ok(());
            }
            files::copy(&disk.path, to).map_err(failed("cannot copy the disk to", to))
        })
    }
}

/// A snapshot that is being made. Dropping it leaves it to [`Store::begin`](super::Store::begin) and
/// [`Store::collect`](super::Store::collect).
#[derive(Debug)]
pub struct Draft {
    name: String,
    dir: PathBuf,
    target: PathBuf,
    _lock: Flock<File>,
}

impl Draft {
    /// An empty one in `dir`, which is there and locked.
    pub(super) fn new(
        name: &str,
        dir: PathBuf,
        target: PathBuf,
        lock: Flock<File>,
    ) -> Result<Draft, SnapshotError> {
        let draft = Draft { name: name.into(), dir, target, _lock: lock };
        make_dir(&draft.vm_dir())?;
        make_dir(&draft.dir.join(DISKS))?;
        Ok(draft)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its files are until it is complete.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the VMM writes to: empty, mode 0700.
    pub fn vm_dir(&self) -> PathBuf {
        self.dir.join(VM)
    }

    /// How the disks get into the snapshot.
    pub fn copies(&self, disks: &[Disk]) -> Copies {
        Copies(disks.iter().map(|disk| (disk.clone(), self.disk(disk))).collect())
    }

    /// Completes it: the disks that never change, the digests, the name. Takes seconds per GiB of data. On an
    /// error nothing is left of it.
    pub fn finish(self, manifest: Manifest, disks: &[Disk]) -> Result<Listed, SnapshotError> {
        let finished = self.digested(manifest, disks).and_then(|manifest| self.publish(manifest));
        self.or_remove(finished)
    }

    /// Completes it with files that are there, and are those of `manifest`. On an error nothing is left of it.
    pub(super) fn complete(self, manifest: Manifest) -> Result<Listed, SnapshotError> {
        let published = self.publish(manifest);
        self.or_remove(published)
    }

    fn or_remove<T>(&self, result: Result<T, SnapshotError>) -> Result<T, SnapshotError> {
        if result.is_err() {
            remove(&self.dir)?;
        }
        result
    }

    /// `manifest` with the files that are in it.
    fn digested(&self, mut manifest: Manifest, disks: &[Disk]) -> Result<Manifest, SnapshotError> {
        for disk in disks {
            let to = self.disk(disk);
            if !to.exists() {
                files::copy(&disk.path, &to).map_err(failed("cannot copy the disk to", &to))?;
            }
        }
        if let Some(vmm) = written_by(&self.vm_dir())? {
            manifest.vmm = vmm;
        }
        manifest.disks = disks
            .iter()
            .map(|disk| DiskFile {
                serial: disk.serial.clone(),
                read_only: disk.read_only,
                file: format!("{DISKS}/{}", disk.serial),
            })
            .collect();
        manifest.files = Vec::new();
        for sub in [VM, DISKS] {
            for path in list(&self.dir.join(sub))? {
                manifest.files.push(self.digest(&path)?);
            }
        }
        Ok(manifest)
    }

    /// Gives it its name. Its files are on disk.
    fn publish(&self, manifest: Manifest) -> Result<Listed, SnapshotError> {
        [VM, DISKS].iter().try_for_each(|sub| sync(&self.dir.join(sub)))?;
        verify::stamp(&self.dir, &manifest.files)?;
        let path = self.dir.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|source| SnapshotError::Manifest { path: path.clone(), source })?;
        files::replace(&path, &text).map_err(failed("cannot write", &path))?;
        sync(&self.dir)?;
        fs::rename(&self.dir, &self.target).map_err(failed("cannot rename", &self.dir))?;
        sync(self.target.parent().unwrap_or(&self.target))?;
        Ok(Listed { manifest, disk_bytes: files::size_below(&self.target) })
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), SnapshotError> {
        remove(&self.dir)
    }

    fn disk(&self, disk: &Disk) -> PathBuf {
        self.dir.join(DISKS).join(&disk.serial)
    }

    /// Reads what is no hole of the file, and waits until it is on disk.
    fn digest(&self, path: &Path) -> Result<FileDigest, SnapshotError> {
        let hashed = File::open(path).and_then(|file| {
            file.sync_all()?;
            digest(&file, &mut |_| Ok(()))
        });
        let Digested { bytes, data, sha256 } = hashed.map_err(failed("cannot read", path))?;
        let below = path.strip_prefix(&self.dir).unwrap_or(path);
        Ok(FileDigest { path: below.to_string_lossy().into_owned(), bytes, data: Some(data), sha256 })
    }
}

/// What the VMM says of itself in what it has written, if it does.
fn written_by(vm_dir: &Path) -> Result<Option<WrittenBy>, SnapshotError> {
    let path = vm_dir.join(vmm::WRITTEN_BY);
    match fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).map(Some).map_err(|source| SnapshotError::Manifest { path, source })
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("cannot read", &path)(e)),
    }
}

fn sync(dir: &Path) -> Result<(), SnapshotError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("cannot write out", dir))
}
