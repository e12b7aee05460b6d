use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::log::reader::{
    Cursor,
    testing::{TestLog, bytes_read, read_all},
};

fn tail_of(log: &TestLog, lines: u64) -> (Vec<u8>, u64) {
    let segments = log.segments();
    let tail = tail(&segments, segments.start(), lines).unwrap();
    (read_all(&mut Cursor::new(segments, tail.start).unwrap()).0, tail.lines)
}

fn log_of(bytes: &[u8]) -> TestLog {
    let mut log = TestLog::new();
    log.write(1, bytes);
    log
}

#[test]
fn the_last_lines_are_given_with_or_without_a_final_newline() {
    for (contents, lines, expected, count) in [
        (&b""[..], 3, &b""[..], 0),
        (b"a", 3, b"a", 1),
        (b"a\n", 1, b"a\n", 1),
        (b"a\nb\nc\n", 2, b"b\nc\n", 2),
        (b"a\nb\nc", 2, b"b\nc", 2),
        (b"a\nb\nc\n", 0, b"", 0),
        (b"a\nb\nc\n", 99, b"a\nb\nc\n", 3),
        (b"\n", 1, b"\n", 1),
        (b"\n\n\n", 2, b"\n\n", 2),
        (b"a\n\n", 1, b"\n", 1),
    ] {
        assert_eq!(tail_of(&log_of(contents), lines), (expected.to_vec(), count), "{contents:?} {lines}");
    }
}

#[test]
fn the_tail_begins_no_earlier_than_asked() {
    let mut log = log_of(b"a\nb\n");
    log.rotate();
    log.write(1, b"c\nd\n");
    let segments = log.segments();
    for (segment, offset, lines) in [(0, 2, 3), (1, 0, 2), (1, 2, 1), (1, 4, 0)] {
        let from = Position { segment, offset };
        assert_eq!(tail(&segments, from, 99).unwrap(), Tail { start: from, lines });
    }
}

#[test]
fn a_line_may_span_segments_and_segments_may_be_empty() {
    let mut log = TestLog::new();
    log.write(1, b"first\nsec");
    log.rotate();
    log.rotate();
    log.write(1, b"ond\nthird\n");
    log.rotate();
    assert_eq!(tail_of(&log, 2).0, b"second\nthird\n");
    assert_eq!(tail_of(&log, 1).0, b"third\n");
}

#[test]
fn binary_zeros_and_invalid_utf8_come_out_as_they_are() {
    let bytes = b"\0\0\n\xff\xfe\n\0\xc3\x28\0\n";
    assert_eq!(tail_of(&log_of(bytes), 2).0, b"\xff\xfe\n\0\xc3\x28\0\n");
}

#[test]
fn a_million_empty_lines_are_a_million_lines() {
    let log = log_of(&vec![b'\n'; 1_000_000]);
    let (bytes, lines) = tail_of(&log, 999_999);
    assert_eq!((bytes.len(), lines), (999_999, 999_999));
}

#[test]
fn a_huge_line_without_a_newline_is_found_whole() {
    let log = log_of(b"before\n");
    let data = File::options().write(true).open(log.path("stdout")).unwrap();
    data.set_len(7 + (256 << 20)).unwrap();
    let segments = log.segments();
    let tail = tail(&segments, segments.start(), 1).unwrap();
    assert_eq!((tail.start.offset, tail.lines), (7, 1));
}

#[test]
fn the_tail_of_a_huge_log_reads_one_block() {
    let mut log = log_of(b"");
    let data = File::options().write(true).open(log.path("stdout")).unwrap();
    data.set_len(4 << 30).unwrap();
    log.rotate();
    let lines: String = (0..10_000).map(|n| format!("line {n}\n")).collect();
    log.write(1, lines.as_bytes());
    let segments = log.segments();
    let before = bytes_read();
    let tail = tail(&segments, segments.start(), 10).unwrap();
    let read = bytes_read() - before;
    assert_eq!(tail.lines, 10);
    // The reading of the counter itself is the rest.
    assert!(read < BLOCK + 4096, "{read} bytes were read");
}

proptest! {
    #[test]
    fn the_tail_is_what_splitting_the_whole_gives(
        pieces in prop::collection::vec("[ab\n]{0,40}", 0..8), lines in 0usize..30,
    ) {
        let mut log = TestLog::new();
        for piece in &pieces {
            log.write(1, piece.as_bytes());
            log.rotate();
        }
        let whole = pieces.concat();
        let all: Vec<&str> = whole.split_inclusive('\n').collect();
        let expected = &all[all.len().saturating_sub(lines)..];
        let (bytes, count) = tail_of(&log, lines as u64);
        prop_assert_eq!(bytes, expected.concat().into_bytes());
        prop_assert_eq!(count, expected.len() as u64);
    }
}
