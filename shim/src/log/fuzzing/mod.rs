//! Readers and recovery of a log on files that anybody may have written, as a fuzz target runs them.
//!
//! The input describes files, for no mutation of bytes finds a checksum: see [`files`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a fuzz target tells by panicking")]

mod files;

use std::{collections::BTreeMap, fs, io::IoSlice, path::Path, sync::Arc};

use self::files::{Files, Input};
use super::{
    dir::LogDir,
    format::{HEADER_LEN, OFFSET_MAX, RECORD_LEN, Record, SegmentHeader},
    reader::{Cursor, Dir, Position, Segments, Stream},
    since::since,
    tail::tail,
    writer::{Identity, Limits, LogWriter},
};

/// More than is written to a log here; one that is so near to the last offset is left alone.
const WRITTEN_MAX: u64 = 1 << 20;

/// Small, so that what is appended makes segments; many, so that none is dropped.
const LIMITS: Limits = Limits { segment_bytes: 64 << 10, segments: 1000 };

/// Writes the files that `input` describes into the directory `dir`, whose files it removes; reads,
/// recovers, and goes on writing the log that they are.
///
/// # Panics
///
/// If a reader gives other bytes than the data files hold, if recovery changes them, or changes its mind
/// when it is repeated, or if what is written then is not what is read.
pub fn log(dir: &Path, input: &[u8]) {
    decode(input);
    let mut input = Input(input);
    let files = Files::read(&mut input);
    files.write(dir).unwrap();
    let mut output = files.output();
    read(dir, &output, &mut input);
    recover(dir, &mut output, &mut input);
    read(dir, &output, &mut input);
}

/// What is taken for a header or a record is the bytes that it would be written as.
fn decode(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk::<HEADER_LEN>()
        && let Ok(header) = SegmentHeader::decode(bytes)
    {
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
    }
    if let Some(bytes) = bytes.first_chunk::<RECORD_LEN>()
        && let Ok(record) = Record::decode(bytes)
    {
        assert_eq!(Record::decode(&record.encode()), Ok(record));
    }
}

fn read(dir: &Path, output: &[u8], input: &mut Input<'_>) {
    let dir = Dir::open(dir).unwrap();
    let segments = || Segments::open(&dir, Stream::Stdout).unwrap();
    let mut cursor = Cursor::new(segments(), Position::default()).unwrap();
    assert_same(&everything(&mut cursor), output);
    cursor.refresh(&dir).unwrap();
    assert!(cursor.fill().unwrap().is_empty(), "nothing was written meanwhile");

    let lines = u64::from(input.byte().unwrap_or(2));
    let found = tail(&segments(), Position::default(), lines).unwrap();
    let (expected, count) = last_lines(output, lines);
    assert_eq!(found.lines, count);
    assert_same(&everything(&mut Cursor::new(segments(), found.start).unwrap()), expected);

    let time = input.field(0).unwrap_or(0);
    let start = since(&segments(), time).unwrap();
    let rest = everything(&mut Cursor::new(segments(), start).unwrap());
    let before = output.strip_suffix(&rest[..]).expect("what is shown is the end of the log");
    assert!(rest.is_empty() || before.last().is_none_or(|byte| *byte == b'\n'), "a line begins there");
}

/// The end of `output` that holds its last lines, at most `lines` of them, and how many there are.
fn last_lines(output: &[u8], lines: u64) -> (&[u8], u64) {
    let mut begins = output.split_inclusive(|byte| *byte == b'\n').rev();
    let (mut len, mut count) = (0, 0);
    while count < lines
        && let Some(line) = begins.next()
    {
        len += line.len();
        count += 1;
    }
    (&output[output.len() - len..], count)
}

fn everything(cursor: &mut Cursor) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let block = cursor.fill().unwrap();
        let len = block.len();
        all.extend_from_slice(block);
        if len == 0 {
            return all;
        }
        cursor.time_ns().unwrap();
        cursor.take_lost();
        cursor.consume(len);
    }
}

fn recover(dir: &Path, output: &mut Vec<u8>, input: &mut Input<'_>) {
    let open = || Arc::new(LogDir::open(dir).unwrap());
    let writer = LogWriter::recover(open(), "stdout", LIMITS).unwrap();
    let found = (writer.next_offset(), writer.identity());
    drop(writer);
    assert_same(&everything(&mut cursor(dir)), output);
    let data = data_files(dir);

    let mut writer = LogWriter::recover(open(), "stdout", LIMITS).unwrap();
    assert_eq!((writer.next_offset(), writer.identity()), found, "recovery finds what recovery left");
    assert!(data == data_files(dir), "the data files are the truth");

    let mut offset = writer.next_offset();
    if offset > OFFSET_MAX - WRITTEN_MAX {
        return;
    }
    let identity = Identity { timeline: u64::from(input.byte().unwrap_or(0) % 4), epoch: 7 };
    writer.identify(identity).unwrap();
    for _ in 0..input.byte().unwrap_or(0) % 4 {
        let len = usize::from(input.byte().unwrap_or(1)) * 512;
        let bytes = vec![input.byte().unwrap_or(b'x'); len];
        writer.append(&mut &mut [IoSlice::new(&bytes)][..]).unwrap();
        output.extend(&bytes);
        offset += len as u64;
        assert_eq!(writer.next_offset(), offset);
        let gap = u64::from(input.byte().unwrap_or(0));
        if gap & 1 == 1 {
            offset += gap;
            writer.gap(offset).unwrap();
        }
    }
    drop(writer);
    let writer = LogWriter::recover(open(), "stdout", LIMITS).unwrap();
    // An epoch that becomes known only after bytes were written is not in their segment.
    assert_eq!((writer.next_offset(), writer.identity().timeline), (offset, identity.timeline));
}

fn cursor(dir: &Path) -> Cursor {
    let segments = Segments::open(&Dir::open(dir).unwrap(), Stream::Stdout).unwrap();
    Cursor::new(segments, Position::default()).unwrap()
}

/// The data files by name.
fn data_files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let named = files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()));
    named.filter(|(name, _)| !name.ends_with(".idx")).collect()
}

/// Compares without printing kilobytes.
fn assert_same(got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!((differs, got.len()), (None, expected.len()), "(first difference, length)");
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_of_the_log_holds() {
        let dir = tempfile::tempdir().unwrap();
        cube_protocol::fuzzing::replay("log", |input| super::log(dir.path(), input));
    }
}
