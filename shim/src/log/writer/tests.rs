mod full_disk;
mod place;
mod recovery;
mod rewind;

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

/// A copy of a log directory, to damage.
fn copy(of: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(of).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
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
