//! Writing a snapshot into an archive, or a directory.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use tar::{Builder, EntryType, Header, HeaderMode};
use zstd::stream::write::Encoder;

use super::super::{
    DISKS, Held, MANIFEST, Manifest, SnapshotError, Store, VM, failed,
    meter::{Meter, Told, data_bytes},
    store::make_dir,
};
use crate::files;

/// zstd's default: at this level it is faster than most disks, and zeros cost nothing.
const LEVEL: i32 = 3;

impl Store {
    /// Writes the snapshot `name` to `output` as an archive, from which [`Store::import`] makes it again.
    ///
    /// # Errors
    ///
    /// Those of [`Store::hold`], [`SnapshotError::Output`], and whatever `told` ends it with, as the latter.
    pub fn export(&self, name: &str, output: impl Write, told: Told<'_>) -> Result<(), SnapshotError> {
        let held = self.hold(name, told)?;
        let total = data_bytes(held.manifest.files.iter().map(|file| held.dir.join(&file.path)));
        let compress = || -> io::Result<()> {
            let mut encoder = Encoder::new(BufWriter::new(output), LEVEL)?;
            // The digests in the manifest find any damage; this finds it at once.
            encoder.include_checksum(true)?;
            let encoder = archive(&held, Metered { inner: encoder, meter: Meter::new(total, told) })?;
            encoder.finish()?.flush()
        };
        compress().map_err(SnapshotError::Output)
    }

    /// Copies the snapshot `name` into the directory `to`, which is made, or is empty. [`Store::import_dir`]
    /// takes it back. On an error the directory is removed.
    ///
    /// # Errors
    ///
    /// Those of [`Store::hold`], and of files: a directory that is not empty is one that exists.
    pub fn copy_to(&self, name: &str, to: &Path, told: Told<'_>) -> Result<(), SnapshotError> {
        let held = self.hold(name, told)?;
        make_dir(to)?;
        if !files::entries(to).map_err(failed("cannot list", to))?.is_empty() {
            return Err(failed("cannot use", to)(io::ErrorKind::DirectoryNotEmpty.into()));
        }
        let copied = copy_files(&held.dir, to, &held.manifest, &mut |_| Ok(()));
        copied.inspect_err(|_| drop(files::remove(to)))
    }
}

fn archive<'a, W: Write>(held: &Held, output: Metered<'a, W>) -> io::Result<W> {
    let mut builder = Builder::new(output);
    builder.mode(HeaderMode::Deterministic);
    builder.sparse(true);
    let manifest = serde_json::to_vec_pretty(&held.manifest)?;
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_size(manifest.len() as u64);
    header.set_mode(0o600);
    builder.append_data(&mut header, MANIFEST, &manifest[..])?;
    for file in &held.manifest.files {
        builder.append_file(&file.path, &mut File::open(held.dir.join(&file.path))?)?;
    }
    Ok(builder.into_inner()?.inner)
}

/// Copies the files of `manifest` from one directory to another, which is empty; the manifest comes last.
pub(super) fn copy_files(
    from: &Path,
    to: &Path,
    manifest: &Manifest,
    told: &mut dyn FnMut(u64) -> io::Result<()>,
) -> Result<(), SnapshotError> {
    [VM, DISKS].iter().try_for_each(|sub| make_dir(&to.join(sub)))?;
    for file in &manifest.files {
        let target = to.join(&file.path);
        files::copy_told(&from.join(&file.path), &target, told).map_err(failed("cannot copy to", &target))?;
        let written = File::open(&target).and_then(|file| file.sync_all());
        written.map_err(failed("cannot write out", &target))?;
    }
    let path = to.join(MANIFEST);
    let text = fs::read(from.join(MANIFEST)).and_then(|text| files::replace(&path, &text));
    text.map_err(failed("cannot write", &path))
}

/// Counts what goes through it.
struct Metered<'a, W> {
    inner: W,
    meter: Meter<'a>,
}

impl<W: Write> Write for Metered<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.meter.add(written as u64)?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
