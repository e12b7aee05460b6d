use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::log::retained::Found;

const LIMITS: Limits = Limits { segment_bytes: 64 << 10, segments: 3 };

struct Log {
    root: TempDir,
    writer: LogWriter,
}

impl Log {
    fn create(limits: Limits) -> Log {
        let root = tempfile::tempdir().unwrap();
        let dir = LogDir::create(&root.path().join("id")).unwrap();
        let writer = LogWriter::create(Arc::new(dir), "stdout", limits, 0).unwrap();
        Log { root, writer }
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("id")
    }
}

fn append(writer: &mut LogWriter, bytes: &[u8]) {
    writer.append(&mut &mut [IoSlice::new(bytes)][..]).unwrap();
}

fn pattern(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Appends the bytes that belong at the writer's offset.
fn append_pattern(writer: &mut LogWriter, len: usize) {
    let bytes = pattern(writer.next_offset(), len);
    append(writer, &bytes);
}

fn recover(path: &Path) -> LogWriter {
    LogWriter::recover(Arc::new(LogDir::open(path).unwrap()), "stdout", LIMITS).unwrap()
}

struct OnDisk {
    header: SegmentHeader,
    records: Vec<Record>,
    data: Vec<u8>,
}

impl OnDisk {
    fn read(path: &Path) -> OnDisk {
        let index = fs::read(index_name(path.to_str().unwrap())).unwrap();
        let header = SegmentHeader::decode(index[..HEADER_LEN].try_into().unwrap()).unwrap();
        let records = index[HEADER_LEN..]
            .chunks_exact(RECORD_LEN)
            .map(|bytes| Record::decode(bytes.try_into().unwrap()).unwrap())
            .collect();
        OnDisk { header, records, data: fs::read(path).unwrap() }
    }

    /// Stream offset of every byte, by the index alone.
    fn offsets(&self) -> Vec<u64> {
        let mut records = self.records.iter().peekable();
        let mut next = self.header.first_offset;
        let mut offsets = Vec::new();
        for at in 0..self.data.len() as u64 {
            while let Some(record) = records.next_if(|record| record.file_offset <= at) {
                assert_eq!(record.file_offset, at, "every record stands for a place that exists");
                next = record.stream_offset;
            }
            offsets.push(next);
            next += 1;
        }
        offsets
    }

    fn check(&self) {
        for (offset, byte) in self.offsets().into_iter().zip(&self.data) {
            assert_eq!(pattern(offset, 1), [*byte], "at offset {offset}");
        }
    }
}

/// Segments in order, each byte checked against its offset.
fn segments(path: &Path) -> Vec<OnDisk> {
    let mut numbers: Vec<u64> = fs::read_dir(path)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_prefix("stdout.")?.parse().ok())
        .collect();
    numbers.sort();
    let names = numbers.iter().map(|n| closed_name("stdout", *n)).chain(["stdout".to_owned()]);
    let all: Vec<_> = names.map(|name| OnDisk::read(&path.join(name))).collect();
    all.iter().for_each(OnDisk::check);
    for (number, segment) in numbers.iter().zip(&all) {
        assert_eq!(*number, segment.header.number);
    }
    all
}

fn stream(path: &Path) -> Vec<u64> {
    segments(path).iter().flat_map(OnDisk::offsets).collect()
}

#[test]
fn rotation_keeps_the_newest_segments_within_their_size_index_included() {
    let mut log = Log::create(LIMITS);
    for n in 0..4000 {
        append_pattern(&mut log.writer, n % 300 + 1);
    }
    let end = log.writer.next_offset();
    let kept = segments(&log.path());
    assert_eq!(kept.len(), 3);
    for entry in fs::read_dir(log.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.ends_with(".idx") {
            let size = |name: &str| fs::metadata(log.path().join(name)).unwrap().len();
            assert!(size(&name) + size(&index_name(&name)) <= LIMITS.segment_bytes, "{name}");
        }
    }
    let offsets = stream(&log.path());
    assert_eq!(offsets, (end - offsets.len() as u64..end).collect::<Vec<_>>());
    assert!(offsets.len() > 100_000);
}

#[test]
fn the_index_has_a_record_for_each_4_kib_or_millisecond_and_not_for_each_write() {
    let mut log = Log::create(Limits { segment_bytes: 1 << 20, segments: 2 });
    for _ in 0..1000 {
        append_pattern(&mut log.writer, 100);
    }
    let records = segments(&log.path()).remove(0).records;
    for pair in records.windows(2) {
        let bytes = pair[1].file_offset - pair[0].file_offset;
        let time = pair[1].time_ns.abs_diff(pair[0].time_ns);
        assert!(bytes >= 4096 || time >= 1_000_000, "{bytes} bytes and {time} ns after the one before");
        assert!(bytes <= 4096 + 100, "{bytes} bytes without a record");
    }
    assert!(records.len() >= 100_000 / 4196);
}

