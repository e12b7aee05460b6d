//! The directory of all snapshots.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use cube_protocol::version;
use nix::fcntl::{Flock, FlockArg};

use super::{DiskFile, FileDigest, MANIFEST, Manifest, SnapshotError, digest::digest, failed};
use crate::{files, task::check_id, vmm::Disk};

const VM: &str = "vm";
const DISKS: &str = "disks";

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
        let below = Path::new(text).strip_prefix(&self.dir).ok().and_then(Path::to_str);
        let name = below.filter(|name| check_id("snapshot", name).is_ok());
        name.ok_or_else(|| SnapshotError::Outside { path: text.into(), dir: self.dir.clone() })
    }

    /// Begins the snapshot `name`. Nobody sees it before [`Draft::finish`].
    pub fn begin(&self, name: &str) -> Result<Draft, SnapshotError> {
        let target = self.path(name)?;
        let taken = |state| SnapshotError::Exists { name: name.into(), state };
        make_dir(&self.dir)?;
        let dir = self.dir.join(format!(".{name}.new"));
        make_dir(&dir)?;
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
        let draft = Draft { name: name.into(), dir, target, _lock: lock };
        make_dir(&draft.vm_dir())?;
        make_dir(&draft.dir.join(DISKS))?;
        Ok(draft)
    }

    /// The snapshot `name`, checked as far as that takes no reading of its large files.
    ///
    /// # Errors
    ///
    /// Those of a manifest that this build cannot read, of files that are missing, have another length or are
    /// none of the snapshot, and [`SnapshotError::Protocol`] for an agent that could not be talked to.
    pub fn open(&self, name: &str) -> Result<(Manifest, PathBuf), SnapshotError> {
        let dir = self.path(name)?;
        let manifest = self.read(name, &dir)?;
        let ours = version::CURRENT;
        let speaks = |text: &str| text.split('.').next() == Some(&ours.major.to_string());
        if !speaks(&manifest.protocol) {
            let (found, known) = (manifest.protocol, ours.to_string());
            return Err(SnapshotError::Protocol { name: name.into(), found, known });
        }
        let foreign = |path: &str| SnapshotError::Foreign { name: name.into(), path: path.into() };
        for disk in &manifest.disks {
            let known = manifest.files.iter().any(|file| file.path == disk.file);
            if !known || !is_serial(&disk.serial) || disk.file != format!("{DISKS}/{}", disk.serial) {
                return Err(foreign(&disk.file));
            }
        }
        for file in &manifest.files {
            let path = dir.join(&file.path);
            let below = [VM, DISKS].iter().any(|sub| path.parent() == Some(&dir.join(sub)));
            let meta = fs::symlink_metadata(&path).map_err(failed("cannot open", &path))?;
            if !below || !meta.is_file() {
                return Err(foreign(&file.path));
            }
            if meta.len() != file.bytes {
                return Err(SnapshotError::Damaged { path, found: meta.len(), expected: file.bytes });
            }
        }
        Ok((manifest, dir))
    }

    fn read(&self, name: &str, dir: &Path) -> Result<Manifest, SnapshotError> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => SnapshotError::NotFound { name: name.into(), dir: self.dir.clone() },
            _ => failed("cannot read", &path)(source),
        })?;
        let parsed = serde_json::from_slice::<serde_json::Value>(&text);
        let value = parsed.map_err(|source| SnapshotError::Manifest { path: path.clone(), source })?;
        match value["format"].as_u64() {
            Some(found) if found != u64::from(Manifest::FORMAT) => {
                let found = u32::try_from(found).unwrap_or(u32::MAX);
                return Err(SnapshotError::Format { name: name.into(), found, known: Manifest::FORMAT });
            }
            _ => {}
        }
        serde_json::from_value(value).map_err(|source| SnapshotError::Manifest { path, source })
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
            let manifest = self.read(name, &dir)?;
            Ok(Listed { manifest, disk_bytes: files::size_below(&dir) })
        };
        Ok(complete.map(read).collect())
    }

    /// Removes the snapshot `name`. Sandboxes that were restored from it go on.
    pub fn remove(&self, name: &str) -> Result<(), SnapshotError> {
        let dir = self.path(name)?;
        // Away from its name first: what is half removed is no snapshot.
        let doomed = self.dir.join(format!(".{name}.old"));
        match fs::rename(&dir, &doomed) {
            Ok(()) => remove(&doomed),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                Err(SnapshotError::NotFound { name: name.into(), dir: self.dir.clone() })
            }
            Err(e) => Err(failed("cannot remove", &dir)(e)),
        }
    }

    /// Removes what was left half made, or half removed. Gives what was, or with `dry_run` would be.
    pub fn collect(&self, dry_run: bool) -> Result<Vec<PathBuf>, SnapshotError> {
        let entries = match list(&self.dir) {
            Err(SnapshotError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Vec::new(),
            entries => entries?,
        };
        let mut removed = Vec::new();
        for path in entries {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !(name.starts_with('.') && (name.ends_with(".new") || name.ends_with(".old"))) {
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

/// A snapshot that is being made. Dropping it leaves it to [`Store::begin`] and [`Store::collect`].
#[derive(Debug)]
pub struct Draft {
    name: String,
    dir: PathBuf,
    target: PathBuf,
    _lock: Flock<File>,
}

impl Draft {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
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
        let finished = self.try_finish(manifest, disks);
        if finished.is_err() {
            remove(&self.dir)?;
        }
        finished
    }

    fn try_finish(&self, mut manifest: Manifest, disks: &[Disk]) -> Result<Listed, SnapshotError> {
        for disk in disks {
            let to = self.disk(disk);
            if !to.exists() {
                files::copy(&disk.path, &to).map_err(failed("cannot copy the disk to", &to))?;
            }
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
            sync(&self.dir.join(sub))?;
        }
        self.write(&manifest)?;
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

    fn write(&self, manifest: &Manifest) -> Result<(), SnapshotError> {
        let path = self.dir.join(MANIFEST);
        let text = serde_json::to_vec_pretty(manifest)
            .map_err(|source| SnapshotError::Manifest { path: path.clone(), source })?;
        let written =
            File::options().write(true).create_new(true).mode(0o600).open(&path).and_then(|mut file| {
                file.write_all(&text)?;
                file.sync_all()
            });
        written.map_err(failed("cannot write", &path))
    }

    /// Reads what is no hole of the file, and waits until it is on disk.
    fn digest(&self, path: &Path) -> Result<FileDigest, SnapshotError> {
        let hashed = File::open(path).and_then(|file| {
            file.sync_all()?;
            digest(&file)
        });
        let (bytes, sha256) = hashed.map_err(failed("cannot read", path))?;
        let below = path.strip_prefix(&self.dir).unwrap_or(path);
        Ok(FileDigest { path: below.to_string_lossy().into_owned(), bytes, sha256 })
    }
}

/// Whether it can be the serial of a virtio-blk device, and a file name.
fn is_serial(serial: &str) -> bool {
    (1..=20).contains(&serial.len())
        && serial.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn make_dir(dir: &Path) -> Result<(), SnapshotError> {
    files::make_dir(dir).map_err(failed("cannot create", dir))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, SnapshotError> {
    files::entries(dir).map_err(failed("cannot list", dir))
}

fn remove(path: &Path) -> Result<(), SnapshotError> {
    files::remove(path).map_err(failed("cannot remove", path))
}

fn sync(dir: &Path) -> Result<(), SnapshotError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("cannot write out", dir))
}
