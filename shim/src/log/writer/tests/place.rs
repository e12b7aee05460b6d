//! Logs whose files somebody takes away, cuts or replaces.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::log::{
    reader::{Cursor, Dir, Position, Segments, Stream},
    retained::Usage,
};

/// What a reader that comes now gets, and what it is told is lost.
fn read(path: &Path) -> (Vec<u8>, u64) {
    let segments = Segments::open(&Dir::open(path).unwrap(), Stream::Stdout).unwrap();
    rest(&mut Cursor::new(segments, Position::default()).unwrap())
}

fn rest(cursor: &mut Cursor) -> (Vec<u8>, u64) {
    let (mut all, mut lost) = (Vec::new(), 0);
    loop {
        let block = cursor.fill().unwrap();
        let len = block.len();
        all.extend_from_slice(block);
        lost += cursor.take_lost();
        if len == 0 {
            return (all, lost);
        }
        cursor.consume(len);
    }
}

/// What a FIFO is given from `position` on, and what it misses.
fn feed(writer: &LogWriter, mut position: u64) -> (Vec<u8>, u64) {
    let (mut all, mut missed) = (Vec::new(), 0);
    let mut block = vec![0; 10_000];
    loop {
        match writer.retained.read_at(position, &mut block).unwrap() {
            Found::Bytes(n) => {
                all.extend_from_slice(&block[..n]);
                position += n as u64;
            }
            Found::Dropped(to) => {
                missed += to - position;
                position = to;
            }
            Found::End => return (all, missed),
        }
    }
}

fn lost(writer: &LogWriter) -> u64 {
    let Usage { lost, .. } = writer.retained.usage();
    lost
}

fn assert_is(got: &[u8], from: u64, to: u64) {
    assert_eq!(got.len() as u64, to - from);
    assert!(got == pattern(from, got.len()), "other bytes");
}

#[test]
fn a_directory_that_is_removed_is_made_again_for_the_next_byte_and_readers_hear_what_is_lost() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 10_000);
    for n in 1..4 {
        fs::remove_dir_all(log.path()).unwrap();
        append_pattern(&mut log.writer, 10_000);
        let (bytes, told) = read(&log.path());
        assert_is(&bytes, n * 10_000, (n + 1) * 10_000);
        assert_eq!((told, lost(&log.writer)), (10_000, n * 10_000));
    }
    assert_eq!(fs::metadata(log.path()).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(log.path().join("stdout")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(recover(&log.path()).next_offset(), 40_000);
    append_pattern(&mut log.writer, 300_000);
    assert_eq!(log.writer.next_offset(), 340_000);
    assert_eq!(stream(&log.path()).last(), Some(&339_999), "it rotates as ever");
}

#[test]
fn an_attached_reader_gets_from_the_open_files_what_was_removed() {
    let mut log = Log::create(LIMITS);
    log.writer.retained().hold(0);
    append_pattern(&mut log.writer, 100_000);
    fs::remove_dir_all(log.root.path().join("id")).unwrap();
    append_pattern(&mut log.writer, 10_000);
    let (bytes, missed) = feed(&log.writer, 0);
    assert_is(&bytes, 0, 110_000);
    assert_eq!(missed, 0);
    log.writer.retained().release();
}

#[test]
fn removed_files_take_no_space_once_no_reader_needs_them() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 100_000);
    fs::remove_dir_all(log.path()).unwrap();
    append_pattern(&mut log.writer, 10);
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|fd| fs::read_link(fd.path()));
    let removed = links
        .flatten()
        .filter(|link| link.starts_with(log.root.path()) && link.to_string_lossy().ends_with("(deleted)"));
    assert!(removed.count() <= 1, "the last one says where the log ends");
}

#[test]
fn a_log_that_lost_its_directory_before_its_first_byte_has_lost_nothing() {
    let mut log = Log::create(LIMITS);
    fs::remove_dir_all(log.path()).unwrap();
    append_pattern(&mut log.writer, 10);
    assert_eq!(read(&log.path()), (pattern(0, 10), 0));
}

#[test]
fn an_empty_directory_in_the_place_of_the_one_that_was_renamed_is_taken() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 1000);
    fs::rename(log.path(), log.root.path().join("moved")).unwrap();
    fs::create_dir(log.path()).unwrap();
    log.writer.look_now();
    append_pattern(&mut log.writer, 1000);
    assert_eq!(read(&log.path()), (pattern(1000, 1000), 1000));
    assert_eq!(read(&log.root.path().join("moved")), (pattern(0, 1000), 0));
}