#[test]
fn an_attached_reader_holds_the_oldest_segment_and_one_that_went_away_does_not() {
    let mut log = Log::create(LIMITS);
    let retained = log.writer.retained();
    retained.hold(0);
    let bytes = pattern(0, 1 << 20);
    let mut slices = [IoSlice::new(&bytes)];
    let mut rest = &mut slices[..];
    assert!(matches!(log.writer.append(&mut rest), Err(Stalled::Reader)));
    let stuck = log.writer.next_offset();
    assert!(stuck > 2 * 60_000 && stuck < 3 * LIMITS.segment_bytes);
    assert_eq!(retained.read_at(0, &mut [0; 10]).unwrap(), Found::Bytes(10));

    let first_end = segments(&log.path())[0].data.len() as u64;
    retained.hold(first_end);
    assert!(matches!(log.writer.append(&mut rest), Err(Stalled::Reader)));
    assert!(log.writer.next_offset() > stuck, "a reader that moved on frees what it has read");
    assert_eq!(retained.read_at(0, &mut [0; 10]).unwrap(), Found::Dropped(first_end));

    retained.release();
    log.writer.append(&mut rest).unwrap();
    assert_eq!(log.writer.next_offset(), 1 << 20);
    assert_eq!(retained.end(), 1 << 20);
}

#[test]
fn a_gap_is_in_the_index_before_the_data_after_it() {
    let mut log = Log::create(LIMITS);
    append_pattern(&mut log.writer, 10);
    log.writer.gap(1000).unwrap();
    assert_eq!(recover(&log.path()).next_offset(), 1000);
    append_pattern(&mut log.writer, 5);
    assert_eq!(stream(&log.path()), (0..10).chain(1000..1005).collect::<Vec<_>>());
}

#[test]
fn gaps_alone_cannot_make_a_segment_grow() {
    let mut log = Log::create(LIMITS);
    for offset in 1..10_000 {
        log.writer.gap(offset).unwrap();
    }
    let size: u64 = fs::read_dir(log.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(size <= LIMITS.segment_bytes * 3);
}

#[test]
fn another_timeline_begins_a_segment_and_the_first_one_fills_in_the_empty_one() {
    let mut log = Log::create(LIMITS);
    log.writer.identify(Identity { timeline: 1, epoch: 9 }).unwrap();
    append_pattern(&mut log.writer, 10);
    log.writer.identify(Identity { timeline: 1, epoch: 9 }).unwrap();
    append_pattern(&mut log.writer, 10);
    log.writer.identify(Identity { timeline: 2, epoch: 0 }).unwrap();
    append_pattern(&mut log.writer, 10);
    let headers: Vec<_> = segments(&log.path()).iter().map(|s| s.header).collect();
    let told: Vec<_> = headers.iter().map(|h| (h.number, h.first_offset, h.timeline, h.epoch)).collect();
    assert_eq!(told, [(1, 0, 1, 9), (2, 20, 2, 9)]);
    assert_eq!(recover(&log.path()).identity(), Identity { timeline: 2, epoch: 9 });
}

/// A log with two closed segments and a gap in the current one, and a copy of it to damage.
fn copy(of: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(of).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

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
fn a_link_planted_where_the_next_segment_goes_is_not_followed() {
    let mut log = Log::create(LIMITS);
    let outside = log.root.path().join("outside");
    fs::write(&outside, "kept").unwrap();
    append_pattern(&mut log.writer, 60_000);
    // The rename of the rotation replaces what is in its way, so the link must come right after.
    let number = log.writer.current.take().unwrap().header.number;
    let closed = closed_name("stdout", number);
    fs::rename(log.path().join("stdout.idx"), log.path().join(index_name(&closed))).unwrap();
    fs::rename(log.path().join("stdout"), log.path().join(&closed)).unwrap();
    symlink(&outside, log.path().join("stdout")).unwrap();
    let mut slices = [IoSlice::new(b"secret")];
    let stalled = log.writer.append(&mut &mut slices[..]).unwrap_err();
    assert!(
        matches!(&stalled, Stalled::Disk(e) if e.source.raw_os_error() == Some(libc::ELOOP)),
        "{stalled}"
    );
    assert_eq!(fs::read(&outside).unwrap(), b"kept");
    fs::remove_file(log.path().join("stdout")).unwrap();
    append_pattern(&mut log.writer, 10);
    assert_eq!(stream(&log.path()).len(), 60_010);
}

/// A log on a file system of `bytes` bytes that is mounted in a namespace of its own. `None` without
/// the privilege for that.
fn small_disk(bytes: usize) -> Option<(LogDir, TempDir)> {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    let point = tempfile::tempdir().unwrap();
    let path = point.path().to_owned();
    // The mount lives as long as a descriptor in it, the namespace as long as this thread.
    let dir = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).ok()?;
        let size = format!("size={bytes}");
        mount(Some("cube-test"), &path, Some("tmpfs"), MsFlags::empty(), Some(&*size)).ok()?;
        let fd = fs::File::open(&path).unwrap();
        Some(LogDir::from_fd(fd.into(), &path))
    });
    let dir = dir.join().unwrap();
    if dir.is_none() {
        eprintln!("skipped: a full disk needs CAP_SYS_ADMIN");
    }
    Some((dir?, point))
}

