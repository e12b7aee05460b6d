//! The segments of one stream, in order.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, time::SystemTime};

use super::{Dir, Index, ReadError, Stream, open::inode};

/// A segment that is held open: rotation may rename or remove it, its bytes stay readable.
#[derive(Debug)]
pub struct Segment {
    number: u64,
    inode: u64,
    path: PathBuf,
    data: File,
    index: Option<Index>,
    len: u64,
}

impl Segment {
    /// Bytes that it had when it was last looked at.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it had no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its index, unless that is missing or damaged at its beginning.
    pub fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// Path that it was opened by, for messages.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Time of its last write, if the file system knows it.
    pub fn modified(&self) -> Option<SystemTime> {
        self.data.metadata().and_then(|m| m.modified()).ok()
    }

    /// Reads what is at `offset` into `buffer`; 0 at the end of the file.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, ReadError> {
        loop {
            match self.data.read_at(buffer, offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map_err(|e| ReadError::io("cannot read", &self.path, e)),
            }
        }
    }

    fn new(number: u64, path: PathBuf, data: File) -> Result<Segment, ReadError> {
        let inode = inode(&data, &path)?;
        Ok(Segment { number, inode, path, data, index: None, len: 0 })
    }

    /// Takes its length, and its index or the index's header anew: an index may be renamed before its
    /// data file, and its header is completed when the stream's epoch becomes known.
    fn look_again(&mut self, dir: &Dir, stream: Stream) -> Result<(), ReadError> {
        let metadata = self.data.metadata().map_err(|e| ReadError::io("cannot examine", &self.path, e))?;
        self.len = metadata.len();
        if let Some(index) = &mut self.index {
            index.read_header_again();
            return Ok(());
        }
        let name = stream.file_name();
        for file in [format!("{name}.{}.idx", self.number), format!("{name}.idx")] {
            let index = optional(dir.open_file(&file))?.and_then(Index::open);
            self.index = index.filter(|index| index.header().number == self.number);
            if self.index.is_some() {
                break;
            }
        }
        Ok(())
    }
}

/// A place in a stream's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position {
    /// Index into [`Segments::list`].
    pub segment: usize,
    /// Offset in the segment's file.
    pub offset: u64,
}

/// What there was of one stream when it was last looked at.
#[derive(Debug)]
pub struct Segments {
    stream: Stream,
    list: Vec<Segment>,
}

impl Segments {
    /// Opens every segment of `stream` in `dir`. A stream without files has no segments.
    pub fn open(dir: &Dir, stream: Stream) -> Result<Segments, ReadError> {
        let mut segments = Segments { stream, list: Vec::new() };
        segments.open_newer(dir)?;
        Ok(segments)
    }

    /// Oldest first.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// The first byte of what is there.
    pub fn start(&self) -> Position {
        Position::default()
    }

    /// Behind the last byte of what was there.
    pub fn end(&self) -> Position {
        match self.list.last() {
            Some(last) => Position { segment: self.list.len() - 1, offset: last.len },
            None => Position::default(),
        }
    }

    /// A segment and its index, if both exist.
    pub(super) fn with_index(&self, segment: usize) -> Option<(&Segment, &Index)> {
        let segment = self.list.get(segment)?;
        Some((segment, segment.index()?))
    }

    /// Looks again: at how long the last segment is now, and for newer ones.
    pub fn refresh(&mut self, dir: &Dir) -> Result<(), ReadError> {
        let live = optional(dir.open_file(self.stream.file_name()))?;
        let live_inode = live.map(|file| inode(&file, dir.path())).transpose()?;
        match self.list.last_mut() {
            // Nothing newer exists while the last segment still has the name of the live one.
            Some(last) if Some(last.inode) == live_inode => last.look_again(dir, self.stream),
            _ => self.open_newer(dir),
        }
    }

    /// Appends the segments after the last one held.
    ///
    /// The live file is opened before the closed ones are listed: if it is rotated in between, it is
    /// among them, known by its inode. Lengths are taken last, when all but the newest are final.
    fn open_newer(&mut self, dir: &Dir) -> Result<(), ReadError> {
        let name = self.stream.file_name();
        let live = optional(dir.open_file(name))?;
        let live_index = optional(dir.open_file(&format!("{name}.idx")))?.and_then(Index::open);

        let mut found = Vec::new();
        for number in self.closed_numbers(dir)? {
            let file = format!("{name}.{number}");
            // The oldest segments may be removed at any time.
            if let Some(data) = optional(dir.open_file(&file))? {
                found.push(Segment::new(number, dir.path().join(file), data)?);
            }
        }
        let newest = found.last().map_or(0, |segment| segment.number);
        if let Some(data) = live {
            let path = dir.path().join(name);
            let mut segment = Segment::new(newest + 1, path, data)?;
            if found.iter().all(|closed| closed.inode != segment.inode) {
                // An index of a closed number is one whose segment has just been closed.
                let number = live_index.map_or(0, |index| index.header().number);
                segment.number = segment.number.max(number);
                found.push(segment);
            }
        }
        if let Some(last) = self.list.last_mut() {
            if let Some(same) = found.iter().find(|segment| segment.inode == last.inode) {
                last.number = same.number;
            }
            last.look_again(dir, self.stream)?;
        }
        let held = self.list.last().map(|last| (last.number, last.inode));
        for mut segment in found {
            if held.is_none_or(|(number, inode)| segment.number > number && segment.inode != inode) {
                segment.look_again(dir, self.stream)?;
                self.list.push(segment);
            }
        }
        Ok(())
    }

    /// Numbers of the closed segments, in order.
    fn closed_numbers(&self, dir: &Dir) -> Result<Vec<u64>, ReadError> {
        let name = self.stream.file_name();
        let number = |file: &str| {
            let digits = file.strip_prefix(name)?.strip_prefix('.')?;
            digits.parse().ok().filter(|number: &u64| number.to_string() == digits)
        };
        let mut numbers: Vec<u64> = dir.names()?.iter().filter_map(|file| number(file)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }
}

/// `None` for a file that does not exist.
fn optional(opened: Result<File, ReadError>) -> Result<Option<File>, ReadError> {
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}
