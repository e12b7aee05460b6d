//! Making a snapshot from an archive or a directory, which may say anything.

use std::{
    cell::Cell,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, ErrorKind, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    rc::Rc,
};

use tar::{Archive, Entry};
use zstd::stream::read::Decoder;

use super::{
    super::{
        Draft, FileDigest, Listed, MANIFEST, Manifest, SnapshotError, Store, check,
        digest::{BLOCK, Digest, digest},
        failed,
        meter::{Meter, Told, data_bytes},
    },
    ZSTD_MAGIC, export,
};

/// Longest manifest. One of a guest with hundreds of streams has some ten KiB.
const MANIFEST_MAX: u64 = 4 << 20;

/// What may come between the data of two files: the map of a sparse file has 24 bytes for each piece of data.
const HEADERS_MAX: u64 = 64 << 20;

impl Store {
    /// Makes a snapshot from an archive of [`Store::export`], compressed or not, and gives it `name`, or the
    /// name that it had. Nobody sees it before all of it was found to be right; of what is not, nothing is
    /// left. Needs little memory, whatever the archive holds.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Exists`], [`SnapshotError::Archive`] for what is no archive of a whole snapshot,
    /// [`SnapshotError::Damaged`], and those of a manifest that this build does not take.
    pub fn import(
        &self,
        input: impl Read,
        name: Option<&str>,
        told: Told<'_>,
    ) -> Result<Listed, SnapshotError> {
        let mut input = BufReader::new(input);
        let is_compressed = input.fill_buf().map_err(SnapshotError::Input)?.starts_with(&ZSTD_MAGIC);
        match is_compressed {
            true => {
                let decoder = Decoder::with_buffer(input).map_err(SnapshotError::Input)?;
                self.unpack(decoder, name, told)
            }
            false => self.unpack(input, name, told),
        }
    }

    /// As [`Store::import`], from a directory that [`Store::copy_to`] has made.
    pub fn import_dir(
        &self,
        from: &Path,
        name: Option<&str>,
        told: Told<'_>,
    ) -> Result<Listed, SnapshotError> {
        let path = from.join(MANIFEST);
        let file = File::open(&path).map_err(failed("cannot open", &path))?;
        let manifest = manifest(file, &path.to_string_lossy(), name)?;
        check::lengths(&manifest.name, &manifest, from)?;
        let draft = self.begin(&manifest.name)?;
        or_discard(draft, manifest, |draft, manifest| {
            export::copy_files(from, draft.dir(), manifest)?;
            let total = data_bytes(manifest.files.iter().map(|file| draft.dir().join(&file.path)));
            let mut meter = Meter::new(total, told);
            manifest.files.iter().try_for_each(|file| {
                let path = draft.dir().join(&file.path);
                let digested = File::open(&path).and_then(|file| digest(&file, &mut |n| meter.add(n)));
                let (_, found) = digested.map_err(failed("cannot read", &path))?;
                same(file, found)
            })
        })
    }

    fn unpack(&self, input: impl Read, name: Option<&str>, told: Told<'_>) -> Result<Listed, SnapshotError> {
        let budget = Rc::new(Cell::new(HEADERS_MAX));
        let mut archive = Archive::new(Rationed { inner: input, budget: budget.clone() });
        let mut entries = archive.entries().map_err(SnapshotError::Input)?;
        let mut next = || {
            budget.set(HEADERS_MAX);
            let entry = entries.next().transpose().map_err(SnapshotError::Input)?;
            budget.set(u64::MAX);
            Ok::<_, SnapshotError>(entry)
        };
        let first = next().map_err(no_archive)?.ok_or_else(|| bad("it is empty"))?;
        expect(&first, MANIFEST)?;
        let manifest = manifest(first, MANIFEST, name)?;
        let draft = self.begin(&manifest.name)?;
        or_discard(draft, manifest, |draft, manifest| {
            let mut meter = Meter::new(manifest.files.iter().map(|file| file.bytes).sum(), told);
            for file in &manifest.files {
                let entry = next()?.ok_or_else(|| bad(&format!("{} is missing", file.path)))?;
                expect(&entry, &file.path)?;
                write_file(entry, draft, file, &mut meter)?;
            }
            match next()? {
                Some(more) => Err(bad(&format!("{:?} is not in its manifest", lossy(&more)))),
                None => Ok(()),
            }
        })
    }
}

