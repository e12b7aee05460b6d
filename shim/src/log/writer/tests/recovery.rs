//! Logs whose writer has died.

use super::*;

/// A log with two closed segments and a gap in the current one.
fn long_log() -> Log {
    let mut log = Log::create(LIMITS);
    log.writer.identify(Identity { timeline: 1, epoch: 9 }).unwrap();
    append_pattern(&mut log.writer, 130_000);
    let gap = log.writer.next_offset() + 50;
    log.writer.gap(gap).unwrap();
    append_pattern(&mut log.writer, 700);
    log
}

fn truncate(path: &Path, len: u64) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn a_writer_that_dies_between_or_inside_any_two_writes_leaves_an_exact_prefix() {
    let log = long_log();
    let whole = stream(&log.path());
    let current = segments(&log.path()).pop().unwrap();
    let closed = whole.len() - current.data.len();
    for lost in (0..=700).step_by(7) {
        let damaged = copy(&log.path());
        truncate(&damaged.path().join("stdout"), (current.data.len() - lost) as u64);
        let mut writer = recover(damaged.path());
        append_pattern(&mut writer, 3000);
        let offsets = stream(damaged.path());
        let kept = whole.len() - lost;
        assert_eq!(offsets[..kept], whole[..kept]);
        let next = if lost == 700 { whole[whole.len() - 700] } else { whole[kept - 1] + 1 };
        assert_eq!(offsets[kept..], (next..next + 3000).collect::<Vec<_>>());
        assert!(closed > 0);
    }
}

#[test]
fn a_torn_or_missing_index_record_costs_no_byte() {
    let mut log = Log::create(LIMITS);
    for _ in 0..20 {
        append_pattern(&mut log.writer, 1500);
    }
    let index = fs::metadata(log.path().join("stdout.idx")).unwrap().len();
    for len in HEADER_LEN as u64..index {
        let damaged = copy(&log.path());
        truncate(&damaged.path().join("stdout.idx"), len);
        let mut writer = recover(damaged.path());
        assert_eq!(writer.next_offset(), 30_000);
        append_pattern(&mut writer, 10);
        assert_eq!(stream(damaged.path()), (0..30_010).collect::<Vec<_>>());
    }
}

#[test]
fn a_damaged_record_ends_the_index_and_the_rest_is_indexed_anew() {
    let mut log = Log::create(LIMITS);
    for _ in 0..5 {
        append_pattern(&mut log.writer, 5000);
    }
    let index = fs::File::options().write(true).open(log.path().join("stdout.idx")).unwrap();
    index.write_all_at(&[0xff], (HEADER_LEN + RECORD_LEN + 9) as u64).unwrap();
    assert_eq!(recover(&log.path()).next_offset(), 25_000);
    let segment = segments(&log.path()).remove(0);
    assert_eq!(segment.records.len(), 2);
    assert_eq!(segment.records[1].file_offset, 4096);
}

#[test]
fn what_is_indexed_anew_is_not_older_than_what_precedes_it() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 5000);
    append_pattern(&mut log.writer, 5000);
    for records in 0..2 {
        truncate(&log.path().join("stdout.idx"), (HEADER_LEN + records * RECORD_LEN) as u64);
        // As a tick that is seldom, or a clock that was set, would have it.
        let data = fs::File::options().write(true).open(log.path().join("stdout")).unwrap();
        data.set_modified(UNIX_EPOCH).unwrap();
        recover(&log.path());
        let OnDisk { header, records, .. } = segments(&log.path()).remove(0);
        assert!(!records.is_empty() && records[0].time_ns >= header.created_ns, "{records:?}");
        assert!(records.is_sorted_by_key(|record| record.time_ns), "{records:?}");
    }
}

#[test]
fn a_segment_whose_header_is_torn_goes_on_where_the_one_before_ended() {
    let mut log = long_log();
    log.writer.identify(Identity { timeline: 2, epoch: 9 }).unwrap();
    let end = log.writer.next_offset();
    for len in 0..HEADER_LEN as u64 {
        let damaged = copy(&log.path());
        truncate(&damaged.path().join("stdout.idx"), len);
        fs::remove_file(damaged.path().join("stdout")).unwrap();
        assert_eq!(recover(damaged.path()).next_offset(), end);
        assert_eq!(segments(damaged.path()).last().unwrap().header.first_offset, end);
    }
}

