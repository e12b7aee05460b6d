//! Archives that cost more than they are: each is refused for what it says, before that is paid.

use std::cell::Cell;

use tar::GnuExtSparseHeader;

use super::*;

/// Bytes of a zero that is a digest by its form.
fn some_digest() -> String {
    "0".repeat(64)
}

/// The manifest of a snapshot with one file, `vm/x`.
fn manifest_of(bytes: u64, data: Option<u64>) -> Manifest {
    let file = FileDigest { path: "vm/x".into(), bytes, data, sha256: some_digest() };
    Manifest { files: vec![file], ..manifest("one") }
}

/// An archive of the manifest and what follows it.
fn with_manifest(manifest: &Manifest, rest: &[u8]) -> Vec<u8> {
    let text = serde_json::to_vec(manifest).unwrap();
    let begin = archive_of(&[("manifest.json", EntryType::Regular, "", &text)]);
    [&begin[..begin.len() - 1024], rest].concat()
}

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_path("vm/x").unwrap();
    header.set_size(size);
    header.set_cksum();
    header
}

/// The headers of a sparse file with these pieces of data, of this length.
fn sparse(bytes: u64, pieces: &[(u64, u64)]) -> Vec<u8> {
    let mut header = header(EntryType::GNUSparse, pieces.iter().map(|(_, len)| len).sum());
    let gnu = header.as_gnu_mut().unwrap();
    let (first, more) = pieces.split_at(pieces.len().min(4));
    for (place, (at, len)) in gnu.sparse.iter_mut().zip(first) {
        place.set_offset(*at);
        place.set_length(*len);
    }
    gnu.set_is_extended(!more.is_empty());
    gnu.set_real_size(bytes);
    header.set_cksum();
    let mut headers = header.as_bytes().to_vec();
    let mut parts = more.chunks(21).peekable();
    while let Some(part) = parts.next() {
        let mut more = GnuExtSparseHeader::new();
        for (place, (at, len)) in more.sparse_mut().iter_mut().zip(part) {
            place.set_offset(*at);
            place.set_length(*len);
        }
        more.set_is_extended(parts.peek().is_some());
        headers.extend_from_slice(more.as_bytes());
    }
    headers
}

/// What is read of an archive.
struct Seen<R>(R, Cell<u64>);

impl<R: Read> Read for &mut Seen<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        self.1.set(self.1.get() + read as u64);
        Ok(read)
    }
}

impl Place {
    /// Imports what cannot be, and gives how much of it was read, and was done in the words of the import.
    #[track_caller]
    fn refused_after(&self, archive: impl Read, import: Import<'_>) -> (SnapshotError, u64, u64) {
        let (mut seen, mut worked) = (Seen(archive, Cell::default()), 0);
        let told = &mut |done, _| {
            worked = done;
            Ok(())
        };
        let error = self.store.import(&mut seen, import, told).unwrap_err();
        assert_eq!(self.names(), ["one"], "{error}");
        assert_eq!(files::entries(&self.path("")).unwrap(), [self.path("one")], "{error}");
        (error, seen.1.get(), worked)
    }
}

#[test]
fn a_bomb_is_refused_after_a_small_part_of_it() {
    let place = with_snapshot(SMALL);
    let bytes = 4 << 30;
    for data in [Some(bytes), None] {
        let begin = with_manifest(&manifest_of(bytes, data), header(EntryType::Regular, bytes).as_bytes());
        // 200 KB for 4 GiB that are not zeros.
        let bomb = zstd::stream::read::Encoder::new(begin.chain(io::repeat(b'x').take(bytes)), 3).unwrap();
        let (error, _, worked) = place.refused_after(bomb, named(Some("two")));
        assert!(chain(&error).contains("packed more than 1000 times"), "{error}");
        assert!(worked <= 70 << 20, "{worked} bytes were written before it was refused");
    }
}