#[test]
fn a_log_that_was_set_aside_for_another_container_leaves_that_one_alone() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 1000);
    let new = LogDir::create(&log.path()).unwrap();
    let mut other = LogWriter::create(Arc::new(new), "stdout", LIMITS, 0).unwrap();
    append(&mut other, b"another");
    log.writer.look_now();
    append_pattern(&mut log.writer, 1000);
    assert_eq!(read(&log.path()), (b"another".to_vec(), 0));
    let aside = fs::read_dir(log.root.path()).unwrap().map(|e| e.unwrap().path()).find(|p| *p != log.path());
    let aside = aside.unwrap();
    assert_eq!(read(&aside), (pattern(0, 2000), 0));
    // Now it has nowhere to be.
    fs::remove_dir_all(aside).unwrap();
    let stalled = log.writer.append(&mut &mut [IoSlice::new(b"x")][..]).unwrap_err();
    assert!(stalled.is_misplaced(), "{stalled:?}");
    assert_eq!(read(&log.path()), (b"another".to_vec(), 0));
}

#[test]
fn a_file_that_is_truncated_keeps_what_is_left_and_no_offset_lies() {
    for left in [0, 1, 4096, 6000, 9999] {
        let mut log = Log::create(LIMITS);
        append_pattern(&mut log.writer, 5000);
        append_pattern(&mut log.writer, 5000);
        fs::File::options().write(true).open(log.path().join("stdout")).unwrap().set_len(left).unwrap();
        append_pattern(&mut log.writer, 5000);
        let (bytes, told) = read(&log.path());
        let expected = [pattern(0, left as usize), pattern(10_000, 5000)].concat();
        assert!(bytes == expected, "{left} left");
        assert_eq!((told, lost(&log.writer)), (10_000 - left, 10_000 - left));
        let offsets: Vec<u64> = (0..left).chain(10_000..15_000).collect();
        assert_eq!(stream(&log.path()), offsets);
        let (fed, missed) = feed(&log.writer, 0);
        assert!(fed == expected, "a FIFO gets what is left");
        assert_eq!(missed, 10_000 - left);
        assert_eq!(recover(&log.path()).next_offset(), 15_000);
    }
}

#[test]
fn what_somebody_has_appended_is_not_taken_for_the_streams() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 100);
    let mut file = fs::File::options().append(true).open(log.path().join("stdout")).unwrap();
    io::Write::write_all(&mut file, &[b'x'; 1000]).unwrap();
    append_pattern(&mut log.writer, 100);
    assert_eq!(recover(&log.path()).next_offset(), 200);
    assert_eq!(stream(&log.path()).len(), 200);
}

#[test]
fn a_file_that_logrotate_has_renamed_costs_nothing() {
    // Its number is that of the segment, or another.
    for (before, name) in [(10, "stdout.1"), (60_000, "stdout.7"), (10, "stdout-20260131")] {
        let mut log = Log::create(LIMITS);
        append_pattern(&mut log.writer, before);
        append_pattern(&mut log.writer, 10_000);
        let rotated = log.path().join(name);
        fs::rename(log.path().join("stdout"), &rotated).unwrap();
        // As with "create" in its configuration.
        fs::write(log.path().join("stdout"), "").unwrap();
        log.writer.look_now();
        append_pattern(&mut log.writer, 100);
        assert_eq!(fs::read(log.path().join("stdout")).unwrap(), pattern(before as u64 + 10_000, 100));
        let (bytes, told) = read(&log.path());
        if name.starts_with("stdout.") {
            assert!(bytes == pattern(0, before + 10_100), "{name}");
            assert_eq!((told, lost(&log.writer)), (0, 0), "{name}");
        } else {
            assert_eq!((bytes, told), (pattern(before as u64 + 10_000, 100), before as u64 + 10_000));
        }
        assert_eq!(recover(&log.path()).next_offset(), before as u64 + 10_100);
    }
}

#[test]
fn a_file_that_somebody_has_put_in_its_place_is_kept() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 1000);
    for name in ["stdout", "stdout.idx"] {
        fs::remove_file(log.path().join(name)).unwrap();
        fs::write(log.path().join(name), "precious").unwrap();
    }
    append_pattern(&mut log.writer, 1000);
    assert_eq!(read(&log.path()), (pattern(1000, 1000), 1000));
    let found = fs::read_dir(log.path()).unwrap().map(|entry| entry.unwrap().path());
    let kept = found.filter(|path| fs::read(path).unwrap() == b"precious");
    assert_eq!(kept.count(), 2);
}

