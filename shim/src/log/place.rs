//! Staying where the log belongs, whatever somebody does there: its directory or files removed, renamed,
//! replaced or truncated.
//!
//! Before each write one fstat(2) tells whether the data file still has a name and its length, so nothing is
//! written to a file that was removed, nor behind the end of one that was truncated. That the names still lead
//! there is looked at every [`LOOK_EVERY`], so at most as much goes to a file that was renamed. What is found
//! wrong ends the segment; the next one goes on at the same stream offset, in a directory that is made again
//! if it must be. What the log has no more is a gap for its readers: between two segments, or, if none is
//! left, at the beginning of the new one.
//!
//! Where that cannot be done (a link in the place of the directory, one that takes no files) the log waits,
//! and after a while is kept in memory, as much of it as a reader in this process needs to get everything. It
//! goes back to the disk as soon as that takes it.

use std::{
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use super::{
    dir::LogError,
    recover::{Numbers, read_index},
    segment::{Segment, closed_name, index_name},
    writer::{LogWriter, Stalled, makes_room},
};

/// Time between looks at names while output comes.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Time between attempts to get a log that is in memory back to the disk.
const RETURN_EVERY: Duration = Duration::from_secs(1);

/// Data and index that a log has in memory.
const MEMORY: u64 = 256 << 10;

/// Where a log is.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// When it was found in order.
    looked: Option<Instant>,
    /// How often its directory had been made again by then.
    renewals: u64,
    /// Bytes that the next segment has to say are lost.
    pub(super) lost: u64,
    /// The log is in memory since.
    memory: Option<Memory>,
}

/// A log that has no place on the disk.
#[derive(Debug)]
struct Memory {
    /// The segment that was being written on the disk.
    left: Option<Segment>,
    /// When its return was last tried, or when it came.
    tried: Option<Instant>,
}

/// What somebody has done to the segment that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    /// Its data file has not its name any more.
    Taken,
    /// Its index has not its name any more.
    IndexTaken,
    /// Its data file has so many bytes left.
    Truncated(u64),
}

impl Stalled {
    /// Whether the log has no place, though the disk may be well.
    pub fn is_misplaced(&self) -> bool {
        matches!(self, Stalled::Disk(e) if !makes_room(&e.source))
    }
}

