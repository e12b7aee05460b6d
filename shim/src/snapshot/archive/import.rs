//! Making a snapshot from an archive or a directory, which may say anything.

use std::{
    cell::Cell,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Read},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    rc::Rc,
};

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, statfs};
use zstd::stream::read::Decoder;

use super::{
    super::{
        Draft, FileDigest, Listed, MANIFEST, Manifest, SnapshotError, Store, check,
        digest::{BLOCK, Digest, Digested, digest},
        failed,
        meter::{Meter, Told, data_bytes},
    },
    ZSTD_MAGIC, bad, export,
    members::{Member, Members, lossy},
    room::{Counted, Room},
};
use crate::{task::check_id, tenant::Tenant};

/// Longest manifest. One of a guest with hundreds of streams has some ten KiB.
const MANIFEST_MAX: u64 = 4 << 20;

/// Largest window of a compressed archive, as a power of two: it is kept in memory. That of `zstd -19`.
const WINDOW_LOG_MAX: u32 = 23;

/// For whom a snapshot is imported, and how.
#[derive(Debug, Clone, Copy)]
pub struct Import<'a> {
    /// The name that it gets; the one that it had, if none is given.
    pub name: Option<&'a str>,
    /// The containerd namespace that it is for. What the archive says of that means another host.
    pub namespace: &'a str,
    /// The Kubernetes namespace whose pods it is for, if it is for any.
    pub pod_namespace: Option<&'a str>,
    /// Bytes of data that it may have.
    pub limit: u64,
}

impl Store {
    /// Makes a snapshot from an archive of [`Store::export`], compressed or not. Nobody sees it before all of it
    /// was found to be right; of what is not, nothing is left. Needs little memory, whatever the archive holds,
    /// and writes nothing before it is known that there is room.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::Exists`], [`SnapshotError::Archive`] for what is no archive of a whole snapshot,
    /// [`SnapshotError::Limit`], [`SnapshotError::Space`], [`SnapshotError::Damaged`], and those of a manifest
    /// that this build does not take.
    pub fn import(
        &self,
        input: impl Read,
        import: Import<'_>,
        told: Told<'_>,
    ) -> Result<Listed, SnapshotError> {
        let (input, read) = Counted::new(input);
        let mut input = BufReader::new(input);
        let is_compressed = input.fill_buf().map_err(SnapshotError::Input)?.starts_with(&ZSTD_MAGIC);
        match is_compressed {
            true => {
                let mut decoder = Decoder::with_buffer(input).map_err(SnapshotError::Input)?;
                decoder.window_log_max(WINDOW_LOG_MAX).map_err(SnapshotError::Input)?;
                self.unpack(decoder, read, import, told)
            }
            false => self.unpack(input, read, import, told),
        }
    }

    /// As [`Store::import`], from a directory that [`Store::copy_to`] has made.
    pub fn import_dir(
        &self,
        from: &Path,
        import: Import<'_>,
        told: Told<'_>,
    ) -> Result<Listed, SnapshotError> {
        let path = from.join(MANIFEST);
        let manifest = manifest(read_file(&path, MANIFEST_MAX)?, &path, import)?;
        check::lengths(&manifest.name, &manifest, from)?;
        let data = data_bytes(manifest.files.iter().map(|file| from.join(&file.path)));
        let draft = self.begin(&manifest.name)?;
        or_discard(draft, manifest, |draft, manifest| {
            let mut room = Room::new(import.limit, draft.dir().into(), Rc::default());
            room.has(data, if share_blocks(from, draft.dir()) { 0 } else { data })?;
            // Each byte is copied, and read.
            let mut meter = Meter::new(2 * data, told);
            export::copy_files(from, draft.dir(), manifest, &mut |bytes| meter.add(bytes))?;
            manifest.files.iter().try_for_each(|file| {
                let path = draft.dir().join(&file.path);
                let digested = File::open(&path).and_then(|file| digest(&file, &mut |n| meter.add(n)));
                same(file, digested.map_err(failed("cannot read", &path))?)
            })
        })
    }