#[test]
fn what_is_larger_than_the_limit_is_refused_before_a_byte_of_it() {
    let place = with_snapshot(SMALL);
    let (import, size) = (Import { limit: 1 << 20, ..named(Some("two")) }, (1 << 20) + 1);
    // By the manifest, by the header of a plain file, by the map of a sparse one.
    let plain = header(EntryType::Regular, size);
    let scattered: Vec<_> = (0..17).map(|n| (n << 17, 512)).collect();
    for (manifest, rest) in [
        (manifest_of(size, Some(size)), plain.as_bytes().to_vec()),
        (manifest_of(size, None), plain.as_bytes().to_vec()),
        (manifest_of((16 << 17) + 512, None), sparse((16 << 17) + 512, &scattered)),
        (manifest_of((16 << 17) + 512, Some(512)), sparse((16 << 17) + 512, &scattered)),
    ] {
        let archive = with_manifest(&manifest, &rest);
        let (error, read, worked) = place.refused_after(archive.chain(io::repeat(1)), import);
        assert!(matches!(error, SnapshotError::Limit { limit: 1_048_576, .. }), "{error}");
        assert_eq!(worked, 0);
        assert!(read < 100_000, "{read}");
    }
    let all: Vec<_> = (0..16).map(|n| (n << 17, 512)).collect();
    let rest = [sparse((15 << 17) + 512, &all), vec![1; 16 * 512], vec![0; 1024]].concat();
    let archive = with_manifest(&manifest_of((15 << 17) + 512, None), &rest);
    let (error, ..) = place.refused_after(&archive[..], import);
    assert!(
        matches!(error, SnapshotError::Damaged { .. }),
        "what is as large as the limit is taken: {error}"
    );
}

#[test]
fn data_that_the_manifest_does_not_have_is_not_written() {
    let place = with_snapshot(SMALL);
    let size = 8 << 20;
    let begin = with_manifest(&manifest_of(size, Some(65_536)), header(EntryType::Regular, size).as_bytes());
    let (error, _, worked) =
        place.refused_after(begin.chain(io::repeat(b'x').take(size)), named(Some("two")));
    assert!(chain(&error).contains("more data than its manifest says"), "{error}");
    assert_eq!(worked, 65_536);
}

#[test]
fn a_hole_costs_nothing_however_long_it_is() {
    let place = with_snapshot(SMALL);
    let bytes = 8 << 40;
    // At 5 GB/s it takes half an hour to look at so many zeros.
    let rest = [sparse(bytes, &[(bytes - 512, 512)]), vec![7; 512], vec![0; 1024]].concat();
    let (error, _, worked) =
        place.refused_after(&with_manifest(&manifest_of(bytes, None), &rest)[..], named(Some("two")));
    assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
    assert!(worked <= 65_536, "{worked}");
    // Longer than any file of a sandbox.
    let huge = with_manifest(&manifest_of(1 << 60, None), &sparse(1 << 60, &[(1 << 60, 0)]));
    let (error, ..) = place.refused_after(&huge[..], named(Some("two")));
    assert!(matches!(error, SnapshotError::Limit { .. }), "{error}");
}

