//! How far work on large files has come.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Told how many bytes are done, of how many. An error from it ends the work with that error.
pub type Told<'a> = &'a mut dyn FnMut(u64, u64) -> io::Result<()>;

/// For work that nobody watches.
pub fn untold(_: u64, _: u64) -> io::Result<()> {
    Ok(())
}

/// Adds up what is done.
pub(super) struct Meter<'a> {
    told: Told<'a>,
    done: u64,
    total: u64,
}

impl Meter<'_> {
    pub(super) fn new(total: u64, told: Told<'_>) -> Meter<'_> {
        Meter { told, done: 0, total }
    }

    pub(super) fn add(&mut self, bytes: u64) -> io::Result<()> {
        self.done += bytes;
        // The total is what the file system has allocated, or a manifest claims.
        (self.told)(self.done.min(self.total), self.total)
    }
}

/// Bytes of the files that are no holes.
pub(super) fn data_bytes(paths: impl IntoIterator<Item = PathBuf>) -> u64 {
    let data = |path: &Path| path.metadata().map_or(0, |meta| meta.len().min(meta.blocks() * 512));
    paths.into_iter().map(|path| data(&path)).sum()
}
