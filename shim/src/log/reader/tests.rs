use std::{fs, os::unix::fs::FileExt, os::unix::fs::symlink};

use proptest::prelude::*;

use super::{
    testing::{TestLog, read_all},
    *,
};
use crate::log::format::{HEADER_LEN, RECORD_LEN, Record, RecordKind};

fn cursor(log: &TestLog) -> Cursor {
    let segments = log.segments();
    let start = segments.start();
    Cursor::new(segments, start).unwrap()
}

fn contents(log: &TestLog) -> Vec<u8> {
    read_all(&mut cursor(log)).0
}

#[test]
fn segments_are_read_in_the_order_of_their_numbers() {
    let mut log = TestLog::new();
    let mut expected = Vec::new();
    for n in 0..12u64 {
        let line = format!("line {n}\n");
        log.write(n, line.as_bytes());
        expected.extend_from_slice(line.as_bytes());
        log.rotate();
    }
    assert_eq!(contents(&log), expected);
}

#[test]
fn a_record_that_goes_back_costs_no_byte() {
    let mut log = TestLog::new();
    log.append(b"0123456789");
    let record = |kind, file_offset| Record { kind, stream_offset: 0, file_offset, time_ns: 0 };
    let records = [record(RecordKind::Write, 8), record(RecordKind::Gap, 4), record(RecordKind::Gap, 9)];
    let index = fs::File::options().append(true).open(log.path("stdout.idx")).unwrap();
    for (n, record) in records.iter().enumerate() {
        index.write_all_at(&record.encode(), (HEADER_LEN + n * RECORD_LEN) as u64).unwrap();
    }
    assert_eq!(contents(&log), b"0123456789");
}

#[test]
fn files_that_only_look_like_segments_are_not_read() {
    let mut log = TestLog::new();
    log.write(1, b"mine\n");
    for name in ["stdout.x", "stdout.01", "stdout.-1", "stdout.old.1", "stdoutx"] {
        fs::write(log.path(name), "not mine\n").unwrap();
    }
    assert_eq!(contents(&log), b"mine\n");
}

#[test]
fn a_stream_without_files_is_empty() {
    let log = TestLog::new();
    let segments = Segments::open(&log.dir(), Stream::Stderr).unwrap();
    assert_eq!(segments.start(), segments.end());
    assert_eq!(read_all(&mut Cursor::new(segments, Position::default()).unwrap()), (vec![], 0));
}

#[test]
fn a_link_in_place_of_a_segment_or_an_index_is_refused() {
    for name in ["stdout", "stdout.3", "stdout.idx"] {
        let log = TestLog::new();
        let _ = fs::remove_file(log.path(name));
        symlink("/etc/passwd", log.path(name)).unwrap();
        let error = Segments::open(&log.dir(), Stream::Stdout).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(matches!(error, ReadError::Link { .. }), "{error}");
    }
}

#[test]
fn lost_bytes_are_counted_where_they_are_missing() {
    let mut log = TestLog::new();
    log.write(1, b"before");
    log.gap(2, 1000);
    log.write(3, b"after");
    let mut cursor = cursor(&log);
    assert_eq!(cursor.fill().unwrap(), b"before");
    assert_eq!(cursor.take_lost(), 0);
    cursor.consume(6);
    assert_eq!(cursor.fill().unwrap(), b"after");
    assert_eq!(cursor.take_lost(), 1000);
    assert_eq!(cursor.take_lost(), 0, "a loss is reported once");
}

#[test]
fn a_gap_at_the_very_end_or_at_a_rotation_is_counted_once() {
    let mut log = TestLog::new();
    log.write(1, b"one");
    log.gap(2, 10);
    log.rotate();
    log.gap(3, 20);
    log.write(4, b"two");
    log.gap(5, 40);
    assert_eq!(read_all(&mut cursor(&log)), (b"onetwo".to_vec(), 70));
}

#[test]
fn segments_that_are_missing_in_between_are_counted_as_lost() {
    let mut log = TestLog::new();
    for _ in 0..3 {
        log.write(1, b"0123456789");
        log.rotate();
    }
    log.write(1, b"end");
    log.remove_segment(2);
    assert_eq!(read_all(&mut cursor(&log)), (b"01234567890123456789end".to_vec(), 10));
}

#[test]
fn each_byte_has_the_time_of_the_write_that_it_came_with() {
    let mut log = TestLog::new();
    log.write(100, b"ab");
    log.write(200, b"c");
    log.append(b"d");
    let mut cursor = cursor(&log);
    let mut times = Vec::new();
    while !cursor.fill().unwrap().is_empty() {
        times.push(cursor.time_ns().unwrap());
        cursor.consume(1);
    }
    assert_eq!(times, [Some(100), Some(100), Some(200), Some(200)]);
}

#[test]
fn a_missing_index_costs_times_and_no_bytes() {
    let mut log = TestLog::without_index();
    log.write(1, b"a\nb\n");
    let mut cursor = cursor(&log);
    assert!(!cursor.has_times());
    cursor.fill().unwrap();
    assert_eq!(cursor.time_ns().unwrap(), None);
    assert_eq!(contents(&log), b"a\nb\n");
}