/// What fails at the first header is something else altogether.
fn no_archive(error: SnapshotError) -> SnapshotError {
    match error {
        // What the crate tar says of a header; the text that it quotes may be anything.
        SnapshotError::Input(e) if matches!(e.kind(), ErrorKind::Other | ErrorKind::UnexpectedEof) => {
            bad("it is no tar archive, compressed with zstd or not")
        }
        other => other,
    }
}

/// Completes `draft` if `fill` succeeds, else removes it.
fn or_discard(
    draft: Draft,
    manifest: Manifest,
    fill: impl FnOnce(&Draft, &Manifest) -> Result<(), SnapshotError>,
) -> Result<Listed, SnapshotError> {
    match fill(&draft, &manifest) {
        Ok(()) => draft.complete(manifest),
        Err(e) => {
            draft.discard()?;
            Err(e)
        }
    }
}

/// The manifest, with the name that the snapshot is to have.
fn manifest(input: impl Read, path: &str, name: Option<&str>) -> Result<Manifest, SnapshotError> {
    let mut text = Vec::new();
    input.take(MANIFEST_MAX + 1).read_to_end(&mut text).map_err(SnapshotError::Input)?;
    if text.len() as u64 > MANIFEST_MAX {
        return Err(bad("its manifest is too long"));
    }
    let mut manifest = check::parse(name.unwrap_or("to be imported"), Path::new(path), &text)?;
    if let Some(name) = name {
        manifest.name = name.into();
    }
    // Who owns it here is not for an archive to say.
    manifest.owner = None;
    check::usable(&manifest.name, &manifest)?;
    Ok(manifest)
}

fn expect<R: Read>(entry: &Entry<'_, R>, path: &str) -> Result<(), SnapshotError> {
    let kind = entry.header().entry_type();
    let is_file = kind.is_file() || kind.is_gnu_sparse();
    match is_file && entry.path_bytes() == path.as_bytes() {
        true => Ok(()),
        false => Err(bad(&format!("it has {:?}, a {kind:?}, in place of the file {path}", lossy(entry)))),
    }
}

/// Writes the file, but not its zeros, and checks that it is the one that the manifest means.
fn write_file(
    mut entry: Entry<'_, impl Read>,
    draft: &Draft,
    file: &FileDigest,
    meter: &mut Meter<'_>,
) -> Result<(), SnapshotError> {
    if entry.size() != file.bytes {
        let what = format!("{} has {} bytes, its manifest says {}", file.path, entry.size(), file.bytes);
        return Err(bad(&what));
    }
    let path = draft.dir().join(&file.path);
    let cannot_write = |source| failed("cannot write", &path)(source);
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let target = made.map_err(cannot_write)?;
    target.set_len(file.bytes).map_err(cannot_write)?;
    let (mut digest, mut block) = (Digest::default(), vec![0; BLOCK as usize]);
    for number in 0..file.bytes.div_ceil(BLOCK) {
        let at = number * BLOCK;
        let here = usize::try_from(file.bytes - at).unwrap_or(usize::MAX).min(block.len());
        let block = &mut block[..here];
        entry.read_exact(block).map_err(SnapshotError::Input)?;
        if digest.block(number, block) {
            target.write_all_at(block, at).map_err(cannot_write)?;
        }
        meter.add(here as u64).map_err(SnapshotError::Input)?;
    }
    target.sync_all().map_err(cannot_write)?;
    same(file, digest.finish())
}

fn lossy<R: Read>(entry: &Entry<'_, R>) -> String {
    String::from_utf8_lossy(&entry.path_bytes()).chars().take(200).collect()
}

fn same(file: &FileDigest, found: String) -> Result<(), SnapshotError> {
    match found == file.sha256 {
        true => Ok(()),
        false => {
            let expected = file.sha256.clone();
            Err(SnapshotError::Damaged { path: file.path.clone().into(), found, expected })
        }
    }
}

fn bad(what: &str) -> SnapshotError {
    SnapshotError::Archive { what: what.into() }
}

/// Ends when its budget is spent: what comes before the data of a file is kept in memory.
struct Rationed<R> {
    inner: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for Rationed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.get();
        if left == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "headers without end"));
        }
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        self.budget.set(left - read as u64);
        Ok(read)
    }
}
