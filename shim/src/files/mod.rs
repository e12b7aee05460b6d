//! Directories and large files of ours on the host: how they are found, made, locked, copied and removed.

mod copy;
mod dir;
mod lock;
mod place;
mod remove;
#[cfg(test)]
pub(crate) mod testing;

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

pub(crate) use copy::{copy, copy_told, seek};
pub(crate) use lock::{LOCK_LIMIT, Lock, lock};
pub(crate) use place::{canonical, is_at, is_same};
pub(crate) use remove::{is_mount_point, remove, remove_mount_points, unmount};

/// Makes `dir` with its parents, mode 0700, unless it is there.
pub(crate) fn make_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(dir) {
        // It was there, and is gone before it could be seen to be a directory.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The paths in `dir`, sorted.
pub(crate) fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    let mut paths: Vec<_> = entries.iter().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Makes the file `path`, mode 0600, or gives it another content, and waits until that is on disk. Whoever
/// reads it finds the old content or the new one.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&new, path));
    written.inspect_err(|_| drop(remove(&new)))
}

/// Bytes on disk of all below `dir`. What cannot be looked at takes nothing.
pub(crate) fn size_below(dir: &Path) -> u64 {
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => size_below(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    fs::read_dir(dir).into_iter().flatten().flatten().map(size).sum()
}
