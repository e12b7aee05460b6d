//! Reading the index of one segment: by number, by binary search, and forward.

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt};

use crate::log::format::{HEADER_LEN, RECORD_LEN, Record, RecordKind, SegmentHeader};

/// Most records that [`Walk`] reads ahead.
const AHEAD: usize = 512;

/// The index of a segment. Another process may be appending to it.
#[derive(Debug)]
pub struct Index {
    file: File,
    header: SegmentHeader,
}

impl Index {
    /// Reads the header. `None` if there is no valid one: the segment is then read without its index.
    pub(super) fn open(file: File) -> Option<Index> {
        let header = read_header(&file)?;
        Some(Index { file, header })
    }

    /// Reads the header anew; keeps the old one if a new one is just being written.
    pub(super) fn read_header_again(&mut self) {
        if let Some(header) = read_header(&self.file) {
            self.header = header;
        }
    }

    /// What the segment is a part of.
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Number of whole records that the file has room for now. Some may be damaged.
    fn count(&self) -> io::Result<u64> {
        let len = self.file.metadata()?.len();
        Ok(len.saturating_sub(HEADER_LEN as u64) / RECORD_LEN as u64)
    }

    /// Record number `n`, from 0. `None` if it does not exist or is damaged, which ends the index.
    fn record(&self, n: u64) -> io::Result<Option<Record>> {
        let mut bytes = [0; RECORD_LEN];
        match self.file.read_exact_at(&mut bytes, position(n)) {
            Ok(()) => Ok(Record::decode(&bytes).ok()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Number of records at the beginning for which `holds` is true, by binary search.
    fn partition(&self, holds: impl Fn(&Record) -> bool) -> io::Result<u64> {
        let (mut low, mut high) = (0, self.count()?);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.record(middle)? {
                Some(record) if holds(&record) => low = middle + 1,
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// The last valid record, or `None` if there is none.
    pub fn last(&self) -> io::Result<Option<Record>> {
        match self.partition(|_| true)? {
            0 => Ok(None),
            n => self.record(n - 1),
        }
    }

    /// The first record of `time_ns` or later.
    pub fn first_since(&self, time_ns: u64) -> io::Result<Option<Record>> {
        self.record(self.partition(|record| record.time_ns < time_ns)?)
    }

    /// The offset in the stream of the byte at `file_offset`, which is not before the last record.
    pub fn stream_offset_at_end(&self, file_offset: u64) -> io::Result<u64> {
        Ok(expected_offset(self.last()?.as_ref(), &self.header, file_offset))
    }
}

fn read_header(file: &File) -> Option<SegmentHeader> {
    let mut bytes = [0; HEADER_LEN];
    file.read_exact_at(&mut bytes, 0).ok()?;
    SegmentHeader::decode(&bytes).ok()
}

fn position(n: u64) -> u64 {
    HEADER_LEN as u64 + n.saturating_mul(RECORD_LEN as u64)
}

/// The offset in the stream at `file_offset`, if nothing was lost since `record`.
fn expected_offset(record: Option<&Record>, header: &SegmentHeader, file_offset: u64) -> u64 {
    let (stream, file) = record.map_or((header.first_offset, 0), |r| (r.stream_offset, r.file_offset));
    stream.saturating_add(file_offset.saturating_sub(file))
}

/// A place in an index that moves forward with the reader of the data.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// The record that covers the reader's place.
    here: Option<Record>,
    /// Records after it, in order.
    ahead: VecDeque<Record>,
    /// Number of the record after those.
    next: u64,
}

impl Walk {
    /// In front of the first record that is not before `offset`.
    pub(super) fn seek(index: &Index, offset: u64) -> io::Result<Walk> {
        let next = index.partition(|record| record.file_offset < offset)?;
        let here = match next {
            0 => None,
            n => index.record(n - 1)?,
        };
        Ok(Walk { here, ahead: VecDeque::new(), next })
    }

    /// Moves on to the record that covers `offset`. Returns the bytes that gaps on the way lost.
    pub(super) fn advance(&mut self, index: &Index, offset: u64) -> io::Result<u64> {
        let mut lost = 0u64;
        loop {
            if self.ahead.is_empty() {
                self.read_ahead(index)?;
            }
            match self.ahead.front() {
                Some(record) if record.file_offset <= offset => {
                    if record.kind == RecordKind::Gap {
                        let expected = expected_offset(self.here.as_ref(), &index.header, record.file_offset);
                        lost = lost.saturating_add(record.stream_offset.saturating_sub(expected));
                    }
                    self.here = self.ahead.pop_front();
                }
                _ => return Ok(lost),
            }
        }
    }

    /// The largest offset up to `end` that can be read from `offset` on with no gap in between.
    /// Beyond `offset`, after [`Walk::advance`] to it.
    pub(super) fn end_of_run(&mut self, index: &Index, end: u64) -> io::Result<u64> {
        while self.ahead.back().is_none_or(|last| last.file_offset < end) {
            let before = self.ahead.len();
            if before < AHEAD {
                self.read_ahead(index)?;
            }
            if self.ahead.len() == before {
                break;
            }
        }
        let gap = self.ahead.iter().find(|record| record.kind == RecordKind::Gap);
        let known = match self.ahead.back() {
            Some(last) if self.ahead.len() >= AHEAD => last.file_offset,
            _ => end,
        };
        Ok(gap.map_or(end, |gap| gap.file_offset).min(known).min(end))
    }

    /// Wall clock of the write that the reader's place belongs to, nanoseconds since 1970.
    pub(super) fn time_ns(&self) -> Option<u64> {
        self.here.map(|record| record.time_ns)
    }

    fn read_ahead(&mut self, index: &Index) -> io::Result<()> {
        const BATCH: usize = 64;
        let mut bytes = [0; BATCH * RECORD_LEN];
        let read = index.file.read_at(&mut bytes, position(self.next))?;
        for bytes in bytes[..read].as_chunks::<RECORD_LEN>().0 {
            let Ok(record) = Record::decode(bytes) else { break };
            // Records are in the order of the file: one that goes back ends the index.
            let last = self.ahead.back().or(self.here.as_ref());
            if last.is_some_and(|last| record.file_offset < last.file_offset) {
                break;
            }
            self.ahead.push_back(record);
            self.next += 1;
        }
        Ok(())
    }
}