#[test]
fn a_header_with_a_number_that_is_in_use_costs_no_closed_segment() {
    let log = long_log();
    let current = segments(&log.path()).pop().unwrap().header;
    let before = stream(&log.path()).len();
    let damaged = copy(&log.path());
    let wrong = SegmentHeader { number: current.number - 1, ..current };
    let index = fs::File::options().write(true).open(damaged.path().join("stdout.idx")).unwrap();
    index.write_all_at(&wrong.encode(), 0).unwrap();
    let mut writer = recover(damaged.path());
    // Another timeline closes the segment.
    writer.identify(Identity { timeline: current.timeline + 1, epoch: 9 }).unwrap();
    append_pattern(&mut writer, 100);
    assert_eq!(stream(damaged.path()).len(), before + 100 - dropped(&log.path()));
}

/// Bytes that go when another segment is begun.
fn dropped(path: &Path) -> usize {
    let all = segments(path);
    if all.len() < LIMITS.segments as usize { 0 } else { all[0].data.len() }
}

#[test]
fn a_rotation_cut_short_at_any_step_is_completed() {
    let log = long_log();
    let whole = stream(&log.path());
    let number = segments(&log.path()).last().unwrap().header.number;
    let closed = closed_name("stdout", number);
    for steps in 0..=4 {
        let damaged = copy(&log.path());
        let at = |name: &str| damaged.path().join(name);
        if steps >= 1 {
            fs::rename(at("stdout.idx"), at(&index_name(&closed))).unwrap();
        }
        if steps >= 2 {
            fs::rename(at("stdout"), at(&closed)).unwrap();
        }
        if steps >= 3 {
            let header = SegmentHeader {
                number: number + 1,
                first_offset: whole.last().unwrap() + 1,
                timeline: 1,
                epoch: 9,
                created_ns: 0,
            };
            fs::write(at("stdout.idx"), if steps == 3 { vec![] } else { header.encode().to_vec() }).unwrap();
        }
        let mut writer = recover(damaged.path());
        assert_eq!(writer.next_offset(), whole.last().unwrap() + 1, "after step {steps}");
        append_pattern(&mut writer, 10);
        assert_eq!(stream(damaged.path())[..whole.len()], whole, "after step {steps}");
        let last = segments(damaged.path()).pop().unwrap().header;
        assert_eq!(last.number, if steps == 0 { number } else { number + 1 });
    }
}

#[test]
fn a_rotation_cut_short_is_completed_once_however_many_indices_have_no_data() {
    let log = long_log();
    let end = log.writer.next_offset();
    let number = segments(&log.path()).last().unwrap().header.number;
    let damaged = copy(&log.path());
    let at = |number: u64| damaged.path().join(index_name(&closed_name("stdout", number)));
    fs::rename(damaged.path().join("stdout.idx"), at(number)).unwrap();
    fs::write(at(number - 1), fs::read(at(number)).unwrap()).unwrap();
    fs::remove_file(damaged.path().join(closed_name("stdout", number - 1))).unwrap();
    assert_eq!(recover(damaged.path()).next_offset(), end);
    assert!(damaged.path().join(closed_name("stdout", number)).exists() && !at(number - 1).exists());
}

#[test]
fn the_removal_of_a_segment_that_was_cut_short_is_completed() {
    let log = long_log();
    let oldest = segments(&log.path())[0].header.number;
    fs::remove_file(log.path().join(closed_name("stdout", oldest))).unwrap();
    let next = log.writer.next_offset();
    assert_eq!(recover(&log.path()).next_offset(), next);
    assert!(!log.path().join(index_name(&closed_name("stdout", oldest))).exists());
}

#[test]
fn a_full_segment_that_is_reopened_does_not_outgrow_its_size_and_cost_another() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 150_000);
    let left = LIMITS.segment_bytes - log.writer.current.as_ref().unwrap().size();
    append_pattern(&mut log.writer, left as usize - RECORD_LEN);
    let mut writer = recover(&log.path());
    assert_eq!(writer.current.as_ref().unwrap().size(), LIMITS.segment_bytes);
    writer.gap(writer.next_offset() + 1).unwrap();
    assert!(stream(&log.path()).len() >= 2 * 60_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_log_that_is_reopened_at_any_time_is_what_it_would_have_been_without(
        steps in prop::collection::vec((0u8..8, 1usize..40_000), 1..30),
    ) {
        let mut log = Log::create(LIMITS);
        let mut expected: Vec<u64> = Vec::new();
        for (kind, n) in steps {
            match kind {
                0 => log.writer.gap(log.writer.next_offset() + n as u64).unwrap(),
                1 => log.writer = recover(&log.path()),
                2 => crate::log::sync::sync(&log.path()).unwrap(),
                _ => {
                    let from = log.writer.next_offset();
                    append_pattern(&mut log.writer, n);
                    expected.extend(from..from + n as u64);
                }
            }
        }
        let offsets = stream(&log.path());
        prop_assert_eq!(&expected[expected.len() - offsets.len()..], &offsets[..]);
        prop_assert!(offsets.len() as u64 >= expected.len().min(2 * 60_000) as u64);
    }
}
