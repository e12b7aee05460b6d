//! The contract of archives: what arrives is what was sent, or nothing.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
};

use tar::{Builder, EntryType, Header};

use super::super::{
    tests::{Place, manifest, place},
    *,
};
use crate::{errors::chain, files, tenant::Tenant};

/// More than the sizes of a tar header can say in octal.
const LARGE: u64 = (1 << 33) + 5;
const SMALL: u64 = 1 << 20;

/// An import of a snapshot of any size.
pub(super) fn named(name: Option<&str>) -> Import<'_> {
    Import { name, namespace: "importers", pod_namespace: None, limit: u64::MAX }
}

/// A place with a snapshot "one" that has a large file with little in it.
pub(super) fn with_snapshot(len: u64) -> Place {
    let place = place();
    let draft = place.store.begin("one").unwrap();
    let memory = File::create(draft.vm_dir().join("memory-ranges")).unwrap();
    memory.set_len(len).unwrap();
    for (at, bytes) in [(5, &b"begin"[..]), (len / 2 + 3, b"middle"), (len - 3, b"end")] {
        memory.write_all_at(bytes, at).unwrap();
    }
    File::create(draft.vm_dir().join("hole")).unwrap().set_len(1 << 20).unwrap();
    File::create(draft.vm_dir().join("nothing")).unwrap();
    let disks = place.disks();
    draft.copies(&disks).make().unwrap();
    draft.finish(manifest("one"), &disks).unwrap();
    place
}

impl Place {
    pub(super) fn export(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        self.store.export("one", &mut archive, &mut untold).unwrap();
        archive
    }

    /// The archive, unpacked, as somebody without zstd would have it.
    pub(super) fn tar(&self) -> Vec<u8> {
        zstd::decode_all(&self.export()[..]).unwrap()
    }

    pub(super) fn import(&self, archive: impl Read) -> Result<Listed, SnapshotError> {
        self.store.import(archive, named(Some("two")), &mut untold)
    }

    /// Imports what cannot be, and looks that nothing is left of it.
    pub(super) fn refused(&self, archive: impl Read) -> SnapshotError {
        let error = self.import(archive).unwrap_err();
        assert_eq!(self.names(), ["one"], "{error}");
        let left = files::entries(&self.path("")).unwrap();
        assert_eq!(left, [self.path("one")], "{error}");
        error
    }
}

#[test]
fn a_snapshot_arrives_under_another_name_with_every_byte_and_its_holes() {
    let place = with_snapshot(LARGE);
    let archive = place.export();
    assert!(archive.len() < 20_000, "{} bytes for {LARGE} with little in them", archive.len());
    let (mut last, mut total) = (0, 0);
    let imported = place.store.import(&archive[..], named(Some("two")), &mut |done, of| {
        assert!(done >= last && done <= of);
        (last, total) = (done, of);
        Ok(())
    });
    let imported = imported.unwrap();
    assert!(last > 0 && last == total);
    assert_eq!(place.names(), ["one", "two"]);
    let (one, two) = (place.store.open("one").unwrap().0, place.store.open("two").unwrap().0);
    assert_eq!(two, imported.manifest);
    let origin = Origin { namespace: "importers".into(), ..one.origin.clone() };
    let owner = Some(Tenant { namespace: "importers".into(), pod_namespace: None });
    assert_eq!(two, Manifest { name: "two".into(), origin, owner, ..one });
    let meta = fs::metadata(place.path("two/vm/memory-ranges")).unwrap();
    assert_eq!(meta.len(), LARGE);
    assert!(meta.blocks() * 512 < 1 << 20 && meta.mode() & 0o777 == 0o600, "{meta:?}");
    place.store.verify("two", &mut untold).unwrap();
    let mut read = 0;
    place
        .store
        .hold("two", &mut |done, _| {
            read = done;
            Ok(())
        })
        .map(drop)
        .unwrap();
    assert_eq!(read, 0, "an import has verified it");
    assert!(matches!(place.import(&archive[..]), Err(SnapshotError::Exists { .. })));
    assert!(matches!(
        place.store.import(&archive[..], named(None), &mut untold),
        Err(SnapshotError::Exists { .. })
    ));
}