#[test]
fn an_index_that_is_removed_costs_times_and_no_byte() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 1000);
    fs::remove_file(log.path().join("stdout.idx")).unwrap();
    log.writer.look_now();
    append_pattern(&mut log.writer, 1000);
    assert_eq!(read(&log.path()), (pattern(0, 2000), 0));
    assert_eq!((recover(&log.path()).next_offset(), lost(&log.writer)), (2000, 0));
}

#[test]
fn a_link_in_the_place_of_directory_or_file_is_refused_and_nothing_behind_it_changes() {
    for name in ["", "stdout", "stdout.idx"] {
        let mut log = Log::create(LIMITS);
        append_pattern(&mut log.writer, 1000);
        let victim = log.root.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::write(victim.join("stdout"), "kept").unwrap();
        fs::remove_dir_all(log.path()).unwrap();
        if name.is_empty() {
            symlink(&victim, log.path()).unwrap();
        } else {
            fs::create_dir(log.path()).unwrap();
            symlink(victim.join("stdout"), log.path().join(name)).unwrap();
        }
        for _ in 0..3 {
            let bytes = pattern(1000, 10);
            let stalled = log.writer.append(&mut &mut [IoSlice::new(&bytes)][..]).unwrap_err();
            assert!(stalled.is_misplaced(), "{name}: {stalled:?}");
        }
        assert_eq!(fs::read(victim.join("stdout")).unwrap(), b"kept");
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 1);
        fs::remove_file(log.path().join(name).components().collect::<PathBuf>()).unwrap();
        append_pattern(&mut log.writer, 1000);
        assert_eq!(read(&log.path()), (pattern(1000, 1000), 1000), "{name}");
    }
}

/// A log in memory, for a file is in the place of its directory.
fn in_memory() -> Log {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 1000);
    fs::rename(log.path(), log.root.path().join("away")).unwrap();
    fs::write(log.path(), "in the way").unwrap();
    log.writer.look_now();
    assert!(log.writer.append(&mut &mut [IoSlice::new(b"x")][..]).unwrap_err().is_misplaced());
    log.writer.go_to_memory().unwrap();
    log
}

#[test]
fn a_log_without_a_place_goes_on_in_memory_and_comes_back() {
    let mut log = in_memory();
    append_pattern(&mut log.writer, 2_000_000);
    log.writer.gap(2_001_500).unwrap();
    assert_eq!(log.writer.safe_offset(), Some(2_001_500));
    log.writer.look_now();
    append_pattern(&mut log.writer, 500);
    assert!(log.writer.is_in_memory() && fs::read(log.path()).unwrap() == b"in the way");
    fs::remove_file(log.path()).unwrap();
    log.writer.look_now();
    append_pattern(&mut log.writer, 500);
    assert!(!log.writer.is_in_memory());
    // What the guest has dropped is not the log's loss.
    assert_eq!((read(&log.path()), lost(&log.writer)), ((pattern(2_002_000, 500), 2_001_500), 2_001_500));
    assert_eq!(recover(&log.path()).next_offset(), 2_002_500);
    assert_eq!(log.writer.retained.end(), 2_002_000);
}

#[test]
fn what_is_still_in_the_directory_stays_when_a_log_comes_back_from_memory() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 60_000);
    // rename(2) does not put a file in the place of a directory.
    let obstacle = log.path().join("stdout.1.idx");
    fs::create_dir(&obstacle).unwrap();
    let bytes = pattern(60_000, 60_000);
    let mut slices = [IoSlice::new(&bytes)];
    let mut rest = &mut slices[..];
    assert!(log.writer.append(&mut rest).unwrap_err().is_misplaced());
    let (on_disk, _) = read_unless(&log.path(), &obstacle);
    log.writer.go_to_memory().unwrap();
    log.writer.append(&mut rest).unwrap();
    fs::remove_dir(&obstacle).unwrap();
    log.writer.look_now();
    append_pattern(&mut log.writer, 100);
    let (bytes, told) = read(&log.path());
    assert!(bytes == [on_disk.clone(), pattern(120_000, 100)].concat());
    assert_eq!((told, lost(&log.writer)), (120_000 - on_disk.len() as u64, told));
    assert_eq!(recover(&log.path()).next_offset(), 120_100);
}

/// [`read`], without what is in the way.
fn read_unless(path: &Path, obstacle: &Path) -> (Vec<u8>, u64) {
    fs::remove_dir(obstacle).unwrap();
    let found = read(path);
    fs::create_dir(obstacle).unwrap();
    found
}

