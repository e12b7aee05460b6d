//! Reopens a log whose writer died at any point.
//!
//! The data file is the truth. From the index come the offset at which it begins, the gaps, and the
//! times; what of it is torn, damaged or beyond the data is cut off.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    sync::Arc,
    time::UNIX_EPOCH,
};

use super::{
    dir::{LogDir, LogError},
    format::{HEADER_LEN, RECORD_LEN, Record, RecordKind, SegmentHeader},
    place::Place,
    segment::{Segment, closed_name, closed_number, index_name},
    writer::{Identity, Limits, LogWriter, makes_room},
};

/// Bytes beyond the last record that it may stand for; what follows is indexed anew.
const RECORD_SPAN: u64 = 4096;

/// The valid part of an index.
pub(super) struct Index {
    header: Option<SegmentHeader>,
    last: Option<Record>,
    /// Bytes of header and valid records.
    pub(super) len: u64,
}

impl Index {
    /// Stream offset after `data_len` bytes of the segment, which begins at `first` if the header is
    /// damaged.
    fn end(&self, first: u64, data_len: u64) -> u64 {
        match (&self.last, &self.header) {
            (Some(last), _) => last.stream_offset.saturating_add(data_len.saturating_sub(last.file_offset)),
            (None, Some(header)) => header.first_offset.saturating_add(data_len),
            (None, None) => first.saturating_add(data_len),
        }
    }
}

impl LogWriter {
    /// Reopens the log of `stream` in `dir`, completes a rotation that was cut short, and goes on
    /// after the last byte that is in it. A log that does not exist is begun at offset 0.
    pub fn recover(dir: Arc<LogDir>, stream: &'static str, limits: Limits) -> Result<LogWriter, LogError> {
        complete_rotation(&dir, stream)?;
        let mut writer = LogWriter {
            dir,
            stream,
            limits,
            identity: Identity::default(),
            retained: Arc::default(),
            next_offset: 0,
            next_number: 1,
            current: None,
            goes_back: false,
            place: Place::default(),
        };
        writer.reopen_closed()?;
        // On a disk that is full, what is closed makes room for the index of what is not.
        while let Err(e) = writer.reopen_current() {
            if !(makes_room(&e.source) && writer.drop_closed()?) {
                return Err(e);
            }
        }
        while writer.is_full(0) && writer.drop_closed()? {}
        Ok(writer)
    }

    fn reopen_closed(&mut self) -> Result<(), LogError> {
        for number in Numbers::list(&self.dir, self.stream)?.data {
            let name = closed_name(self.stream, number);
            let data = self.dir.open_file(&name)?;
            let data_len = len(&self.dir, &name, &data)?;
            let index = match self.dir.open_file(&index_name(&name)) {
                Ok(file) => read_index(&file, data_len)
                    .map_err(|e| self.dir.error("cannot read the log index", &index_name(&name), e))?,
                Err(e) if e.source.kind() == io::ErrorKind::NotFound => {
                    Index { header: None, last: None, len: 0 }
                }
                Err(e) => return Err(e),
            };
            self.adopt(&index, data_len);
            self.next_number = number.saturating_add(1);
            self.retained.push(number, Arc::new(data), data_len);
            self.retained.close(number, data_len.saturating_add(index.len));
        }
        Ok(())
    }

    fn reopen_current(&mut self) -> Result<(), LogError> {
        let index_file = self.dir.create_file(&index_name(self.stream))?;
        let data = self.dir.create_file(self.stream)?;
        let data_len = len(&self.dir, self.stream, &data)?;
        let failed = |dir: &LogDir, e| dir.error("cannot read the log index", &index_name(self.stream), e);
        let index = read_index(&index_file, data_len).map_err(|e| failed(&self.dir, e))?;
        let found = index.header.unwrap_or(SegmentHeader {
            number: self.next_number,
            first_offset: self.next_offset,
            timeline: self.identity.timeline,
            epoch: self.identity.epoch,
            created_ns: modified_ns(&data),
        });
        // A number that a closed segment has would cost that segment when this one is closed.
        let header = SegmentHeader { number: found.number.max(self.next_number), ..found };
        let mut segment = Segment {
            header,
            data: Arc::new(data),
            index: index_file,
            data_len,
            index_len: index.len.max(HEADER_LEN as u64),
            last: index.last,
            owed: None,
        };
        mend(&mut segment, index.header != Some(header), self.limits.segment_bytes)
            .map_err(|e| self.dir.error("cannot write the log index", &index_name(self.stream), e))?;
        self.adopt(&index, data_len);
        self.next_number = header.number.saturating_add(1);
        self.retained.push(header.number, segment.data.clone(), data_len);
        self.current = Some(segment);
        Ok(())
    }

