//! Logs of streams that go back.

use super::*;
use crate::log::reader::{
    Cursor, Dir, Segments, Stream,
    testing::{read_all, read_since},
};

const OLD: Identity = Identity { timeline: 1, epoch: 9 };
const NEW: Identity = Identity { timeline: 2, epoch: 9 };

/// A log with a closed segment, that ends at 70,000.
fn old_log() -> Log {
    let mut log = Log::create(LIMITS);
    log.writer.identify(OLD).unwrap();
    append_pattern(&mut log.writer, 70_000);
    log
}

fn headers(log: &Log) -> Vec<(u64, u64)> {
    segments(&log.path())
        .iter()
        .map(|segment| (segment.header.timeline, segment.header.first_offset))
        .collect()
}

fn shown(path: &Path) -> (Vec<u8>, u64) {
    let segments = Segments::open(&Dir::open(path).unwrap(), Stream::Stdout).unwrap();
    let start = segments.start();
    read_all(&mut Cursor::new(segments, start).unwrap())
}

#[test]
fn what_was_written_stays_and_what_follows_is_in_a_segment_of_its_timeline() {
    let mut log = old_log();
    let before = headers(&log).len();
    log.writer.rewind(50_000, NEW.timeline).unwrap();
    assert_eq!((log.writer.next_offset(), log.writer.safe_offset()), (50_000, Some(50_000)));
    log.writer.identify(NEW).unwrap();
    append_pattern(&mut log.writer, 1000);
    assert_eq!(headers(&log)[before..], [(2, 50_000)]);
    let expected: Vec<u64> = (0..70_000).chain(50_000..51_000).collect();
    assert_eq!(stream(&log.path()), expected);
    let bytes: Vec<u8> = [pattern(0, 70_000), pattern(50_000, 1000)].concat();
    assert_eq!(shown(&log.path()), (bytes, 0), "both, and nothing is said to be lost");
    assert_eq!(recover(&log.path()).next_offset(), 51_000);
}

#[test]
fn a_segment_without_a_byte_serves_the_next_timeline() {
    let mut log = old_log();
    log.writer.rewind(10, 2).unwrap();
    let number = segments(&log.path()).len();
    for timeline in 3..50 {
        log.writer.rewind(timeline * 5, timeline).unwrap();
        assert_eq!(recover(&log.path()).next_offset(), timeline * 5);
    }
    assert_eq!(headers(&log).last(), Some(&(49, 245)));
    assert_eq!(segments(&log.path()).len(), number);
}