#[test]
fn the_map_of_a_sparse_file_is_in_order_and_has_an_end() {
    let place = with_snapshot(SMALL);
    let bytes = 1 << 20;
    let wrong: &[&[(u64, u64)]] = &[
        // Overlapping, in disorder, twice the same, beyond the end, before the end, beyond all ends, uneven,
        // and what follows the piece that says where the end is.
        &[(0, 1024), (512, bytes - 512)],
        &[(4096, 512), (0, 512), (bytes, 0)],
        &[(512, 512), (512, 512), (bytes, 0)],
        &[(0, 512), (bytes, 512)],
        &[(0, 512), (bytes - 512, 0)],
        &[(u64::MAX - 1024, 512), (bytes, 0)],
        &[(512, 100), (1024, 512), (bytes, 0)],
        &[(0, 0), (0, 0), (0, 512), (bytes, 0)],
        &[(512, 0), (512, 0), (512, 0), (512, 0), (512, 0), (512, 0)],
    ];
    for pieces in wrong {
        let archive = with_manifest(&manifest_of(bytes, None), &sparse(bytes, pieces));
        let (error, ..) = place.refused_after(archive.chain(io::repeat(1).take(1 << 20)), named(Some("two")));
        assert!(matches!(error, SnapshotError::Archive { .. }), "{pieces:?}: {error}");
    }
    // Headers without end, of which each says that another one follows.
    let mut begin = sparse(bytes, &[(0, 512); 5]);
    begin.truncate(512);
    let mut more = GnuExtSparseHeader::new();
    more.set_is_extended(true);
    let endless = std::iter::repeat_n(more.as_bytes(), 1 << 14).flatten().copied().collect::<Vec<u8>>();
    let mut first = Header::new_gnu();
    first.as_mut_bytes().copy_from_slice(&begin);
    for piece in &mut first.as_gnu_mut().unwrap().sparse {
        *piece = tar::GnuSparseHeader { offset: [0; 12], numbytes: [0; 12] };
    }
    first.set_cksum();
    let archive = with_manifest(&manifest_of(bytes, None), &[&first.as_bytes()[..], &endless].concat());
    let (error, read, _) = place.refused_after(&archive[..], named(Some("two")));
    assert!(matches!(error, SnapshotError::Archive { .. }), "{error}");
    assert!(read < 100_000, "{read}");
}

#[test]
fn nothing_of_tar_but_files_is_read() {
    let place = with_snapshot(SMALL);
    for kind in [
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::XHeader,
        EntryType::XGlobalHeader,
        EntryType::Char,
        EntryType::Block,
        EntryType::Continuous,
    ] {
        let archive = with_manifest(&manifest_of(4, None), header(kind, 1 << 40).as_bytes());
        let (error, read, _) = place.refused_after(archive.chain(io::repeat(b'x')), named(Some("two")));
        assert!(matches!(error, SnapshotError::Archive { .. }), "{kind:?}: {error}");
        assert!(read < 100_000, "{kind:?}: {read}");
    }
}

#[test]
fn nothing_follows_the_end_but_padding() {
    let place = with_snapshot(SMALL);
    let whole = place.tar();
    let padded = [&whole[..], &[0; 20 << 10]].concat();
    place.import(&padded[..]).unwrap();
    place.store.remove("two").unwrap();
    place.refused(&[&padded[..], b"x"].concat()[..]);
    let (error, read, _) = place.refused_after(whole.chain(io::repeat(0)), named(Some("two")));
    assert!(matches!(error, SnapshotError::Archive { .. }), "{error}");
    assert!(read < 4 << 20, "{read}");
    // Without its end it is not whole, whatever it has.
    place.refused(&whole[..whole.len() - 1024]);
}

#[test]
fn a_manifest_costs_no_more_than_it_is_long() {
    let place = with_snapshot(SMALL);
    let file = |n: usize| FileDigest { path: format!("vm/{n}"), bytes: 0, data: None, sha256: some_digest() };
    let disk = |n: usize| DiskFile { serial: n.to_string(), read_only: true, file: format!("disks/{n}") };
    let container = |n: usize| Container {
        id: n.to_string(),
        pid: 1,
        terminal: false,
        execs: Vec::new(),
        spec: serde_json::json!({}),
    };
    for many in [
        Manifest { files: (0..65).map(file).collect(), ..manifest("one") },
        Manifest { disks: (0..65).map(disk).collect(), ..manifest("one") },
        Manifest { containers: (0..65).map(container).collect(), ..manifest("one") },
    ] {
        let (error, ..) = place.refused_after(&with_manifest(&many, &[])[..], named(Some("two")));
        assert!(matches!(error, SnapshotError::Many { found: 65, max: 64, .. }), "{error}");
    }
    // In the store, too, where an older version may have put it.
    let path = place.path("one/manifest.json");
    let many = Manifest { files: (0..20_000).map(file).collect(), ..manifest("one") };
    fs::write(&path, serde_json::to_vec(&many).unwrap()).unwrap();
    assert!(matches!(place.store.open("one"), Err(SnapshotError::Many { found: 20_000, .. })));
}

