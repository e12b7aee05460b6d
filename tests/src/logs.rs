//! Logs on disk, as `shim/src/log/format.rs` describes them, read without the product's reader.

use std::{
    fmt::Display,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use cube_shim::log::format::{HEADER_LEN, RECORD_LEN, Record, RecordKind, SegmentHeader};

use crate::verify::compare;

/// One segment of a stream's log.
#[derive(Debug)]
pub struct Segment {
    /// The data file.
    pub path: PathBuf,
    /// The index's header.
    pub header: SegmentHeader,
    /// Length of the data file.
    pub len: u64,
}

/// The retained segments of `stream` in `dir`, the oldest first.
pub fn segments(dir: &Path, stream: &str) -> Vec<Segment> {
    try_segments(dir, stream).unwrap_or_else(|e| panic!("{stream} in {}: {e}", dir.display()))
}

/// Like [`segments`], of a log that is being written: fails in the middle of a rotation.
pub fn try_segments(dir: &Path, stream: &str) -> io::Result<Vec<Segment>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(stream) else { continue };
        if rest.is_empty() || rest.strip_prefix('.').is_some_and(|n| n.parse::<u64>().is_ok()) {
            found.push(segment(entry.path())?);
        }
    }
    found.sort_by_key(|segment| segment.header.number);
    Ok(found)
}

fn segment(path: PathBuf) -> io::Result<Segment> {
    let index = Some(index_of(&path)).filter(|index| index.exists());
    let index = index.or_else(|| index_of_half_rotated(&path)).unwrap_or_else(|| index_of(&path));
    let named = |e: &dyn Display| io::Error::other(format!("{}: {e}", index.display()));
    let mut header = [0; HEADER_LEN];
    File::open(&index).and_then(|mut file| file.read_exact(&mut header)).map_err(|e| named(&e))?;
    let header = SegmentHeader::decode(&header).map_err(|e| named(&e))?;
    Ok(Segment { len: fs::metadata(&path)?.len(), header, path })
}

fn index_of(segment: &Path) -> PathBuf {
    segment.with_file_name(format!("{}.idx", segment.file_name().unwrap().to_str().unwrap()))
}

/// Where a rotation that was cut short has left the index of the current segment: it is renamed first.
fn index_of_half_rotated(segment: &Path) -> Option<PathBuf> {
    let stream = segment.file_name()?.to_str()?;
    let entries = fs::read_dir(segment.parent()?).ok()?.flatten();
    let mut indexes =
        entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "idx"));
    indexes.find(|index| {
        let closed = index.with_extension("");
        let name = closed.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix(stream).is_some_and(|rest| rest.starts_with('.')) && !closed.exists()
    })
}

/// The whole log of a stream that was not rotated away.
pub fn read(dir: &Path, stream: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments(dir, stream) {
        assert_eq!(segment.header.first_offset, bytes.len() as u64, "{segment:?}");
        bytes.extend(fs::read(&segment.path).unwrap());
    }
    bytes
}

/// Compares every retained segment with its range of the stream of `seed`, and panics unless they
/// follow each other up to `end`. Gives the offset of the first byte that is retained.
pub fn compare_segments(dir: &Path, stream: &str, seed: u64, end: u64) -> u64 {
    let segments = segments(dir, stream);
    let first = segments.first().unwrap_or_else(|| panic!("no {stream} in {}", dir.display()));
    let mut at = first.header.first_offset;
    for segment in &segments {
        assert_eq!(segment.header.first_offset, at, "{segment:?} does not follow the one before");
        let file = File::open(&segment.path).unwrap();
        at += compare(file, seed, at).unwrap_or_else(|e| panic!("{}: {e}", segment.path.display()));
    }
    assert_eq!(at, end, "end of {stream} in {}", dir.display());
    first.header.first_offset
}

/// What a log holds of a stream of which parts were dropped in the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// Bytes that are there.
    pub kept: u64,
    /// Bytes that the index says are missing in between.
    pub lost: u64,
}

/// Compares every byte with the stream of `seed` at the offset that the index gives it. Panics unless
/// the log begins with the stream's first byte, and every byte after it is there or counted as lost.
pub fn account(dir: &Path, stream: &str, seed: u64) -> Account {
    let mut sum = Account::default();
    for segment in segments(dir, stream) {
        let mut offset = sum.kept + sum.lost;
        assert_eq!(segment.header.first_offset, offset, "{segment:?}");
        let mut file = File::open(&segment.path).unwrap();
        let mut at = 0;
        let gaps = records(&segment.path).into_iter().filter(|record| record.kind == RecordKind::Gap);
        for (until, next) in
            gaps.map(|gap| (gap.file_offset, Some(gap.stream_offset))).chain([(segment.len, None)])
        {
            let bytes = compare((&mut file).take(until - at), seed, offset);
            let bytes = bytes.unwrap_or_else(|e| panic!("{}: {e}", segment.path.display()));
            assert_eq!(bytes, until - at, "{segment:?}");
            (sum.kept, offset, at) = (sum.kept + bytes, offset + bytes, until);
            let next = next.unwrap_or(offset);
            assert!(next >= offset, "{segment:?} goes back from offset {offset} to {next}");
            (sum.lost, offset) = (sum.lost + next - offset, next);
        }
    }
    sum
}

fn records(segment: &Path) -> Vec<Record> {
    let index = fs::read(index_of(segment)).unwrap();
    let records = index[HEADER_LEN..].chunks_exact(RECORD_LEN);
    records.map(|bytes| Record::decode(bytes.try_into().unwrap()).unwrap()).collect()
}
