//! The segments of one stream, in order.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    time::SystemTime,
};

use super::{Dir, Index, ReadError, Stream, open::inode};
use crate::log::segment::closed_number;

/// Attempts to open the live segment, each foiled by a rotation. Without it, what is read is an exact
/// prefix, and the next look goes on from there.
const ATTEMPTS: u32 = 100;

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

    /// Whether its file has no name any more.
    fn is_removed(&self) -> Result<bool, ReadError> {
        let metadata = self.data.metadata().map_err(|e| ReadError::io("cannot examine", &self.path, e))?;
        Ok(metadata.nlink() == 0)
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
        let (closed, live) = (format!("{name}.{}.idx", self.number), format!("{name}.idx"));
        // Once more under its closed name: it may be renamed between the first two looks.
        for file in [&closed, &live, &closed] {
            let index = optional(dir.open_file(file))?.and_then(Index::open);
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

    /// Whether the log in `dir`, where this one was before somebody removed or renamed its directory, goes on with
    /// this one; `None` if it has nothing of the stream yet.
    pub(super) fn goes_on_in(&self, dir: &Dir) -> Result<Option<bool>, ReadError> {
        let index =
            optional(dir.open_file(&format!("{}.idx", self.stream.file_name())))?.and_then(Index::open);
        let (Some(index), Some(last)) = (index, self.list.last()) else { return Ok(None) };
        // Numbers only grow, and a log of another container begins with 1.
        let epochs = [last.index(), Some(&index)].map(|index| index.map_or(0, |index| index.header().epoch));
        let is_same = epochs[0] == epochs[1] || epochs.contains(&0);
        Ok(Some(is_same && index.header().number > last.number))
    }

    /// Closes the segments before number `segment` of the list, which becomes the first.
    pub(super) fn forget_before(&mut self, segment: usize) {
        self.list.drain(..segment.min(self.list.len()));
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
    /// They are opened by number, one after the other. A listing is asked only where the next number
    /// does not exist, and believed only about files that had their names before it began: readdir(3)
    /// may leave out files that are renamed meanwhile.
    fn open_newer(&mut self, dir: &Dir) -> Result<(), ReadError> {
        let mut next = match self.list.last_mut() {
            Some(last) => {
                last.look_again(dir, self.stream)?;
                last.number + 1
            }
            None => self.closed_numbers(dir)?.first().copied().unwrap_or(1),
        };
        let mut closed_up_to = 0;
        let mut attempts = 0;
        while attempts < ATTEMPTS {
            if let Some(closed) = self.open_closed(dir, next)? {
                self.append(dir, closed)?;
                next += 1;
                continue;
            }
            let newer = self.closed_numbers(dir)?.into_iter().filter(|number| *number >= next);
            match (newer.clone().min(), newer.max()) {
                // The next number was closed before the listing began, so it has been removed.
                (Some(oldest), _) if next <= closed_up_to => next = oldest,
                // It was closed by the end of the listing: it may be there now.
                (_, Some(newest)) => closed_up_to = newest,
                _ => match self.open_live(dir, next)? {
                    Live::Segment(live) => return self.append(dir, live),
                    Live::None => return Ok(()),
                    Live::Rotated => attempts += 1,
                },
            }
        }
        Ok(())
    }

    fn open_closed(&self, dir: &Dir, number: u64) -> Result<Option<Segment>, ReadError> {
        let file = format!("{}.{number}", self.stream.file_name());
        let Some(data) = optional(dir.open_file(&file))? else { return Ok(None) };
        Segment::new(number, dir.path().join(file), data).map(Some)
    }

    /// Opens the live segment, which is number `next` if no closed one has that number or a later one.
    fn open_live(&self, dir: &Dir, next: u64) -> Result<Live, ReadError> {
        let name = self.stream.file_name();
        let Some(data) = optional(dir.open_file(name))? else { return Ok(Live::None) };
        let mut live = Segment::new(next, dir.path().join(name), data)?;
        // Without closed segments in between the index knows better: somebody has removed them.
        let index = optional(dir.open_file(&format!("{name}.idx")))?.and_then(Index::open);
        live.number = index.map_or(next, |index| index.header().number.max(next));
        let now = optional(dir.open_file(name))?.map(|file| inode(&file, dir.path())).transpose()?;
        let is_rotated = now != Some(live.inode) || self.open_closed(dir, next)?.is_some();
        Ok(if is_rotated { Live::Rotated } else { Live::Segment(live) })
    }

    /// Adds a segment behind the last one, unless it is that one under its new name.
    fn append(&mut self, dir: &Dir, mut segment: Segment) -> Result<(), ReadError> {
        match self.list.last_mut() {
            Some(last) if last.inode == segment.inode => last.number = segment.number,
            last => {
                // What was written to it before the rotation.
                if let Some(last) = last {
                    last.look_again(dir, self.stream)?;
                }
                segment.look_again(dir, self.stream)?;
                // Rotation took it away while it was opened, and what is lost could not be told: its bytes
                // are a part of that.
                if segment.index.is_some() || !segment.is_removed()? {
                    self.list.push(segment);
                }
            }
        }
        Ok(())
    }

    /// Numbers of the closed segments, in order.
    fn closed_numbers(&self, dir: &Dir) -> Result<Vec<u64>, ReadError> {
        let name = self.stream.file_name();
        let number = |file: &str| closed_number(file.strip_prefix(name)?.strip_prefix('.')?);
        let mut numbers: Vec<u64> = dir.names()?.iter().filter_map(|file| number(file)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }
}

/// What was found where the live segment should be.
enum Live {
    /// The live segment.
    Segment(Segment),
    /// None exists: a rotation is half done, or the stream has no log.
    None,
    /// It was closed in the meantime.
    Rotated,
}

/// `None` for a file that does not exist.
fn optional(opened: Result<File, ReadError>) -> Result<Option<File>, ReadError> {
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}