impl LogWriter {
    /// Makes sure that what is written now is found where the log belongs.
    pub(super) fn keep_place(&mut self) -> Result<(), LogError> {
        if self.is_in_memory() {
            return self.try_to_return();
        }
        let damage = self.current.as_ref().map(|segment| self.file_damage(segment)).transpose()?.flatten();
        let is_due = self.place.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY);
        if damage.is_none() && !is_due && self.place.renewals == self.dir.renewals() {
            return Ok(());
        }
        self.place.looked = None;
        self.dir.renew()?;
        if let Some(segment) = self.current.take() {
            match self.damage(&segment) {
                Ok(None) => self.current = Some(segment),
                Ok(Some(damage)) => {
                    if let Err(e) = self.put_away(&segment, damage) {
                        self.current = Some(segment);
                        return Err(e);
                    }
                    self.begin_elsewhere(Some((&segment, damage)))?;
                }
                Err(e) => {
                    self.current = Some(segment);
                    return Err(e);
                }
            }
        }
        self.place.renewals = self.dir.renewals();
        self.place.looked = Some(Instant::now());
        Ok(())
    }

    /// What can be seen without a look at names.
    fn file_damage(&self, segment: &Segment) -> Result<Option<Damage>, LogError> {
        let failed = |e| self.dir.error("cannot examine the log file", self.stream, e);
        let metadata = segment.data.metadata().map_err(failed)?;
        if metadata.nlink() == 0 {
            return Ok(Some(Damage::Taken));
        }
        if metadata.len() > segment.data_len {
            // None of the stream's: whoever reopens the log would take it for that.
            segment.data.set_len(segment.data_len).map_err(failed)?;
        }
        Ok((metadata.len() < segment.data_len).then_some(Damage::Truncated(metadata.len())))
    }

    fn damage(&self, segment: &Segment) -> Result<Option<Damage>, LogError> {
        if !self.dir.has(self.stream, &segment.data)? {
            return Ok(Some(Damage::Taken));
        }
        match self.file_damage(segment)? {
            None if !self.dir.has(&index_name(self.stream), &segment.index)? => Ok(Some(Damage::IndexTaken)),
            damage => Ok(damage),
        }
    }

    /// Frees the names of the segment that is being written, and keeps what there is of `segment`. May be done
    /// again after an error.
    fn put_away(&self, segment: &Segment, damage: Damage) -> Result<(), LogError> {
        let (data, index) = (self.stream, index_name(self.stream));
        if !self.dir.has(&index, &segment.index)? {
            self.dir.set_aside(&index)?;
        }
        match damage {
            Damage::Taken => {
                if self.dir.has(&index, &segment.index)? {
                    let closed = closed_name(data, segment.header.number);
                    match self.dir.has(&closed, &segment.data)? {
                        true => self.dir.rename(&index, &index_name(&closed))?,
                        // Without its data it says nothing.
                        false => self.dir.remove(&index)?,
                    }
                }
                if !self.dir.has(data, &segment.data)? {
                    self.dir.set_aside(data)?;
                }
                Ok(())
            }
            Damage::Truncated(0) => {
                self.dir.remove(data)?;
                self.dir.remove(&index)
            }
            Damage::Truncated(left) => {
                // The index must not speak of bytes that are gone: what follows would seem to begin there.
                let failed = |e| self.dir.error("cannot write the log index", &index, e);
                let len = read_index(&segment.index, left).map_err(failed)?.len;
                segment.index.set_len(len).map_err(failed)?;
                self.close(segment)
            }
            Damage::IndexTaken => self.close(segment),
        }
    }

    /// Begins a segment after something was lost: `taken`, what is in memory, and all else if the directory has
    /// nothing of the stream any more.
    fn begin_elsewhere(&mut self, taken: Option<(&Segment, Damage)>) -> Result<(), LogError> {
        let found = Numbers::list(&self.dir, self.stream)?;
        let highest = found.data.last().max(found.index.last()).copied().unwrap_or(0);
        self.next_number = self.next_number.max(highest.saturating_add(1));
        let is_kept = |segment: &Segment| {
            // logrotate may have given it the name of one that is closed.
            found.data.iter().any(|number| {
                self.dir.has(&closed_name(self.stream, *number), &segment.data).unwrap_or(false)
            })
        };
        let left = match taken {
            None | Some((_, Damage::IndexTaken)) => u64::MAX,
            Some((segment, Damage::Taken)) => {
                if is_kept(segment) {
                    u64::MAX
                } else {
                    0
                }
            }
            Some((_, Damage::Truncated(left))) => left,
        };
        let number = taken.map(|(segment, _)| segment.header.number);
        let lost = self.retained.lose(number, left, found.data.is_empty());
        // Between two segments readers see it for themselves.
        self.place.lost = if found.data.is_empty() { self.place.lost.saturating_add(lost) } else { 0 };
        self.retained.forget_removed();
        self.begin_segment()?;
        let path = self.dir.path_of(self.stream);
        let what = match taken {
            Some((_, Damage::Truncated(_))) => "somebody has truncated the log file, another was begun",
            Some(_) => "somebody has removed or renamed the log, it was made again",
            None => "the log has a place on the disk again",
        };
        tracing::warn!(path = %path.display(), lost_bytes = lost, offset = self.next_offset, "{what}");
        Ok(())
    }

    /// Whether the log is in memory, for it has no place on the disk.
    pub fn is_in_memory(&self) -> bool {
        self.place.memory.is_some()
    }

    /// Goes on in memory, after an error that [says so](Stalled::is_misplaced). What an attached reader has not
    /// taken is still held for it; the log itself has none of what follows, until the disk takes it again.
    pub fn go_to_memory(&mut self) -> Result<(), Stalled> {
        if !self.is_in_memory() {
            let left = self.current.take();
            self.place.memory = Some(Memory { left, tried: Some(Instant::now()) });
        }
        Ok(self.begin_in_memory()?)
    }

    /// Bytes of data and index at which a segment is closed.
    pub(super) fn segment_bytes(&self) -> u64 {
        if self.is_in_memory() { MEMORY } else { self.limits.segment_bytes }
    }

    pub(super) fn rotate_in_memory(&mut self) -> Result<(), Stalled> {
        if !self.retained.let_go() {
            return Err(Stalled::Reader);
        }
        Ok(self.begin_in_memory()?)
    }

    /// Begins a segment in memory. A reader that has not read the one before may do so for as long as it likes.
    pub(super) fn begin_in_memory(&mut self) -> Result<(), LogError> {
        let header = self.next_header(self.next_offset);
        let segment = Segment::begin_in_memory(header)
            .map_err(|e| self.dir.error("cannot keep in memory the log", self.stream, e))?;
        self.retained.push_in_memory(header.number, segment.data.clone());
        self.current = Some(segment);
        self.next_number += 1;
        self.goes_back = false;
        Ok(())
    }

    /// As if all times had passed.
    #[cfg(test)]
    pub(super) fn look_now(&mut self) {
        self.place.looked = None;
        if let Some(memory) = &mut self.place.memory {
            memory.tried = None;
        }
    }

    /// Goes back to the disk, if it is time to try and the disk takes it.
    fn try_to_return(&mut self) -> Result<(), LogError> {
        let Some(memory) = &mut self.place.memory else { return Ok(()) };
        if memory.tried.is_some_and(|tried| tried.elapsed() < RETURN_EVERY) {
            return Ok(());
        }
        memory.tried = Some(Instant::now());
        // Why it does not was told when it first did not.
        if let Err(e) = self.return_to_disk() {
            tracing::debug!(error = %e, cause = %e.source, "the log stays in memory");
        }
        Ok(())
    }

    fn return_to_disk(&mut self) -> Result<(), LogError> {
        let Some(mut memory) = self.place.memory.take() else { return Ok(()) };
        let in_memory = self.current.take();
        let result = self.begin_after(&mut memory.left);
        if result.is_ok() {
            self.place.renewals = self.dir.renewals();
            self.place.looked = Some(Instant::now());
        } else {
            self.current = in_memory;
            self.place.memory = Some(memory);
        }
        result
    }

    /// Puts the segment away that was being written when the log lost its place, and begins another.
    fn begin_after(&mut self, left: &mut Option<Segment>) -> Result<(), LogError> {
        self.dir.renew()?;
        let mut damage = None;
        if let Some(segment) = left {
            damage = self.damage(segment)?;
            match damage {
                Some(damage) => self.put_away(segment, damage)?,
                None => self.close(segment)?,
            }
        } else {
            self.dir.set_aside(self.stream)?;
        }
        self.begin_elsewhere(left.as_ref().zip(damage))?;
        *left = None;
        Ok(())
    }
}
