//! Where the lines of a given time begin.

use std::time::{Duration, SystemTime};

use memchr::memchr;

use super::reader::{Position, ReadError, Segment, Segments};

/// Bytes read at once in search of a newline.
const BLOCK: usize = 64 << 10;

/// The first line that began at `time_ns` or later, nanoseconds since 1970.
///
/// Found by binary search in the indices. Where an index is missing or ends early, the time decides at
/// which the next segment was begun or the file last written, and in doubt more is shown: nothing of
/// that time or later is left out.
pub fn since(segments: &Segments, time_ns: u64) -> Result<Position, ReadError> {
    let at = first_write_since(segments, time_ns)?;
    if begins_line(segments, at)? { Ok(at) } else { next_line(segments, at) }
}

fn first_write_since(segments: &Segments, time_ns: u64) -> Result<Position, ReadError> {
    for (number, segment) in segments.list().iter().enumerate() {
        let offset = match segment.index() {
            Some(index) => {
                let failed = |e| ReadError::io("cannot read the index of", segment.path(), e);
                match index.first_since(time_ns).map_err(failed)? {
                    Some(record) => Some(record.file_offset),
                    None if written_since(segments, number, time_ns) => {
                        Some(index.last().map_err(failed)?.map_or(0, |record| record.file_offset))
                    }
                    None => None,
                }
            }
            None => written_since(segments, number, time_ns).then_some(0),
        };
        if let Some(offset) = offset {
            return Ok(Position { segment: number, offset: offset.min(segment.len()) });
        }
    }
    Ok(segments.end())
}

/// Whether a segment may have been written to at `time_ns` or later.
fn written_since(segments: &Segments, number: usize, time_ns: u64) -> bool {
    let [segment, newer @ ..] = &segments.list()[number..] else { return false };
    if let Some(index) = newer.first().and_then(Segment::index) {
        return index.header().created_ns >= time_ns;
    }
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(time_ns));
    match (segment.modified(), time) {
        (Some(modified), Some(time)) => modified >= time,
        _ => true,
    }
}

/// Whether a line begins at `at`: the byte before it is a newline, or there is none.
fn begins_line(segments: &Segments, at: Position) -> Result<bool, ReadError> {
    for (number, segment) in segments.list().iter().enumerate().take(at.segment + 1).rev() {
        let end = if number == at.segment { at.offset } else { segment.len() };
        if end > 0 {
            let mut byte = [0];
            segment.read_at(&mut byte, end - 1)?;
            return Ok(byte == [b'\n']);
        }
    }
    Ok(true)
}

/// Behind the first newline at or after `at`.
fn next_line(segments: &Segments, at: Position) -> Result<Position, ReadError> {
    let mut block = vec![0; BLOCK];
    for (number, segment) in segments.list().iter().enumerate().skip(at.segment) {
        let mut offset = if number == at.segment { at.offset } else { 0 };
        loop {
            let read = segment.read_at(&mut block, offset)?;
            if let Some(newline) = memchr(b'\n', &block[..read]) {
                return Ok(Position { segment: number, offset: offset + newline as u64 + 1 });
            }
            if read == 0 {
                break;
            }
            offset += read as u64;
        }
    }
    Ok(segments.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::reader::{
        Cursor,
        testing::{TestLog, bytes_read, read_all},
    };

    /// Beyond any time that a file system could have recorded.
    const FUTURE: u64 = 10_000_000_000_000_000_000;

    fn since_of(log: &TestLog, time_ns: u64) -> String {
        let segments = log.segments();
        let start = since(&segments, time_ns).unwrap();
        String::from_utf8(read_all(&mut Cursor::new(segments, start).unwrap()).0).unwrap()
    }

    #[test]
    fn lines_that_began_earlier_are_left_out() {
        let mut log = TestLog::new();
        log.write(FUTURE + 10, b"ten\n");
        log.write(FUTURE + 20, b"twenty\n");
        log.rotate();
        log.write(FUTURE + 30, b"thirty\n");
        for (time, expected) in [
            (0, "ten\ntwenty\nthirty\n"),
            (10, "ten\ntwenty\nthirty\n"),
            (11, "twenty\nthirty\n"),
            (30, "thirty\n"),
            (31, ""),
        ] {
            assert_eq!(since_of(&log, FUTURE + time), expected, "{time}");
        }
    }

    #[test]
    fn the_rest_of_a_line_that_began_earlier_is_left_out_even_across_segments() {
        let mut log = TestLog::new();
        log.write(FUTURE + 10, b"begun ");
        log.rotate();
        log.write(FUTURE + 20, b"going on ");
        log.rotate();
        log.write(FUTURE + 30, b"ended\nnext\n");
        assert_eq!(since_of(&log, FUTURE + 20), "next\n");
        assert_eq!(since_of(&log, FUTURE + 10), "begun going on ended\nnext\n");
    }

    #[test]
    fn without_an_index_the_time_of_the_last_write_decides_for_the_whole_segment() {
        let mut log = TestLog::without_index();
        log.append(b"a\nb\n");
        assert_eq!(since_of(&log, 1), "a\nb\n");
        assert_eq!(since_of(&log, FUTURE), "");
    }

    #[test]
    fn output_beyond_the_end_of_an_index_is_not_left_out() {
        let mut log = TestLog::new();
        log.write(1, b"a\n");
        log.write(2, b"b\n");
        log.append(b"c\n");
        assert_eq!(since_of(&log, 3), "b\nc\n");
    }

    #[test]
    fn the_search_is_binary() {
        let mut log = TestLog::new();
        for n in 0..20_000 {
            log.write(FUTURE + n, b"0123456789\n");
        }
        let segments = log.segments();
        let before = bytes_read();
        let at = since(&segments, FUTURE + 12_345).unwrap();
        let read = bytes_read() - before;
        assert_eq!(at.offset, 12_345 * 11);
        assert!(read < 4096, "{read} bytes were read");
    }
}