#[test]
fn an_archive_without_compression_and_a_directory_can_be_imported_too() {
    let place = with_snapshot(SMALL);
    place.import(&place.tar()[..]).unwrap();
    let copy = place.dir.path().join("copy");
    place.store.copy_to("one", &copy, &mut untold).unwrap();
    let error = place.store.copy_to("one", &copy, &mut untold).unwrap_err();
    assert!(crate::errors::chain(&error).contains("not empty"), "{error:?}");
    place.store.import_dir(&copy, named(Some("three")), &mut untold).unwrap();
    place.store.verify("three", &mut untold).unwrap();
    File::options().write(true).open(copy.join("disks/image")).unwrap().write_all_at(b"x", 0).unwrap();
    let error = place.store.import_dir(&copy, named(Some("four")), &mut untold).unwrap_err();
    assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
    fs::remove_file(copy.join("disks/image")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", copy.join("disks/image")).unwrap();
    let error = place.store.import_dir(&copy, named(Some("four")), &mut untold).unwrap_err();
    assert!(matches!(error, SnapshotError::Foreign { .. }), "{error}");
    assert_eq!(place.names(), ["one", "three", "two"]);
}

/// Which did not say how much data a file has.
#[test]
fn an_archive_of_an_older_version_is_taken() {
    let place = with_snapshot(LARGE);
    let mut tar = place.tar();
    let mut known = 0;
    while let Some(at) = tar.windows(7).position(|window| window == br#""data":"#) {
        tar[at..at + 7].copy_from_slice(br#""date":"#);
        known += 1;
    }
    assert_eq!(known, 5);
    let imported = place.import(&tar[..]).unwrap();
    assert!(imported.manifest.files.iter().all(|file| file.data.is_none()));
    place.store.verify("two", &mut untold).unwrap();
}

#[test]
fn what_is_no_archive_is_said_to_be_none_and_not_quoted() {
    let place = with_snapshot(1 << 20);
    let text = "root:x:0:0:root:/root:/bin/bash\n".repeat(40);
    for other in [text.as_bytes(), b"short", &zstd::encode_all(text.as_bytes(), 0).unwrap()] {
        let error = chain(&place.refused(other));
        assert!(error.contains("no tar archive") && !error.contains("root"), "{error}");
    }
}

#[test]
fn an_archive_that_was_cut_or_damaged_leaves_nothing() {
    let place = with_snapshot(SMALL);
    let (archive, tar) = (place.export(), place.tar());
    // The zeros at the end of a tar archive are padding.
    let ends = (0..archive.len() - 1).step_by(397).map(|len| &archive[..len]);
    for cut in ends.chain((0..tar.len() - 1024).step_by(100_003).map(|len| &tar[..len])) {
        place.refused(cut);
    }
    for at in (0..archive.len()).step_by(211) {
        let mut damaged = archive.clone();
        damaged[at] ^= 0x10;
        place.refused(&damaged[..]);
    }
    for text in ["begin", "middle", "writable"] {
        let at = tar.windows(text.len()).rposition(|window| window == text.as_bytes()).unwrap();
        let mut damaged = tar.clone();
        damaged[at] ^= 1;
        let error = place.refused(&damaged[..]);
        assert!(matches!(error, SnapshotError::Damaged { .. }), "{text}: {error}");
    }
    place.refused(&b"not a tar archive"[..]);
    place.refused(&b""[..]);
    place.refused(io::repeat(7).take(1 << 20));
}

/// An archive with these entries: path, type, link and content.
pub(super) fn archive_of(entries: &[(&str, EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (path, kind, link, content) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        // Not set_path, which refuses what an enemy writes.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn an_archive_leads_to_no_file_but_those_of_its_snapshot() {
    let place = with_snapshot(SMALL);
    let text = |path: &str| {
        let mut forged = manifest("one");
        forged.files.push(FileDigest { path: path.into(), bytes: 4, data: None, sha256: "0".repeat(64) });
        serde_json::to_vec(&forged).unwrap()
    };
    use EntryType::{Directory, Fifo, Link, Regular, Symlink};
    for path in ["/etc/x", "../x", "vm/../../x", "vm/x/y", "vm/..", "vm", "x", "", "vm/a\0b", "verified.json"]
    {
        let error = place.refused(&archive_of(&[("manifest.json", Regular, "", &text(path))])[..]);
        assert!(matches!(error, SnapshotError::Foreign { .. }), "{path:?}: {error}");
    }
    let good = text("vm/x");
    for (path, kind, link) in [
        ("../x", Regular, ""),
        ("/vm/x", Regular, ""),
        ("vm/./x", Regular, ""),
        ("vm/y", Regular, ""),
        ("vm/x", Symlink, "/etc/passwd"),
        ("vm/x", Link, "/etc/passwd"),
        ("vm/x", Fifo, ""),
        ("vm/x", Directory, ""),
    ] {
        let content: &[u8] = if kind == Regular { b"text" } else { b"" };
        let archive = archive_of(&[("manifest.json", Regular, "", &good), (path, kind, link, content)]);
        let error = place.refused(&archive[..]);
        assert!(matches!(error, SnapshotError::Archive { .. }), "{path} {kind:?}: {error}");
    }
    // Nothing before the manifest, nothing of another length, nothing twice, nothing more.
    place.refused(&archive_of(&[("vm/x", Regular, "", b"text"), ("manifest.json", Regular, "", &good)])[..]);
    let longer = archive_of(&[("manifest.json", Regular, "", &good), ("vm/x", Regular, "", b"longer")]);
    assert!(matches!(place.refused(&longer[..]), SnapshotError::Archive { .. }));
    let whole = place.tar();
    let more = [&whole[..whole.len() - 1024], &archive_of(&[("vm/x", Regular, "", b"text")])].concat();
    assert!(matches!(place.refused(&more[..]), SnapshotError::Archive { .. }));
}

#[test]
fn headers_without_end_cost_no_memory() {
    let place = with_snapshot(SMALL);
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let endless = header.as_bytes().chain(io::repeat(b'x'));
    let error = crate::errors::chain(&place.refused(endless));
    assert!(error.contains("GNULongName"), "{error}");
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_path("manifest.json").unwrap();
    header.set_size(1 << 40);
    header.set_cksum();
    let error = place.refused(header.as_bytes().chain(io::repeat(b' '))).to_string();
    assert!(error.contains("manifest is too long"), "{error}");
}

/// An import onto a file system of 1 MiB that is mounted in a namespace of its own. `None` without the
/// privilege for that.
fn import_onto_a_small_disk(archive: Vec<u8>) -> Option<(SnapshotError, Vec<std::path::PathBuf>)> {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    let dir = tempfile::tempdir().unwrap();
    let import = move || {
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).ok()?;
        mount(Some("cube-test"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).ok()?;
        let store = Store::at(&dir.path().join("snapshots"));
        let error = store.import(&archive[..], named(None), &mut untold).unwrap_err();
        let left = files::entries(&dir.path().join("snapshots")).unwrap();
        // The directory can be removed when nothing is mounted there.
        nix::mount::umount(dir.path()).unwrap();
        Some((error, left))
    };
    // The namespace lives as long as its thread.
    std::thread::spawn(import).join().unwrap()
}

#[test]
fn a_disk_that_is_too_small_is_named_and_left_empty() {
    let place = place();
    let draft = place.store.begin("one").unwrap();
    fs::write(draft.vm_dir().join("memory-ranges"), vec![7; 4 << 20]).unwrap();
    draft.finish(manifest("one"), &[]).unwrap();
    let Some((error, left)) = import_onto_a_small_disk(place.export()) else {
        return eprintln!("skipped: a full disk needs CAP_SYS_ADMIN");
    };
    assert!(matches!(error, SnapshotError::Space { needed: 4_194_304, .. }), "{error}");
    assert!(left.is_empty(), "{left:?}");
    // One that does not say how much there is, in a sparse file that does not either.
    let mut tar = place.tar();
    let text = br#""data": 4194304"#;
    let at = tar.windows(text.len()).position(|window| window == text).unwrap();
    tar[at..at + text.len()].copy_from_slice(br#""date": 4194304"#);
    let (error, left) = import_onto_a_small_disk(tar).unwrap();
    assert!(matches!(error, SnapshotError::Space { .. }), "{error}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_reads_no_more_ends_an_export() {
    let place = with_snapshot(SMALL);
    struct Full;
    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let error = place.store.export("one", Full, &mut untold).unwrap_err();
    assert!(
        matches!(&error, SnapshotError::Output(e) if e.kind() == io::ErrorKind::StorageFull),
        "{error:?}"
    );
    place.store.remove("one").expect("nobody holds it");
}

mod attacks;
mod mutants;