#[test]
fn a_damaged_index_ends_where_the_damage_is_and_costs_no_bytes() {
    let mut log = TestLog::new();
    for n in 0..100 {
        log.write(n, b"0123456789\n");
    }
    let index = fs::File::options().write(true).open(log.path("stdout.idx")).unwrap();
    index.write_all_at(b"damage", (HEADER_LEN + 50 * RECORD_LEN + 9) as u64).unwrap();
    let mut cursor = cursor(&log);
    let mut last = 0;
    while !cursor.fill().unwrap().is_empty() {
        last = cursor.time_ns().unwrap().unwrap();
        cursor.skip_line().unwrap();
    }
    assert_eq!(last, 49);
    assert_eq!(contents(&log).len(), 1100);
}

#[test]
fn a_torn_record_and_an_index_of_another_segment_cost_no_bytes() {
    let mut log = TestLog::new();
    log.write(7, b"one\n");
    let mut index = fs::read(log.path("stdout.idx")).unwrap();
    index.extend_from_slice(&[1, 0, 0]);
    fs::write(log.path("stdout.idx"), &index).unwrap();
    assert_eq!(contents(&log), b"one\n");
    fs::write(log.path("stdout.9"), "nine\n").unwrap();
    fs::write(log.path("stdout.9.idx"), &index).unwrap();
    assert_eq!(contents(&log), b"nine\none\n");
}

#[test]
fn what_is_written_later_is_found_by_a_refresh_across_any_number_of_rotations() {
    let mut log = TestLog::new();
    log.write(1, b"a");
    let dir = log.dir();
    let mut cursor = cursor(&log);
    assert_eq!(read_all(&mut cursor).0, b"a");
    log.write(2, b"b");
    cursor.refresh(&dir).unwrap();
    assert_eq!(read_all(&mut cursor).0, b"b");
    log.write(3, b"c");
    log.rotate();
    log.write(4, b"d");
    log.rotate();
    log.write(5, b"e");
    cursor.refresh(&dir).unwrap();
    assert_eq!(read_all(&mut cursor), (b"cde".to_vec(), 0));
    log.rotate();
    log.rotate();
    cursor.refresh(&dir).unwrap();
    assert_eq!(read_all(&mut cursor), (vec![], 0));
    log.write(6, b"f");
    cursor.refresh(&dir).unwrap();
    assert_eq!(read_all(&mut cursor), (b"f".to_vec(), 0));
}

#[test]
fn a_reader_that_follows_holds_nothing_open_that_it_has_read() {
    let mut log = TestLog::new();
    let dir = log.dir();
    let mut cursor = cursor(&log);
    let open = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|fd| fs::read_link(fd.path()));
        links.filter(|link| link.as_ref().is_ok_and(|link| link.starts_with(dir.path()))).count()
    };
    let at_first = open();
    for n in 1..50 {
        log.write(n, b"line\n");
        log.rotate();
        cursor.refresh(&dir).unwrap();
        assert_eq!(read_all(&mut cursor), (b"line\n".to_vec(), 0));
        log.remove_segment(n);
        cursor.refresh(&dir).unwrap();
        assert!(open() <= at_first + 2, "{} files open, {at_first} at first", open());
    }
}

#[test]
fn a_rotation_that_is_half_done_hides_no_bytes() {
    let mut log = TestLog::new();
    log.write(1, b"a\n");
    log.rotate();
    log.write(2, b"b\n");
    let dir = log.dir();
    let mut cursor = cursor(&log);
    assert_eq!(read_all(&mut cursor).0, b"a\nb\n");
    log.append(b"c\n");
    fs::rename(log.path("stdout"), log.path("stdout.2")).unwrap();
    cursor.refresh(&dir).unwrap();
    assert_eq!(read_all(&mut cursor), (b"c\n".to_vec(), 0));
    assert_eq!(contents(&log), b"a\nb\nc\n");
    fs::rename(log.path("stdout.idx"), log.path("stdout.2.idx")).unwrap();
    fs::write(log.path("stdout"), "d\n").unwrap();
    cursor.refresh(&dir).unwrap();
    assert_eq!(read_all(&mut cursor).0, b"d\n");
}

#[test]
fn an_index_that_is_made_after_its_data_file_is_found() {
    let mut log = TestLog::new();
    let index = fs::read(log.path("stdout.idx")).unwrap();
    fs::remove_file(log.path("stdout.idx")).unwrap();
    let mut cursor = cursor(&log);
    fs::write(log.path("stdout.idx"), index).unwrap();
    log.append(b"x");
    cursor.refresh(&log.dir()).unwrap();
    assert!(cursor.has_times());
}

proptest! {
    #[test]
    fn a_reader_that_follows_sees_each_byte_once_whatever_the_writer_does(
        steps in prop::collection::vec((0u8..4, 0usize..600), 1..60),
        refresh_every in 1usize..5,
    ) {
        let mut log = TestLog::new();
        let dir = log.dir();
        let mut cursor = cursor(&log);
        let (mut written, mut read, mut gaps, mut lost) = (Vec::new(), Vec::new(), 0, 0);
        for (n, (what, len)) in steps.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..len).map(|i| (n * 7 + i) as u8).collect();
            match what {
                0 => log.rotate(),
                1 => { log.gap(n as u64, len as u64); gaps += len as u64 }
                2 => { log.append(&bytes); written.extend_from_slice(&bytes) }
                _ => { log.write(n as u64, &bytes); written.extend_from_slice(&bytes) }
            }
            if n % refresh_every == 0 {
                cursor.refresh(&dir).unwrap();
                let (more, gone) = read_all(&mut cursor);
                read.extend(more);
                lost += gone;
            }
        }
        cursor.refresh(&dir).unwrap();
        let (more, gone) = read_all(&mut cursor);
        read.extend(more);
        prop_assert!(read == written);
        prop_assert_eq!(lost + gone, gaps);
    }
}
