//! Where the last lines of a log begin.

use memchr::memrchr_iter;

use super::reader::{Position, ReadError, Segments};

/// Bytes read at once, backwards from the end.
const BLOCK: u64 = 64 << 10;

/// The end of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// Where the first of its lines begins.
    pub start: Position,
    /// Lines from there to the end: as many as were asked for, or all that there are.
    pub lines: u64,
}

/// Finds the last `lines` lines at or after `from`, where a line begins. What follows the last newline
/// is a line too, if it is not empty.
///
/// Reads blocks backwards until it has seen enough newlines: the cost depends on the lines asked
/// for, not on the size of the log, and no line is ever held in memory.
pub fn tail(segments: &Segments, from: Position, lines: u64) -> Result<Tail, ReadError> {
    if lines == 0 {
        return Ok(Tail { start: segments.end(), lines: 0 });
    }
    let mut buffer = vec![0; BLOCK as usize];
    let mut seen_last_byte = false;
    let mut lines_begun = 0;
    for (number, segment) in segments.list().iter().enumerate().skip(from.segment).rev() {
        let first = if number == from.segment { from.offset } else { 0 };
        let mut end = segment.len();
        while end > first {
            let start = end.saturating_sub(BLOCK).max(first);
            let block = &mut buffer[..(end - start) as usize];
            read_block(segment, block, start)?;
            for newline in memrchr_iter(b'\n', block) {
                // A newline begins the line behind it, unless it is the last byte.
                let is_last_byte = !seen_last_byte && newline + 1 == block.len();
                if is_last_byte {
                    continue;
                }
                lines_begun += 1;
                if lines_begun == lines {
                    let offset = start + newline as u64 + 1;
                    return Ok(Tail { start: Position { segment: number, offset }, lines });
                }
            }
            seen_last_byte = true;
            end = start;
        }
    }
    Ok(Tail { start: from, lines: lines_begun + u64::from(seen_last_byte) })
}

/// Fills `block` from `start` on. What somebody has cut off the file meanwhile reads as no newline.
fn read_block(segment: &super::reader::Segment, block: &mut [u8], start: u64) -> Result<(), ReadError> {
    let mut filled = 0;
    while filled < block.len() {
        match segment.read_at(&mut block[filled..], start + filled as u64)? {
            0 => {
                block[filled..].fill(0);
                break;
            }
            read => filled += read,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
