//! The contract: what was asked for, where it was asked for, and nothing else.

use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use tar::Builder;

use super::*;
use cube_shim::errors::chain;

/// An entry: path, kind, link, mode, content.
type Item<'a> = (&'a str, EntryType, &'a str, u32, &'a [u8]);

fn stream(items: &[Item<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (path, kind, link, mode, content) in items {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_uid(1234);
        header.set_gid(4321);
        header.set_mtime(86_400);
        // Not set_path, which refuses what an enemy writes.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.at("target")).unwrap();
        fs::write(place.at("outside"), "untouched").unwrap();
        place
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Unpacks a stream of `x` into the target.
    fn unpack(&self, from: impl Read) -> Result<(), CliError> {
        Unpack::new(&self.at("target"), "x").unwrap().all(from)
    }

    #[track_caller]
    fn refuses(&self, from: impl Read) -> String {
        let error = chain(&self.unpack(from).unwrap_err());
        assert_eq!(fs::read(self.at("outside")).unwrap(), b"untouched", "{error}");
        let mut left: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["outside", "target"], "{error}");
        error
    }
}

use EntryType::{Block, Char, Directory, Fifo, Link, Regular, Symlink};

#[test]
fn a_tree_arrives_with_modes_owners_times_and_links() {
    let place = Place::new();
    let tree = stream(&[
        ("./x/", Directory, "", 0o750, b""),
        ("./x/file", Regular, "", 0o640, b"text"),
        ("./x/link", Symlink, "/etc/passwd", 0o777, b""),
        ("./x/hard", Link, "./x/file", 0o640, b""),
        ("./x/tmp", Directory, "", 0o1777, b""),
    ]);
    for _ in 0..2 {
        // Again, over what is there.
        place.unpack(&tree[..]).unwrap();
        let meta = |path: &str| fs::symlink_metadata(place.at("target/x").join(path)).unwrap();
        let file = meta("file");
        assert_eq!((file.mode() & 0o7777, file.uid(), file.gid(), file.mtime()), (0o640, 1234, 4321, 86_400));
        assert_eq!((meta("").mode() & 0o7777, meta("tmp").mode() & 0o7777), (0o750, 0o1777));
        assert_eq!((meta("link").uid(), meta("hard").ino()), (1234, file.ino()));
        assert_eq!(fs::read_link(place.at("target/x/link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read(place.at("target/x/hard")).unwrap(), b"text");
    }
}

#[test]
fn it_is_called_as_it_was_asked_for() {
    let place = Place::new();
    let tree = stream(&[("./x", Regular, "", 0o644, b"text")]);
    Unpack::new(&place.at("new"), "x").unwrap().all(&tree[..]).unwrap();
    assert_eq!(fs::read(place.at("new")).unwrap(), b"text");
    // Over a link, that goes, and what it leads to stays.
    fs::remove_file(place.at("new")).unwrap();
    symlink(place.at("outside"), place.at("new")).unwrap();
    Unpack::new(&place.at("new"), "x").unwrap().all(&tree[..]).unwrap();
    assert_eq!(
        (fs::read(place.at("new")).unwrap(), fs::read(place.at("outside")).unwrap()),
        (b"text".into(), b"untouched".into())
    );
    let inside = stream(&[("./", Directory, "", 0o755, b""), ("./a", Regular, "", 0o644, b"a")]);
    for target in ["target", "made"] {
        Unpack::new(&place.at(target), ".").unwrap().all(&inside[..]).unwrap();
        assert_eq!(fs::read(place.at(target).join("a")).unwrap(), b"a");
    }
    assert!(Unpack::new(&place.at("no/such/dir"), "x").is_err());
}

#[test]
fn nothing_is_written_outside_of_the_target() {
    let evil = b"evil";
    let outside = "../outside";
    let attacks: &[&[Item<'_>]] = &[
        &[("../outside", Regular, "", 0o644, evil)],
        &[("x/../../outside", Regular, "", 0o644, evil)],
        &[("/x/../outside", Regular, "", 0o644, evil)],
        &[("y", Regular, "", 0o644, evil)],
        &[("x", Symlink, outside, 0o777, b""), ("x/y", Regular, "", 0o644, evil)],
        &[("x", Symlink, "..", 0o777, b""), ("x/outside", Regular, "", 0o644, evil)],
        &[
            ("x", Directory, "", 0o755, b""),
            ("x/up", Symlink, "../..", 0o777, b""),
            ("x/up/outside", Regular, "", 0o644, evil),
        ],
        &[
            ("x", Directory, "", 0o755, b""),
            ("x/up", Symlink, "../..", 0o777, b""),
            ("x/up/new", Directory, "", 0o755, b""),
        ],
        &[("x", Link, "../outside", 0o644, b"")],
        &[("x", Link, "/etc/passwd", 0o644, b"")],
        &[("x", Directory, "", 0o755, b""), ("x/y", Link, "x/../../outside", 0o644, b"")],
        &[
            ("x", Directory, "", 0o755, b""),
            ("x/up", Symlink, "../..", 0o777, b""),
            ("x/y", Link, "x/up/outside", 0o644, b""),
        ],
        // A file in the way of a directory, and the other way round.
        &[("x", Regular, "", 0o644, evil), ("x/y", Regular, "", 0o644, evil)],
        &[("x", Directory, "", 0o755, b""), ("x", Regular, "", 0o644, evil)],
    ];
    for attack in attacks {
        Place::new().refuses(&stream(attack)[..]);
    }
    // A link is not written through, whether the stream has made it or somebody else: it is replaced.
    let place = Place::new();
    let link = place.at("outside").display().to_string();
    let through = stream(&[("x", Symlink, &link, 0o777, b""), ("x", Regular, "", 0o644, evil)]);
    place.unpack(&through[..]).unwrap();
    assert_eq!(fs::read(place.at("outside")).unwrap(), b"untouched");
    assert_eq!(fs::read(place.at("target/x")).unwrap(), evil);
    // Nor is a directory that is a link entered, nor a mode set through it.
    let place = Place::new();
    symlink("..", place.at("target/x")).unwrap();
    place.refuses(&stream(&[("x", Directory, "", 0o777, b"")])[..]);
    place.refuses(&stream(&[("x/outside", Regular, "", 0o644, evil)])[..]);
}

#[test]
fn what_would_be_dangerous_on_the_host_is_left_out() {
    let place = Place::new();
    let tree = stream(&[
        ("x", Directory, "", 0o755, b""),
        ("x/null", Char, "", 0o666, b""),
        ("x/disk", Block, "", 0o666, b""),
        ("x/fifo", Fifo, "", 0o666, b""),
        ("x/sh", Regular, "", 0o6755, b"#!/bin/sh"),
    ]);
    let error = place.unpack(&tree[..]).unwrap_err();
    assert!(matches!(error, CliError::LeftOut(3)), "{error}");
    let left: Vec<_> = fs::read_dir(place.at("target/x")).unwrap().map(Result::unwrap).collect();
    assert_eq!(left.iter().map(|entry| entry.file_name()).collect::<Vec<_>>(), ["sh"]);
    assert!(!left[0].file_type().unwrap().is_fifo());
    assert_eq!(fs::metadata(place.at("target/x/sh")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn a_stream_without_end_is_not_kept_in_memory() {
    let place = Place::new();
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(1 << 40);
        header.set_cksum();
        let error = place.refuses(header.as_bytes().chain(io::repeat(b'x')));
        assert!(error.contains("headers without end"), "{kind:?}: {error}");
    }
    let whole = stream(&[("x", Regular, "", 0o644, &[7; 100_000])]);
    place.refuses(&whole[..60_000]);
    place.refuses(&b"not a tar stream\n".repeat(100)[..]);
    let error = place.refuses(&stream(&[("\x1b[2J", Regular, "", 0o644, b"")])[..]);
    assert!(!error.contains('\x1b'), "{error}");
}