#[test]
fn on_a_full_disk_old_segments_go_first_then_the_writer_waits_and_nothing_is_doubled() {
    let Some((dir, _point)) = small_disk(400 << 10) else { return };
    let dir = Arc::new(dir);
    let limits = Limits { segment_bytes: 64 << 10, segments: 100 };
    let mut writer = LogWriter::create(dir.clone(), "stdout", limits, 0).unwrap();
    for _ in 0..100 {
        append_pattern(&mut writer, 10_000);
    }
    assert_eq!(writer.next_offset(), 1_000_000);
    assert!(writer.retained().count() < 10, "the oldest segments made room");

    // Someone else takes the disk, and a reader holds what could be dropped.
    writer.retained().hold(0);
    let mut hog = dir.create_file("hog").unwrap();
    while io::Write::write(&mut hog, &[0; 4096]).is_ok() {}
    let bytes = pattern(writer.next_offset(), 50_000);
    let mut slices = [IoSlice::new(&bytes)];
    let mut rest = &mut slices[..];
    for _ in 0..3 {
        let stalled = writer.append(&mut rest).unwrap_err();
        assert!(matches!(&stalled, Stalled::Disk(e) if e.source.raw_os_error() == Some(libc::ENOSPC)));
        assert!(writer.next_offset() < 1_050_000);
    }
    dir.remove("hog").unwrap();
    drop(hog);
    writer.retained().release();
    writer.append(&mut rest).unwrap();
    assert_eq!(writer.next_offset(), 1_050_000);

    let retained = writer.retained();
    let Found::Dropped(mut at) = retained.read_at(0, &mut []).unwrap() else { panic!("nothing was dropped") };
    let mut buffer = vec![0; 1 << 16];
    while let Found::Bytes(n) = retained.read_at(at, &mut buffer).unwrap() {
        assert_eq!(buffer[..n], pattern(at, n)[..]);
        at += n as u64;
    }
    assert_eq!(at, 1_050_000);
    writer.sync().unwrap();
}

#[test]
fn a_writer_that_dies_between_data_and_index_on_a_full_disk_leaves_a_log_that_recovers() {
    let Some((dir, _point)) = small_disk(400 << 10) else { return };
    let dir = Arc::new(dir);
    let limits = Limits { segment_bytes: 64 << 10, segments: 100 };
    let mut writer = LogWriter::create(dir.clone(), "stdout", limits, 0).unwrap();
    append_pattern(&mut writer, 100_000);
    // Fill the index's page with records, which takes less than a page of data: one per millisecond.
    while writer.current.as_ref().is_some_and(|segment| segment.index_len + RECORD_LEN as u64 <= 4096) {
        append_pattern(&mut writer, 1);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    writer.retained().hold(0);
    let data = writer.current.as_ref().unwrap().data_len;
    let mut hog = dir.create_file("hog").unwrap();
    while io::Write::write(&mut hog, &[0; 4096]).is_ok() {}
    hog.set_len(hog.metadata().unwrap().len() - 8192).unwrap();
    let bytes = pattern(writer.next_offset(), 20_000);
    let mut slices = [IoSlice::new(&bytes)];
    let stalled = writer.append(&mut &mut slices[..]).unwrap_err();
    assert!(matches!(&stalled, Stalled::Disk(e) if e.source.raw_os_error() == Some(libc::ENOSPC)));
    let end = writer.next_offset();
    let segment = writer.current.as_ref().unwrap();
    assert!(
        segment.data_len >= data + 8192 && segment.owed.is_some(),
        "the data found room, its record none"
    );
    drop(writer);

    let mut writer = LogWriter::recover(dir.clone(), "stdout", limits).unwrap();
    assert_eq!(writer.next_offset(), end);
    append_pattern(&mut writer, 10_000);
    dir.remove("hog").unwrap();
    append_pattern(&mut writer, 50_000);
    let retained = writer.retained();
    let mut buffer = vec![0; 1 << 16];
    let (mut at, first) = (0, end + 60_000 - retained.end());
    loop {
        match retained.read_at(at, &mut buffer).unwrap() {
            Found::Dropped(to) => at = to,
            Found::Bytes(n) => {
                assert_eq!(buffer[..n], pattern(first + at, n)[..]);
                at += n as u64;
            }
            Found::End => break,
        }
    }
    assert_eq!(at, retained.end());
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
                2 => log.writer.sync().unwrap(),
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
