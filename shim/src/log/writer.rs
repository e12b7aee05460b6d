//! Writes the log of one stream: raw bytes into segments, an index beside each, rotation by size.
//!
//! Order of work: data, then its index record; only then does the caller acknowledge. So after a
//! death at any point the files hold an exact prefix of the stream that includes everything that was
//! acknowledged. All calls block on the disk and belong on a thread of their own.

use std::{
    io::{self, IoSlice},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    dir::{LogDir, LogError},
    format::{HEADER_LEN, RECORD_LEN, Record, RecordKind, SegmentHeader},
    place::Place,
    retained::Retained,
    segment::{Segment, closed_name, index_name},
};

/// How much of a log is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of data and index at which a segment is closed; at least 64 KiB.
    pub segment_bytes: u64,
    /// Segments kept, the one being written included; at least 2. Those that another timeline has closed
    /// early count by their bytes.
    pub segments: u32,
}

/// Segments above their limit that may be kept because they are short.
const SHORT_SEGMENTS: usize = 32;

/// What the bytes of a log belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Timeline of the sandbox; 0 if it is not known yet.
    pub timeline: u64,
    /// Epoch of the stream; 0 if it is not known yet.
    pub epoch: u64,
}

/// Why the log takes nothing at the moment. The caller keeps what was not written and tries again.
#[derive(Debug, thiserror::Error)]
pub enum Stalled {
    /// The next segment would push out one that an attached reader has not read yet.
    #[error("an attached reader is a whole retained log behind")]
    Reader,
    /// The disk does not take it, and there is no old segment to drop for it.
    #[error("the log cannot be written")]
    Disk(#[from] LogError),
}

/// The writer of one stream's log. Exactly one exists per stream.
#[derive(Debug)]
pub struct LogWriter {
    pub(super) dir: Arc<LogDir>,
    pub(super) stream: &'static str,
    pub(super) limits: Limits,
    pub(super) identity: Identity,
    pub(super) retained: Arc<Retained>,
    pub(super) next_offset: u64,
    /// Number of the segment that is begun next.
    pub(super) next_number: u64,
    /// `None` between the closing of a segment and the beginning of the next.
    pub(super) current: Option<Segment>,
    /// Whether the stream has gone back, and its new segment is not begun yet.
    pub(super) goes_back: bool,
    /// Whether its files are where they belong.
    pub(super) place: Place,
}

impl LogWriter {
    /// Begins the log of `stream` ("stdout" or "stderr") at stream offset `from`, in a directory without
    /// one.
    pub fn create(
        dir: Arc<LogDir>,
        stream: &'static str,
        limits: Limits,
        from: u64,
    ) -> Result<LogWriter, LogError> {
        let mut writer = LogWriter {
            dir,
            stream,
            limits,
            identity: Identity::default(),
            retained: Arc::default(),
            next_offset: from,
            next_number: 1,
            current: None,
            goes_back: false,
            place: Place::default(),
        };
        writer.begin_segment()?;
        Ok(writer)
    }

    /// Stream offset of the byte that is written next.
    pub fn next_offset(&self) -> u64 {
        self.next_offset
    }

    /// [`next_offset`](LogWriter::next_offset) if the index is as far as the data, so that everything
    /// below may be acknowledged. For use after an error.
    pub fn safe_offset(&mut self) -> Option<u64> {
        self.go_back().and_then(|()| self.settle()).ok().map(|()| self.next_offset)
    }

    /// What the log belongs to, as far as it is known.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The retained segments, for a reader in this process.
    pub fn retained(&self) -> Arc<Retained> {
        self.retained.clone()
    }

