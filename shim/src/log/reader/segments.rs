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

    fn look_at_length(&mut self) -> Result<(), ReadError> {
        let metadata = self.data.metadata().map_err(|e| ReadError::io("cannot examine", &self.path, e))?;
        self.len = metadata.len();
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
            Some(last) if Some(last.inode) == live_inode => last.look_at_length()?,
            _ => return self.open_newer(dir),
        }
        // The writer may have made its data file before its index.
        if self.list.last().is_some_and(|last| last.index.is_none()) {
            let index = self.open_index(dir, &format!("{}.idx", self.stream.file_name()))?;
            if let Some(last) = self.list.last_mut() {
                last.index = index.filter(|index| index.header().number == last.number);
            }
        }
        Ok(())
    }

    /// Appends the segments after the last one held.
    ///
    /// The live file is opened before the closed ones are listed: if it is rotated in between, it is
    /// among them, known by its inode. Lengths are taken last, when all but the newest are final.
    fn open_newer(&mut self, dir: &Dir) -> Result<(), ReadError> {
        let name = self.stream.file_name();
        let live = optional(dir.open_file(name))?;
        let live_index = self.open_index(dir, &format!("{name}.idx"))?;

        let mut closed = Vec::new();
        for number in self.closed_numbers(dir)? {
            // The oldest segments may be removed at any time.
            if let Some(data) = optional(dir.open_file(&format!("{name}.{number}")))? {
                closed.push((number, inode(&data, dir.path())?, data));
            }
        }
        let newest_closed = closed.last().map_or(0, |(number, ..)| *number);
        let mut held = 0;
        if let Some(last) = self.list.last_mut() {
            last.look_at_length()?;
            held = closed.iter().find(|c| c.1 == last.inode).map_or(last.number, |c| c.0);
            last.number = held;
        }
        let mut found = Vec::new();
        for (number, inode, data) in closed {
            if number > held {
                let index = self.open_index(dir, &format!("{name}.{number}.idx"))?;
                let index = index.filter(|index| index.header().number == number);
                let path = dir.path().join(format!("{name}.{number}"));
                found.push(Segment { number, inode, path, data, index, len: 0 });
            }
        }
        if let Some(data) = live {
            let path = dir.path().join(name);
            let inode = inode(&data, &path)?;
            let is_held = self.list.last().is_some_and(|last| last.inode == inode);
            if !is_held && found.iter().all(|segment| segment.inode != inode) {
                // An index of a number that is closed already is one that rotation has yet to rename.
                let index = live_index.filter(|index| index.header().number > newest_closed.max(held));
                let number = index.as_ref().map_or(newest_closed.max(held) + 1, |i| i.header().number);
                found.push(Segment { number, inode, path, data, index, len: 0 });
            }
        }
        for mut segment in found {
            segment.look_at_length()?;
            self.list.push(segment);
        }
        Ok(())
    }

    fn open_index(&self, dir: &Dir, name: &str) -> Result<Option<Index>, ReadError> {
        Ok(optional(dir.open_file(name))?.and_then(Index::open))
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
