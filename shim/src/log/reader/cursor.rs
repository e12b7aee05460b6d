//! Reading a stream's log forward, with a fixed amount of memory.

use std::io;

use memchr::memchr;

use super::{Dir, Position, ReadError, Segment, Segments, index::Walk};

/// Bytes read at once.
const BLOCK: usize = 256 << 10;

/// A reader's place in the log of one stream, with what is known about that place.
///
/// Like [`std::io::BufRead`]: [`fill`](Cursor::fill) shows bytes, [`consume`](Cursor::consume) moves
/// over them. No block goes across a place where bytes were lost.
#[derive(Debug)]
pub struct Cursor {
    segments: Segments,
    at: Position,
    walk: Walk,
    block: Vec<u8>,
    /// The part of the block that has not been consumed; its first byte is at `at`.
    unread: std::ops::Range<usize>,
    lost: u64,
    /// Bytes that the segment before had of what the one that was entered says is lost.
    had: u64,
}

impl Cursor {
    /// A cursor at `start`, a position in `segments`.
    pub fn new(segments: Segments, start: Position) -> Result<Cursor, ReadError> {
        let mut cursor = Cursor {
            segments,
            at: start,
            walk: Walk::default(),
            block: vec![0; BLOCK],
            unread: 0..0,
            lost: 0,
            had: 0,
        };
        cursor.walk = cursor.walk_at(start)?;
        Ok(cursor)
    }

    /// The next bytes. Empty at the end of what was there when the segments were last looked at.
    pub fn fill(&mut self) -> Result<&[u8], ReadError> {
        if self.unread.is_empty() {
            self.read_block()?;
        }
        Ok(&self.block[self.unread.clone()])
    }

    /// Moves on by `count` of the bytes that [`fill`](Cursor::fill) has shown.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.unread.len());
        self.unread.start += count;
        self.at.offset += count as u64;
    }

    /// Wall clock of the write that the next byte belongs to, nanoseconds since 1970; `None` if the
    /// index does not tell. To be called after [`fill`](Cursor::fill).
    pub fn time_ns(&mut self) -> Result<Option<u64>, ReadError> {
        let Some((segment, index)) = self.segments.with_index(self.at.segment) else { return Ok(None) };
        // `fill` ends its blocks in front of gaps, so there is none on the way.
        self.walk.advance(index, self.at.offset).map_err(|e| index_error(segment, e))?;
        Ok(self.walk.time_ns())
    }

    /// Bytes that were lost right before the next byte, counted once.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    /// Whether every segment has an index, so that every byte has a time.
    pub fn has_times(&self) -> bool {
        self.segments.list().iter().all(|segment| segment.index().is_some() || segment.is_empty())
    }

    /// Moves behind the next newline, or to the end.
    pub fn skip_line(&mut self) -> Result<(), ReadError> {
        loop {
            let bytes = self.fill()?;
            let (count, found) = match memchr(b'\n', bytes) {
                Some(newline) => (newline + 1, true),
                None => (bytes.len(), false),
            };
            self.consume(count);
            if found || count == 0 {
                return Ok(());
            }
        }
    }

    /// Looks in `dir`, where the segments came from, for what was written since. Closes the segments that
    /// were read.
    pub fn refresh(&mut self, dir: &Dir) -> Result<(), ReadError> {
        let had_index = self.segments.with_index(self.at.segment).is_some();
        self.segments.refresh(dir)?;
        if !had_index && self.segments.with_index(self.at.segment).is_some() {
            self.walk = self.walk_at(self.at)?;
        }
        // A file that rotation has removed keeps its space on the disk as long as it is open.
        self.segments.forget_before(self.at.segment);
        self.at.segment = 0;
        Ok(())
    }

    /// Whether the log in `dir`, another directory, goes on with this one; `None` if it does not tell yet.
    pub fn goes_on_in(&self, dir: &Dir) -> Result<Option<bool>, ReadError> {
        self.segments.goes_on_in(dir)
    }

    fn read_block(&mut self) -> Result<(), ReadError> {
        self.unread = 0..0;
        while let Some(segment) = self.segments.list().get(self.at.segment) {
            let mut end = segment.len().min(self.at.offset.saturating_add(BLOCK as u64));
            if let Some(index) = segment.index() {
                let failed = |e| index_error(segment, e);
                let lost = self.walk.advance(index, self.at.offset).map_err(failed)?;
                if lost > 0 {
                    let had = std::mem::take(&mut self.had);
                    self.lost = self.lost.saturating_add(lost.saturating_sub(had));
                }
                end = self.walk.end_of_run(index, end).map_err(failed)?;
            }
            if end > self.at.offset {
                let wanted = (end - self.at.offset) as usize;
                let read = segment.read_at(&mut self.block[..wanted], self.at.offset)?;
                if read > 0 {
                    self.unread = 0..read;
                    return Ok(());
                }
            }
            if self.at.segment + 1 >= self.segments.list().len() {
                return Ok(());
            }
            self.enter_next_segment()?;
        }
        Ok(())
    }

    fn enter_next_segment(&mut self) -> Result<(), ReadError> {
        self.had = 0;
        if let [left, entered, ..] = &self.segments.list()[self.at.segment..]
            && let Some((end, first)) = seam(left, self.at.offset, entered)?
        {
            self.lost = self.lost.saturating_add(first.saturating_sub(end));
            self.had = end.saturating_sub(first);
        }
        self.at = Position { segment: self.at.segment + 1, offset: 0 };
        self.walk = self.walk_at(self.at)?;
        Ok(())
    }

    fn walk_at(&self, at: Position) -> Result<Walk, ReadError> {
        match self.segments.with_index(at.segment) {
            Some((segment, index)) => Walk::seek(index, at.offset).map_err(|e| index_error(segment, e)),
            None => Ok(Walk::default()),
        }
    }
}

/// Where in the stream one segment ends, of which `read` bytes were read before somebody cut it, and where
/// the next one begins. Between them are those that rotation removed before they were read, and what somebody
/// took away. Offsets of another timeline or stream say nothing.
fn seam(left: &Segment, read: u64, entered: &Segment) -> Result<Option<(u64, u64)>, ReadError> {
    let (Some(before), Some(after)) = (left.index(), entered.index()) else { return Ok(None) };
    let (old, new) = (before.header(), after.header());
    let same_epoch = old.epoch == new.epoch || old.epoch == 0 || new.epoch == 0;
    if old.timeline != new.timeline || !same_epoch {
        return Ok(None);
    }
    let end = before.stream_offset_at_end(left.len().max(read)).map_err(|e| index_error(left, e))?;
    Ok(Some((end, new.first_offset)))
}

fn index_error(segment: &Segment, e: io::Error) -> ReadError {
    ReadError::io("cannot read the index of", segment.path(), e)
}