#[test]
fn many_short_timelines_do_not_cost_what_was_written_before_them() {
    let mut log = old_log();
    let mut expected: Vec<u64> = (0..70_000).collect();
    for timeline in 2..12 {
        log.writer.rewind(100, timeline).unwrap();
        append_pattern(&mut log.writer, 10);
        expected.extend(100..110);
    }
    assert_eq!(stream(&log.path()), expected);
    // Neither do they when the log is recovered, and neither is it ever larger than its limit.
    log.writer = recover(&log.path());
    assert_eq!(stream(&log.path()), expected);
    for timeline in 12..200 {
        log.writer.rewind(100, timeline).unwrap();
        append_pattern(&mut log.writer, 3000);
        let size: u64 = fs::read_dir(log.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(size <= 3 * (64 << 10), "{size}");
    }
    let files = fs::read_dir(log.path()).unwrap().count();
    assert!(files <= 2 * (3 + SHORT_SEGMENTS), "{files}");
}

#[test]
fn a_reader_that_is_a_whole_log_behind_is_not_waited_for_and_loses_nothing() {
    let mut log = Log::create(LIMITS);
    log.writer.identify(OLD).unwrap();
    let retained = log.writer.retained();
    retained.hold(0);
    let bytes = pattern(0, 300_000);
    let slices = &mut [IoSlice::new(&bytes)];
    let mut rest = &mut slices[..];
    assert!(matches!(log.writer.append(&mut rest), Err(Stalled::Reader)));
    let end = log.writer.next_offset() as usize;
    log.writer.rewind(50_000, 2).unwrap();
    let mut read = vec![0; 1 << 20];
    let mut at = 0;
    while let Found::Bytes(n) = retained.read_at(at as u64, &mut read[at..]).unwrap() {
        at += n;
    }
    assert_eq!(read[..at], bytes[..end]);
    // Nor does the new timeline push out what it has not read: it waits when the log is full again.
    let slices = &mut [IoSlice::new(&bytes)];
    assert!(matches!(log.writer.append(&mut &mut slices[..]), Err(Stalled::Reader)));
    assert!(matches!(retained.read_at(0, &mut [0]).unwrap(), Found::Bytes(1)));
    retained.release();
    append_pattern(&mut log.writer, 1000);
}

#[test]
fn a_writer_that_dies_at_any_step_of_going_back_leaves_the_end_of_one_timeline_or_the_other() {
    let log = old_log();
    let number = segments(&log.path()).last().unwrap().header.number;
    for steps in 0..6 {
        let damaged = copy(&log.path());
        let at = |name: &str| damaged.path().join(name);
        let closed = closed_name("stdout", number);
        let header =
            SegmentHeader { number: number + 1, first_offset: 60_000, timeline: 2, epoch: 9, created_ns: 0 };
        let done: [&dyn Fn(); 5] = [
            &|| fs::rename(at("stdout.idx"), at(&index_name(&closed))).unwrap(),
            &|| fs::rename(at("stdout"), at(&closed)).unwrap(),
            &|| fs::write(at("stdout.idx"), b"").unwrap(),
            &|| fs::write(at("stdout.idx"), header.encode()).unwrap(),
            &|| fs::write(at("stdout"), b"").unwrap(),
        ];
        done.iter().take(steps).for_each(|step| step());
        let (bytes, lost) = shown(damaged.path());
        assert_eq!((bytes.len(), lost), (70_000, 0), "after step {steps}");
        let mut writer = recover(damaged.path());
        let (end, timeline) = if steps < 4 { (70_000, 1) } else { (60_000, 2) };
        assert_eq!((writer.next_offset(), writer.identity().timeline), (end, timeline), "after step {steps}");
        // What a successor does that is told of the rollback, or does it itself.
        writer.rewind(60_000, 2).unwrap();
        append_pattern(&mut writer, 10);
        assert_eq!(stream(damaged.path()), (0..70_000).chain(60_000..60_010).collect::<Vec<_>>());
    }
}

#[test]
fn a_gap_at_the_end_of_the_old_timeline_is_kept() {
    let mut log = old_log();
    log.writer.gap(70_500).unwrap();
    log.writer.rewind(60_000, 2).unwrap();
    append_pattern(&mut log.writer, 10);
    let old = &segments(&log.path())[1];
    assert_eq!(old.records.last().unwrap().stream_offset, 70_500);
    assert_eq!(shown(&log.path()).0.len(), 70_010);
}

#[test]
fn times_find_the_lines_of_the_old_timeline_and_of_the_new_one() {
    let mut log = Log::create(LIMITS);
    log.writer.identify(OLD).unwrap();
    let pause = || std::thread::sleep(std::time::Duration::from_millis(2));
    append(&mut log.writer, b"old\n");
    pause();
    append(&mut log.writer, b"last\n");
    pause();
    let between = now_ns();
    log.writer.rewind(0, 2).unwrap();
    append(&mut log.writer, b"new\n");
    pause();
    let after = now_ns();
    append(&mut log.writer, b"next\n");
    assert_eq!(read_since(&log.path(), 0), b"old\nlast\nnew\nnext\n");
    // What follows the last record of a segment may be later than that says.
    assert_eq!(read_since(&log.path(), between), b"last\nnew\nnext\n");
    assert_eq!(read_since(&log.path(), after), b"next\n");
}

#[test]
fn a_follower_sees_the_old_timeline_and_then_the_new_one() {
    let mut log = old_log();
    let dir = Dir::open(&log.path()).unwrap();
    let segments = Segments::open(&dir, Stream::Stdout).unwrap();
    let start = segments.start();
    let mut cursor = Cursor::new(segments, start).unwrap();
    let mut seen = Vec::new();
    let mut look = |cursor: &mut Cursor| {
        let (bytes, lost) = read_all(cursor);
        assert_eq!(lost, 0);
        seen.extend(bytes);
    };
    look(&mut cursor);
    append_pattern(&mut log.writer, 500);
    for timeline in 2..5 {
        log.writer.rewind(60_000, timeline).unwrap();
        append_pattern(&mut log.writer, 100);
        // It misses one, and sees both of them later.
        if timeline != 3 {
            cursor.refresh(&dir).unwrap();
            look(&mut cursor);
        }
    }
    let new = pattern(60_000, 100);
    assert_eq!(seen, [pattern(0, 70_500), new.clone(), new.clone(), new].concat());
}