    fn adopt(&mut self, index: &Index, data_len: u64) {
        self.next_offset = index.end(self.next_offset, data_len);
        if let Some(header) = index.header {
            self.identity = Identity { timeline: header.timeline, epoch: header.epoch };
        }
    }
}

/// Cuts off what is not valid in the index, and indexes the tail of the data that no record covers, unless the
/// segment would outgrow `limit` by that: it would cost an older one.
fn mend(segment: &mut Segment, wrong_header: bool, limit: u64) -> io::Result<()> {
    segment.index.set_len(segment.index_len)?;
    if wrong_header {
        segment.rewrite_header(segment.header)?;
    }
    let (covered, offset, since) = match segment.last {
        Some(last) => {
            (last.file_offset.saturating_add(RECORD_SPAN), last.stream_offset + RECORD_SPAN, last.time_ns)
        }
        None => (0, segment.header.first_offset, segment.header.created_ns),
    };
    if covered < segment.data_len && segment.size() + RECORD_LEN as u64 <= limit {
        // File times are those of the last tick, milliseconds behind the clock that records are made with;
        // but times in an index never go back.
        let time_ns = modified_ns(&segment.data).max(since);
        segment.owe(Record { kind: RecordKind::Write, stream_offset: offset, file_offset: covered, time_ns });
        segment.settle()?;
    }
    Ok(())
}

/// Numbers that occur in the names of closed segments.
pub(super) struct Numbers {
    pub(super) data: BTreeSet<u64>,
    pub(super) index: BTreeSet<u64>,
    current_data: bool,
    current_index: bool,
}

impl Numbers {
    pub(super) fn list(dir: &LogDir, stream: &str) -> Result<Numbers, LogError> {
        let mut found = Numbers {
            data: BTreeSet::new(),
            index: BTreeSet::new(),
            current_data: false,
            current_index: false,
        };
        for name in dir.names()? {
            match name.strip_prefix(stream) {
                Some("") => found.current_data = true,
                Some(".idx") => found.current_index = true,
                Some(rest) => {
                    let Some(rest) = rest.strip_prefix('.') else { continue };
                    let (number, set) = match rest.strip_suffix(".idx") {
                        Some(number) => (number, &mut found.index),
                        None => (rest, &mut found.data),
                    };
                    set.extend(closed_number(number));
                }
                None => {}
            }
        }
        Ok(found)
    }
}

/// A rotation renames the index, then the data, then makes a new index; dropping a segment removes
/// the data, then the index. An index without data is thus the middle of one or the other.
fn complete_rotation(dir: &LogDir, stream: &str) -> Result<(), LogError> {
    let found = Numbers::list(dir, stream)?;
    let newest_data = found.data.last().copied().unwrap_or(0);
    let without_data: Vec<u64> = found.index.difference(&found.data).copied().collect();
    let is_rotated = |number: u64| number > newest_data && found.current_data && !found.current_index;
    let rotated = without_data.last().copied().filter(|number| is_rotated(*number));
    for number in without_data {
        let closed = closed_name(stream, number);
        if rotated == Some(number) {
            dir.rename(stream, &closed)?;
        } else {
            dir.remove(&index_name(&closed))?;
        }
    }
    Ok(())
}

/// The part of the index that belongs to `data_len` bytes of data.
pub(super) fn read_index(file: &File, data_len: u64) -> io::Result<Index> {
    let mut index = Index { header: None, last: None, len: 0 };
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(0))?;
    let mut header = [0; HEADER_LEN];
    if !read_whole(&mut reader, &mut header)? {
        return Ok(index);
    }
    let Ok(decoded) = SegmentHeader::decode(&header) else { return Ok(index) };
    index.header = Some(decoded);
    index.len = HEADER_LEN as u64;
    let mut bytes = [0; RECORD_LEN];
    while read_whole(&mut reader, &mut bytes)? {
        let Ok(record) = Record::decode(&bytes) else { break };
        let (stream, at) = index.last.map_or((decoded.first_offset, 0), |r| (r.stream_offset, r.file_offset));
        if record.file_offset > data_len || record.file_offset < at || record.stream_offset < stream {
            break;
        }
        index.last = Some(record);
        index.len += RECORD_LEN as u64;
    }
    Ok(index)
}

/// Fills `buffer`; `false` if the file ends before.
fn read_whole(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

fn len(dir: &LogDir, name: &str, file: &File) -> Result<u64, LogError> {
    Ok(file.metadata().map_err(|e| dir.error("cannot stat the log file", name, e))?.len())
}

fn modified_ns(file: &File) -> u64 {
    let modified = file.metadata().and_then(|metadata| metadata.modified()).unwrap_or(UNIX_EPOCH);
    let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