#[test]
fn an_attached_reader_gets_every_byte_of_a_log_in_memory_and_holds_it_up() {
    let mut log = in_memory();
    let retained = log.writer.retained();
    let (mut position, mut got) = (0u64, Vec::new());
    retained.hold(position);
    let bytes = pattern(1000, 3_000_000);
    let mut slices = [IoSlice::new(&bytes)];
    let mut rest = &mut slices[..];
    while let Err(stalled) = log.writer.append(&mut rest) {
        assert!(matches!(stalled, Stalled::Reader), "{stalled:?}");
        let (more, missed) = feed(&log.writer, position);
        assert!(missed == 0 && !more.is_empty() && more.len() < 600_000, "{missed} of {}", more.len());
        position += more.len() as u64;
        got.extend(more);
        retained.hold(position);
    }
    got.extend(feed(&log.writer, position).0);
    assert_is(&got, 0, 3_001_000);
}

#[test]
fn a_log_in_memory_goes_back_with_its_sandbox() {
    let mut log = in_memory();
    log.writer.identify(Identity { timeline: 1, epoch: 9 }).unwrap();
    append_pattern(&mut log.writer, 500);
    log.writer.rewind(700, 2).unwrap();
    append_pattern(&mut log.writer, 100);
    fs::remove_file(log.path()).unwrap();
    log.writer.look_now();
    append_pattern(&mut log.writer, 100);
    let header = segments(&log.path())[0].header;
    assert_eq!((header.timeline, header.epoch), (2, 9));
    assert_eq!((recover(&log.path()).next_offset(), read(&log.path()).0), (900, pattern(800, 100)));
}

/// Reads on from stream offset `at`, to which it adds what is read and what is said to be lost; `last` is the
/// last byte read. That each byte is the one at its offset can be told if every loss was.
fn follow(
    cursor: &mut Cursor,
    at: &mut u64,
    last: &mut Option<u8>,
    indexed: bool,
) -> Result<(), TestCaseError> {
    loop {
        let block = cursor.fill().unwrap().to_vec();
        *at += cursor.take_lost();
        prop_assert!(!indexed || block == pattern(*at, block.len()), "other bytes at {}", at);
        *at += block.len() as u64;
        *last = block.last().copied().or(*last);
        if block.is_empty() {
            return Ok(());
        }
        cursor.consume(block.len());
    }
}

proptest! {
    #[test]
    fn a_reader_that_follows_gets_or_misses_each_byte_once_whatever_somebody_does(
        steps in prop::collection::vec((0u8..9, 0usize..30_000, any::<bool>()), 1..40),
    ) {
        let mut log = Log::create(LIMITS);
        let path = log.path();
        let open = |path: &Path| Dir::open(path).unwrap();
        let mut cursor =
            Cursor::new(Segments::open(&open(&path), Stream::Stdout).unwrap(), Position::default()).unwrap();
        let (mut last, mut at, mut indexed) = (None, 0, true);
        for (n, (what, len, looks)) in steps.into_iter().enumerate() {
            let elsewhere = log.root.path().join(format!("elsewhere-{n}"));
            let (data, index) = (path.join("stdout"), path.join("stdout.idx"));
            match what {
                0 => fs::remove_dir_all(&path).unwrap(),
                1 => fs::rename(&path, elsewhere).unwrap(),
                2 => drop(fs::remove_file(data)),
                3 => {
                    // It is what says how much is lost.
                    indexed = false;
                    drop(fs::remove_file(index));
                }
                4 => drop(fs::rename(data, elsewhere)),
                5 => {
                    if let Ok(file) = fs::File::options().write(true).open(data) {
                        let have = file.metadata().unwrap().len();
                        file.set_len(have.min(len as u64)).unwrap();
                    }
                }
                _ => {}
            }
            log.writer.look_now();
            append_pattern(&mut log.writer, len.max(1));
            if looks {
                cursor.refresh(&open(&path)).unwrap();
                follow(&mut cursor, &mut at, &mut last, indexed)?;
            }
        }
        cursor.refresh(&open(&path)).unwrap();
        follow(&mut cursor, &mut at, &mut last, indexed)?;
        let end = log.writer.next_offset();
        prop_assert!(at == end || (at < end && !indexed), "{} of {}", at, end);
        prop_assert_eq!(last, pattern(end - 1, 1).pop());
        prop_assert_eq!(recover(&path).next_offset(), end);
    }
}
