//! Logs on disk, as `shim/src/log/format.rs` describes them, read without the product's reader.

use std::{
    fmt::Display,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use cube_shim::log::format::{HEADER_LEN, SegmentHeader};

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
    let index = path.with_file_name(format!("{}.idx", path.file_name().unwrap().to_str().unwrap()));
    let named = |e: &dyn Display| io::Error::other(format!("{}: {e}", index.display()));
    let mut header = [0; HEADER_LEN];
    File::open(&index).and_then(|mut file| file.read_exact(&mut header)).map_err(|e| named(&e))?;
    let header = SegmentHeader::decode(&header).map_err(|e| named(&e))?;
    Ok(Segment { len: fs::metadata(&path)?.len(), header, path })
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