    fn unpack(
        &self,
        input: impl Read,
        read: Rc<Cell<u64>>,
        import: Import<'_>,
        told: Told<'_>,
    ) -> Result<Listed, SnapshotError> {
        let mut members = Members::new(input);
        let first = members.next()?.ok_or_else(|| bad("it is empty"))?;
        expect(&first, MANIFEST)?;
        let manifest = manifest(text(&mut members, &first)?, Path::new(MANIFEST), import)?;
        let draft = self.begin(&manifest.name)?;
        or_discard(draft, manifest, |draft, manifest| {
            let mut room = Room::new(import.limit, self.dir().into(), read);
            room.has_all(manifest)?;
            let mut meter =
                Meter::new(manifest.files.iter().map(|file| file.data.unwrap_or(file.bytes)).sum(), told);
            for file in &manifest.files {
                let member = members.next()?.ok_or_else(|| bad(&format!("{} is missing", file.path)))?;
                expect(&member, &file.path)?;
                write_file(&mut members, &member, draft, file, &mut room, &mut meter)?;
            }
            match members.next()? {
                Some(more) => Err(bad(&format!("{:?} is not in its manifest", lossy(&more.path)))),
                None => Ok(()),
            }
        })
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

/// The manifest, with the name that the snapshot is to have, and for whom it is.
fn manifest(text: Vec<u8>, path: &Path, import: Import<'_>) -> Result<Manifest, SnapshotError> {
    let mut manifest = check::parse(import.name.unwrap_or("to be imported"), path, &text)?;
    match import.name {
        Some(name) => manifest.name = name.into(),
        // Not quoted: it may be anything, of any length.
        None if check_id("snapshot", &manifest.name).is_err() => {
            return Err(bad("the name in its manifest is not valid: give it another one"));
        }
        None => {}
    }
    // Whose it is here is not for an archive to say.
    manifest.origin.namespace = import.namespace.into();
    let pod_namespace = import.pod_namespace.map(Into::into);
    manifest.owner = Some(Tenant { namespace: import.namespace.into(), pod_namespace });
    check::usable(&manifest.name, &manifest)?;
    Ok(manifest)
}

fn text(members: &mut Members<impl Read>, member: &Member) -> Result<Vec<u8>, SnapshotError> {
    if member.bytes > MANIFEST_MAX {
        return Err(bad("its manifest is too long"));
    }
    let mut text = vec![0; member.bytes as usize];
    members.take(member, |number, block| {
        let at = (number * BLOCK) as usize;
        text[at..at + block.len()].copy_from_slice(block);
        Ok(())
    })?;
    Ok(text)
}

/// What is in the file `path`, which is a file and no longer than `max`.
fn read_file(path: &Path, max: u64) -> Result<Vec<u8>, SnapshotError> {
    // Of a FIFO nobody waits for a writer.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = opened.map_err(failed("cannot open", path))?;
    let meta = file.metadata().map_err(failed("cannot open", path))?;
    if !meta.is_file() || meta.len() > max {
        return Err(bad("its manifest is no file, or too long"));
    }
    let mut text = Vec::new();
    file.take(max).read_to_end(&mut text).map_err(failed("cannot read", path))?;
    Ok(text)
}

/// Whether a copy from one directory to the other takes no room.
fn share_blocks(a: &Path, b: &Path) -> bool {
    let device = |dir: &Path| dir.metadata().ok().map(|meta| meta.dev());
    let kind = statfs(b).map(|stat| stat.filesystem_type());
    device(a).is_some() && device(a) == device(b) && matches!(kind, Ok(BTRFS_SUPER_MAGIC | XFS_SUPER_MAGIC))
}

fn expect(member: &Member, path: &str) -> Result<(), SnapshotError> {
    match member.path == path.as_bytes() {
        true => Ok(()),
        false => Err(bad(&format!("it has {:?} in place of {path}", lossy(&member.path)))),
    }
}

/// Writes the file, but not its zeros, and checks that it is the one that the manifest means.
fn write_file(
    members: &mut Members<impl Read>,
    member: &Member,
    draft: &Draft,
    file: &FileDigest,
    room: &mut Room,
    meter: &mut Meter<'_>,
) -> Result<(), SnapshotError> {
    if member.bytes != file.bytes {
        let what = format!("{} has {} bytes, its manifest says {}", file.path, member.bytes, file.bytes);
        return Err(bad(&what));
    }
    let work = member.blocks().saturating_mul(BLOCK).min(file.bytes);
    let most = file.data.unwrap_or(work);
    if most > work {
        return Err(bad(&format!("{} has less data than its manifest says", file.path)));
    }
    room.has(work, most)?;
    let path = draft.dir().join(&file.path);
    let cannot_write = |source| failed("cannot write", &path)(source);
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let target = made.map_err(cannot_write)?;
    target.set_len(file.bytes).map_err(cannot_write)?;
    let mut digest = Digest::default();
    members.take(member, |number, block| {
        if digest.block(number, block) {
            if digest.data() > most {
                return Err(bad(&format!("{} has more data than its manifest says", file.path)));
            }
            room.write(block.len() as u64)?;
            target.write_all_at(block, number * BLOCK).map_err(cannot_write)?;
        }
        meter.add(block.len() as u64).map_err(SnapshotError::Input)
    })?;
    target.sync_all().map_err(cannot_write)?;
    same(file, digest.finish(file.bytes))
}

fn same(file: &FileDigest, found: Digested) -> Result<(), SnapshotError> {
    match found.sha256 == file.sha256 {
        true => Ok(()),
        false => {
            let expected = file.sha256.clone();
            Err(SnapshotError::Damaged { path: file.path.clone().into(), found: found.sha256, expected })
        }
    }
}