#[test]
fn what_an_archive_says_of_its_namespace_its_name_and_its_specs_is_not_believed() {
    let place = with_snapshot(SMALL);
    let named_by_archive = Manifest { name: "\x1b[2J".repeat(100_000), ..manifest("one") };
    let (error, ..) = place.refused_after(&with_manifest(&named_by_archive, &[])[..], named(None));
    assert!(matches!(&error, SnapshotError::Archive { what } if what.len() < 200), "{error}");
    for (spec, field) in [
        (serde_json::json!([1]), "the whole"),
        (serde_json::json!("text"), "the whole"),
        (serde_json::json!(null), "the whole"),
        (serde_json::json!({"annotations": "text"}), "annotations"),
        (serde_json::json!({"annotations": []}), "annotations"),
        (serde_json::json!({"process": 7}), "process"),
    ] {
        let container = Container {
            id: "\x1b[2J".into(),
            pid: 1,
            terminal: false,
            execs: Vec::new(),
            spec: spec.clone(),
        };
        let manifest = Manifest { containers: vec![container], ..manifest("one") };
        let (error, ..) = place.refused_after(&with_manifest(&manifest, &[])[..], named(Some("two")));
        assert!(matches!(&error, SnapshotError::Spec { field: f, .. } if *f == field), "{spec}: {error}");
        assert!(!chain(&error).contains('\x1b'), "{error}");
    }
    let digest = Manifest {
        files: vec![FileDigest { sha256: "\x1b".repeat(64), ..manifest_of(0, None).files[0].clone() }],
        ..manifest("one")
    };
    let (error, ..) = place.refused_after(&with_manifest(&digest, &[])[..], named(Some("two")));
    assert!(matches!(error, SnapshotError::NoDigest { .. }), "{error}");
}

#[test]
fn a_window_of_any_size_is_not_kept_in_memory() {
    let place = with_snapshot(SMALL);
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    encoder.window_log(27).unwrap();
    io::Write::write_all(&mut encoder, &place.tar()).unwrap();
    let error = chain(&place.refused(&encoder.finish().unwrap()[..]));
    assert!(error.contains("too much memory"), "{error}");
}

#[test]
fn an_import_that_is_ended_leaves_nothing() {
    let place = with_snapshot(SMALL);
    let mut copied = 0;
    let copy = place.dir.path().join("copy");
    place.store.copy_to("one", &copy, &mut untold).unwrap();
    let archive = place.export();
    let ended = |_, _| Err(io::Error::other("ended"));
    for (what, error) in [
        ("archive", place.store.import(&archive[..], named(Some("two")), &mut { ended })),
        ("directory", place.store.import_dir(&copy, named(Some("two")), &mut { ended })),
    ] {
        let error = chain(&error.unwrap_err());
        assert!(error.contains("ended"), "{what}: {error}");
        assert_eq!(files::entries(&place.path("")).unwrap(), [place.path("one")], "{what}");
        copied += 1;
    }
    assert_eq!(copied, 2);
}

#[test]
fn a_directory_that_is_to_be_imported_is_checked_first_too() {
    let place = with_snapshot(SMALL);
    let copy = place.dir.path().join("copy");
    place.store.copy_to("one", &copy, &mut untold).unwrap();
    let small = Import { limit: 4096, ..named(Some("two")) };
    let error =
        place.store.import_dir(&copy, small, &mut |_, _| panic!("nothing was to be done")).unwrap_err();
    assert!(matches!(error, SnapshotError::Limit { .. }), "{error}");
    fs::remove_file(copy.join("manifest.json")).unwrap();
    nix::unistd::mkfifo(&copy.join("manifest.json"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = place.store.import_dir(&copy, named(Some("two")), &mut untold).unwrap_err();
    assert!(matches!(error, SnapshotError::Archive { .. }), "{error}");
}
