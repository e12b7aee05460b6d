//! What an import may take of the host.

use std::{
    cell::Cell,
    io::{self, Read},
    path::PathBuf,
    rc::Rc,
};

use nix::sys::statvfs::statvfs;

use super::{
    super::{Manifest, SnapshotError},
    bad,
};

/// How many times larger than the archive its data may be. Memory and disks of whatever runs are packed some ten
/// times; a bomb is packed ten thousand times and more.
const RATIO: u64 = 1000;

/// Data that is not worth a look at the ratio.
const SMALL: u64 = 64 << 20;

/// Counts what is read of an archive.
pub(super) struct Counted<R> {
    inner: R,
    read: Rc<Cell<u64>>,
}

impl<R: Read> Counted<R> {
    pub(super) fn new(inner: R) -> (Counted<R>, Rc<Cell<u64>>) {
        let read = Rc::new(Cell::new(0));
        (Counted { inner, read: read.clone() }, read)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// The room that an import has.
pub(super) struct Room {
    limit: u64,
    store: PathBuf,
    /// Bytes of the archive that were read.
    read: Rc<Cell<u64>>,
    /// Data that there is to be, and that was written.
    planned: u64,
    written: u64,
}

impl Room {
    pub(super) fn new(limit: u64, store: PathBuf, read: Rc<Cell<u64>>) -> Room {
        Room { limit, store, read, planned: 0, written: 0 }
    }

    /// Checks the whole of it, as far as the manifest tells.
    pub(super) fn has_all(&self, manifest: &Manifest) -> Result<(), SnapshotError> {
        let needed =
            manifest.files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.data.unwrap_or(0)));
        self.within_limit(needed)?;
        self.is_free(needed)
    }

    /// Checks the next file: `work` bytes to go through, of which `data` are to be written at most.
    pub(super) fn has(&mut self, work: u64, data: u64) -> Result<(), SnapshotError> {
        self.planned = self.planned.saturating_add(work);
        self.within_limit(self.planned)?;
        self.is_free(data)
    }

    /// Checks the next bytes that are to be written.
    pub(super) fn write(&mut self, bytes: u64) -> Result<(), SnapshotError> {
        self.written = self.written.saturating_add(bytes);
        match self.written > SMALL.max(self.read.get().saturating_mul(RATIO)) {
            true => Err(bad(
                "its data is packed more than 1000 times, which that of a sandbox never is. If it is meant to be so: `zstd -dc FILE | cubecli cubebox import -`",
            )),
            false => Ok(()),
        }
    }

    fn within_limit(&self, needed: u64) -> Result<(), SnapshotError> {
        let limit = self.limit;
        if needed > limit { Err(SnapshotError::Limit { needed, limit }) } else { Ok(()) }
    }

    fn is_free(&self, needed: u64) -> Result<(), SnapshotError> {
        // A file system that does not know its size refuses when it is full.
        let Ok(stat) = statvfs(&self.store) else { return Ok(()) };
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        if stat.blocks() > 0 && needed > free {
            return Err(SnapshotError::Space { dir: self.store.clone(), needed, free });
        }
        Ok(())
    }
}
