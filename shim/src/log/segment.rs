//! The segment that is being written: a data file and its index.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::unix::fs::FileExt,
    sync::Arc,
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    uio::pwritev,
};

use super::{
    dir::{LogDir, LogError},
    format::{HEADER_LEN, OFFSET_MAX, RECORD_LEN, Record, RecordKind, SegmentHeader},
};

/// Bytes after which a write gets an index record of its own, however quickly it follows.
const RECORD_BYTES: u64 = 4096;

/// Nanoseconds after which a write gets an index record of its own, however short it is.
const RECORD_NS: u64 = 1_000_000;

/// `<stream>.idx`, or `<stream>.<number>.idx`.
pub(super) fn index_name(data_name: &str) -> String {
    format!("{data_name}.idx")
}

/// `<stream>.<number>`.
pub(super) fn closed_name(stream: &str, number: u64) -> String {
    format!("{stream}.{number}")
}

/// The number in `<number>`, as [`closed_name`] writes it: "007" and "+7" are somebody else's.
pub(super) fn closed_number(digits: &str) -> Option<u64> {
    digits.parse().ok().filter(|number: &u64| number.to_string() == digits && *number <= OFFSET_MAX)
}

fn write_beginning(index: &File, header: SegmentHeader, gap: Option<Record>) -> io::Result<()> {
    let mut bytes = header.encode().to_vec();
    bytes.extend(gap.iter().flat_map(Record::encode));
    index.write_all_at(&bytes, 0)
}

/// Both files of a segment and how much of each is valid. Writes are positioned, so that one that
/// failed in part is simply done again.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) header: SegmentHeader,
    pub(super) data: Arc<File>,
    pub(super) index: File,
    pub(super) data_len: u64,
    pub(super) index_len: u64,
    /// The last record, written or owed.
    pub(super) last: Option<Record>,
    /// A record whose data is written, but which is not in the index yet.
    pub(super) owed: Option<Record>,
}

impl Segment {
    /// Begins a segment in files named after the stream. The header, and the record of a `gap` that it begins
    /// with, is written before the data file exists, so a reader never sees data without knowing its offset.
    pub(super) fn begin(
        dir: &LogDir,
        stream: &str,
        header: SegmentHeader,
        gap: Option<Record>,
    ) -> Result<Segment, LogError> {
        let index_name = index_name(stream);
        let index = dir.create_file(&index_name)?;
        cube_fault::point("segment.index_created");
        index
            .set_len(0)
            .and_then(|()| write_beginning(&index, header, gap))
            .map_err(|e| dir.error("cannot write the log index", &index_name, e))?;
        cube_fault::point("segment.header_written");
        let data = dir.create_file(stream)?;
        cube_fault::point("segment.data_created");
        data.set_len(0).map_err(|e| dir.error("cannot truncate the log file", stream, e))?;
        Ok(Segment::new(header, data, index, gap))
    }

    /// Begins a segment that is in memory, and in no directory.
    pub(super) fn begin_in_memory(header: SegmentHeader) -> io::Result<Segment> {
        let file = || memfd_create(c"cube-log", MFdFlags::MFD_CLOEXEC).map(File::from);
        let index = file()?;
        write_beginning(&index, header, None)?;
        Ok(Segment::new(header, file()?, index, None))
    }

    fn new(header: SegmentHeader, data: File, index: File, gap: Option<Record>) -> Segment {
        let index_len = (HEADER_LEN + gap.map_or(0, |_| RECORD_LEN)) as u64;
        Segment { header, data: Arc::new(data), index, data_len: 0, index_len, last: gap, owed: None }
    }

    /// Bytes of both files, and of the record that is owed.
    pub(super) fn size(&self) -> u64 {
        self.data_len + self.index_len + if self.owed.is_some() { RECORD_LEN as u64 } else { 0 }
    }

    /// Whether neither a byte nor a record is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.data_len == 0 && self.last.is_none()
    }

    /// Replaces the header of an empty segment.
    pub(super) fn rewrite_header(&mut self, header: SegmentHeader) -> io::Result<()> {
        self.index.write_all_at(&header.encode(), 0)?;
        self.header = header;
        Ok(())
    }

    /// Writes as much of `parts` as the kernel takes at once, and notes the index record for it, which
    /// [`Segment::settle`] writes. Gives the number of bytes, never 0.
    pub(super) fn write(&mut self, parts: &[IoSlice<'_>], stream_offset: u64, now: u64) -> io::Result<u64> {
        let at = i64::try_from(self.data_len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let written = loop {
            match pwritev(&*self.data, parts, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => break n as u64,
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        if self.record_due(now) {
            self.owe(Record {
                kind: RecordKind::Write,
                stream_offset,
                file_offset: self.data_len,
                time_ns: now,
            });
        }
        self.data_len += written;
        cube_fault::point("log.data_written");
        Ok(written)
    }

    fn record_due(&self, now: u64) -> bool {
        self.last.is_none_or(|last| {
            self.data_len - last.file_offset >= RECORD_BYTES || now.abs_diff(last.time_ns) >= RECORD_NS
        })
    }

    /// Notes a record that [`Segment::settle`] writes. None may be owed already.
    pub(super) fn owe(&mut self, record: Record) {
        debug_assert!(self.owed.is_none());
        self.last = Some(record);
        self.owed = Some(record);
    }

    /// Writes the record that is owed, if any.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        if let Some(record) = self.owed {
            self.index.write_all_at(&record.encode(), self.index_len)?;
            self.index_len += RECORD_LEN as u64;
            self.owed = None;
            cube_fault::point("log.index_written");
        }
        Ok(())
    }
}