    /// Says what the bytes that follow belong to. A segment never mixes two timelines: another one
    /// begins a new segment, unless the current one is still empty.
    pub fn identify(&mut self, identity: Identity) -> Result<(), Stalled> {
        self.go_back()?;
        self.keep_place()?;
        let known = Identity {
            timeline: identity.timeline,
            epoch: if identity.epoch == 0 { self.identity.epoch } else { identity.epoch },
        };
        self.identity = known;
        let Some(segment) = &mut self.current else { return Ok(()) };
        let header = SegmentHeader { timeline: known.timeline, epoch: known.epoch, ..segment.header };
        if header == segment.header {
            Ok(())
        } else if segment.is_empty() {
            let name = index_name(self.stream);
            let result = segment.rewrite_header(header);
            result.map_err(|e| Stalled::Disk(self.dir.error("cannot write the log index", &name, e)))
        } else if header.timeline != segment.header.timeline {
            self.rotate()
        } else {
            Ok(())
        }
    }

    /// Appends `parts` at [`LogWriter::next_offset`], and advances them by what was written. On an
    /// error the rest is to be offered again later.
    pub fn append(&mut self, parts: &mut &mut [IoSlice<'_>]) -> Result<(), Stalled> {
        self.go_back()?;
        while !parts.is_empty() {
            if parts[0].is_empty() {
                IoSlice::advance_slices(parts, 0);
                continue;
            }
            let written = self.with_space(|writer| writer.write_some(parts))?;
            self.next_offset += written;
            self.retained.grow(written);
            IoSlice::advance_slices(parts, written as usize);
        }
        self.with_space(LogWriter::settle)
    }

    /// Notes that the stream goes on at `offset`, which must not be below [`LogWriter::next_offset`]:
    /// what is between was dropped in the guest.
    pub fn gap(&mut self, offset: u64) -> Result<(), Stalled> {
        self.go_back()?;
        self.with_space(|writer| {
            writer.keep_place()?;
            writer.settle()?;
            writer.room(RECORD_LEN as u64)?;
            let time_ns = now_ns();
            if let Some(segment) = &mut writer.current {
                let file_offset = segment.data_len;
                segment.owe(Record { kind: RecordKind::Gap, stream_offset: offset, file_offset, time_ns });
            }
            Ok(())
        })?;
        self.next_offset = offset;
        self.with_space(LogWriter::settle)
    }

    /// Does `work`, dropping the oldest segments while the disk is full.
    pub(super) fn with_space<T>(
        &mut self,
        mut work: impl FnMut(&mut LogWriter) -> Result<T, Stalled>,
    ) -> Result<T, Stalled> {
        loop {
            match work(self) {
                Err(Stalled::Disk(e)) if makes_room(&e.source) && self.drop_closed()? => {}
                other => return other,
            }
        }
    }

    fn write_some(&mut self, parts: &[IoSlice<'_>]) -> Result<u64, Stalled> {
        self.keep_place()?;
        self.settle()?;
        let room = self.room(1 + RECORD_LEN as u64)?.saturating_sub(RECORD_LEN as u64);
        let (stream_offset, now) = (self.next_offset, now_ns());
        let Some(segment) = &mut self.current else { return Ok(0) };
        let total: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let written = if total <= room {
            segment.write(parts, stream_offset, now)
        } else {
            let first = &parts[0];
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(first.len());
            segment.write(&[IoSlice::new(&first[..len])], stream_offset, now)
        };
        written.map_err(|e| Stalled::Disk(self.dir.error("cannot write the log file", self.stream, e)))
    }

    pub(super) fn settle(&mut self) -> Result<(), Stalled> {
        let Some(segment) = &mut self.current else { return Ok(()) };
        let name = index_name(self.stream);
        Ok(segment.settle().map_err(|e| self.dir.error("cannot write the log index", &name, e))?)
    }

    /// Bytes that the current segment may still grow by, at least `needed`; begins another if it must.
    fn room(&mut self, needed: u64) -> Result<u64, Stalled> {
        let limit = self.segment_bytes().max(HEADER_LEN as u64 + needed);
        let left = |segment: &Segment| limit.saturating_sub(segment.size());
        match &self.current {
            Some(segment) if left(segment) >= needed => return Ok(left(segment)),
            Some(_) => self.rotate()?,
            None => {
                self.begin_segment()?;
            }
        }
        Ok(self.current.as_ref().map_or(0, left))
    }

    /// Closes the current segment and begins the next.
    fn rotate(&mut self) -> Result<(), Stalled> {
        if self.is_in_memory() {
            return self.rotate_in_memory();
        }
        if !self.make_way()? {
            return Err(Stalled::Reader);
        }
        self.close_current()?;
        Ok(self.begin_segment()?)
    }

    /// Drops what must go before another segment is begun. `false` if an attached reader needs it.
    pub(super) fn make_way(&mut self) -> Result<bool, LogError> {
        let closing = self.current.as_ref().map_or(0, Segment::size);
        while self.is_full(closing) {
            if !self.drop_closed()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the closed segments, with `closing` bytes more, leave no room for another. Counted in bytes:
    /// each rollback closes a segment that may be short, and would soon cost all that was written before.
    pub(super) fn is_full(&self, closing: u64) -> bool {
        let limit = self.limits.segments.max(2);
        let bytes = self.limits.segment_bytes.saturating_mul(u64::from(limit) - 1);
        self.retained.closed_size().saturating_add(closing) > bytes
            || self.retained.count() >= limit as usize + SHORT_SEGMENTS
    }

    /// Index first: recovery takes an index without its data file for a rotation to be completed.
    pub(super) fn close_current(&mut self) -> Result<(), LogError> {
        if let Some(segment) = &self.current {
            self.close(segment)?;
            self.current = None;
        }
        Ok(())
    }

    pub(super) fn close(&self, segment: &Segment) -> Result<(), LogError> {
        let closed = closed_name(self.stream, segment.header.number);
        rename_once(&self.dir, &index_name(self.stream), &index_name(&closed))?;
        cube_fault::point("rotation.index_renamed");
        rename_once(&self.dir, self.stream, &closed)?;
        cube_fault::point("rotation.data_renamed");
        self.retained.close(segment.header.number, segment.size());
        Ok(())
    }

    pub(super) fn begin_segment(&mut self) -> Result<(), LogError> {
        if self.is_in_memory() {
            return self.begin_in_memory();
        }
        let lost = self.place.lost.min(self.next_offset);
        let header = self.next_header(self.next_offset - lost);
        let gap = Record {
            kind: RecordKind::Gap,
            stream_offset: self.next_offset,
            file_offset: 0,
            time_ns: header.created_ns,
        };
        let segment = Segment::begin(&self.dir, self.stream, header, (lost > 0).then_some(gap))?;
        self.place.lost = 0;
        self.retained.push(header.number, segment.data.clone(), 0);
        self.current = Some(segment);
        self.next_number += 1;
        Ok(())
    }

    pub(super) fn next_header(&self, first_offset: u64) -> SegmentHeader {
        SegmentHeader {
            number: self.next_number,
            first_offset,
            timeline: self.identity.timeline,
            epoch: self.identity.epoch,
            created_ns: now_ns(),
        }
    }

    /// Removes the oldest closed segment. `false` if there is none, or an attached reader needs it.
    pub(super) fn drop_closed(&mut self) -> Result<bool, LogError> {
        let Some(number) = self.retained.droppable() else { return Ok(false) };
        if self.current.as_ref().is_some_and(|segment| segment.header.number == number) {
            return Ok(false);
        }
        let name = closed_name(self.stream, number);
        self.dir.remove(&name)?;
        cube_fault::point("rotation.oldest_data_removed");
        self.dir.remove(&index_name(&name))?;
        cube_fault::point("rotation.oldest_index_removed");
        self.retained.pop();
        Ok(true)
    }
}

/// Renames unless an earlier attempt has done it.
fn rename_once(dir: &LogDir, from: &str, to: &str) -> Result<(), LogError> {
    match dir.rename(from, to) {
        Err(e) if e.source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Errors against which dropping old segments helps, or at least may.
pub(super) fn makes_room(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EIO))
}

pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
