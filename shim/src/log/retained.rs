//! What the writer of a log has on disk, as the sinks in the same process see it.
//!
//! The log is the buffer from which a slow FIFO is fed, so writer and feeder have to agree on what
//! may be dropped. They speak in *positions*: bytes written to the log since the first segment that
//! was retained when it was opened, whatever files they are in. Unlike stream offsets they have no gaps.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::Notify, time::timeout};

/// The retained segments of one stream, shared by its writer and a reader in this process.
#[derive(Debug, Default)]
pub struct Retained {
    state: Mutex<State>,
    /// Notified when the reader needs less than before.
    released: Notify,
}

#[derive(Debug, Default)]
struct State {
    segments: VecDeque<Extent>,
    /// The last segment is in memory, and must be read before there is another.
    in_memory: bool,
    /// Bytes that somebody has taken away from the log, or that it could not take.
    lost: u64,
    /// `None` while nobody reads.
    reader: Option<Reader>,
    /// The writer need not wait for anything any more.
    abandoned: bool,
}

impl State {
    /// Whether an attached reader has not read all of what has to go next.
    fn reader_blocks(&self) -> bool {
        let oldest = if self.in_memory { self.segments.back() } else { self.segments.front() };
        let end = oldest.map_or(0, Extent::end);
        self.reader.is_some_and(|reader| reader.position < end)
    }

    fn end(&self) -> u64 {
        self.segments.back().map_or(0, Extent::end)
    }

    /// Whether an attached reader that has moved within `patience` is more than `lead` bytes behind.
    fn ahead(&self, lead: u64, patience: Duration) -> bool {
        !self.abandoned
            && self.reader.is_some_and(|reader| {
                self.end().saturating_sub(reader.position) > lead && reader.moved.elapsed() < patience
            })
    }
}

/// A reader that is attached.
#[derive(Debug, Clone, Copy)]
struct Reader {
    /// It has taken everything below.
    position: u64,
    /// When it last took something, or came.
    moved: Instant,
}

/// A retained segment.
#[derive(Debug)]
struct Extent {
    number: u64,
    start: u64,
    len: u64,
    /// Bytes of data and index, once it is closed.
    size: u64,
    /// `None` if it was in memory, and nobody has wanted it.
    data: Option<Arc<File>>,
    in_memory: bool,
    /// Bytes of it that are counted as lost.
    lost: u64,
}

impl Extent {
    fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// How much of a log is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Segments retained, the one being written included.
    pub segments: usize,
    /// Bytes of data in them.
    pub bytes: u64,
    /// Bytes of data in those that were removed since the log was opened.
    pub rotated_away: u64,
    /// Bytes that the log has not because somebody took its files away, or let it have none.
    pub lost: u64,
}

impl Usage {
    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.rotated_away.saturating_add(self.bytes)
    }
}

/// What [`Retained::read_at`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// So many bytes were read.
    Bytes(usize),
    /// Everything below this position has been rotated away, or was taken away.
    Dropped(u64),
    /// Nothing is there yet.
    End,
}

impl Retained {
    /// Reads what is at `position` into `buffer`. Blocks on the disk.
    pub fn read_at(&self, position: u64, buffer: &mut [u8]) -> io::Result<Found> {
        self.read_with(position, buffer, |file, buffer, at| file.read_at(buffer, at))
    }

    /// Like [`read_at`](Self::read_at), but never waits for the disk: `None` if the page cache has not
    /// what is there, or the file system cannot tell.
    pub fn read_cached(&self, position: u64, buffer: &mut [u8]) -> io::Result<Option<Found>> {
        match self.read_with(position, buffer, read_without_waiting) {
            Ok(found) => Ok(Some(found)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn read_with(
        &self,
        position: u64,
        buffer: &mut [u8],
        read: impl FnOnce(&File, &mut [u8], u64) -> io::Result<usize>,
    ) -> io::Result<Found> {
        let (data, at, end) = {
            let state = self.lock();
            let Some(oldest) = state.segments.front() else { return Ok(Found::End) };
            if position < oldest.start {
                return Ok(Found::Dropped(oldest.start));
            }
            let Some(extent) = state.segments.iter().find(|extent| position < extent.end()) else {
                return Ok(Found::End);
            };
            let Some(data) = extent.data.clone() else { return Ok(Found::Dropped(extent.end())) };
            (data, position - extent.start, extent.end())
        };
        let len = usize::try_from(end - position).unwrap_or(usize::MAX).min(buffer.len());
        match read(&data, &mut buffer[..len], at)? {
            // Somebody has truncated the file. The writer never adds to such a one.
            0 => Ok(Found::Dropped(end)),
            n => Ok(Found::Bytes(n)),
        }
    }

    /// Position after the last byte.
    pub fn end(&self) -> u64 {
        self.lock().end()
    }

    /// How much is kept at the moment.
    pub fn usage(&self) -> Usage {
        let state = self.lock();
        let (start, end) = (state.segments.front().map_or(0, |oldest| oldest.start), state.end());
        Usage {
            segments: state.segments.len(),
            bytes: end.saturating_sub(start),
            rotated_away: start,
            lost: state.lost,
        }
    }

    /// A reader is attached and has taken everything below `position`: the writer keeps the rest.
    pub fn hold(&self, position: u64) {
        let mut state = self.lock();
        if state.reader.is_none_or(|reader| reader.position != position) {
            state.reader = Some(Reader { position, moved: Instant::now() });
        }
        drop(state);
        self.released.notify_waiters();
    }

    /// Nobody reads: the writer may drop any closed segment.
    pub fn release(&self) {
        self.lock().reader = None;
        self.released.notify_waiters();
    }

    /// Ends every wait of the writer, now and later.
    pub fn abandon(&self) {
        self.lock().abandoned = true;
        self.released.notify_waiters();
    }

    /// Waits as long as an attached reader is more than `lead` bytes behind and takes something at least
    /// every `patience`.
    pub(crate) async fn pace(&self, lead: u64, patience: Duration) {
        while self.lock().ahead(lead, patience) {
            let _ = timeout(patience, self.until(|state| !state.ahead(lead, patience))).await;
        }
    }

    /// Waits at most for `limit`, or until the reader no longer needs the oldest segment; if only
    /// `for_reader`, returns at once when it does not. Whether the writer should go on trying.
    pub(crate) async fn wait(&self, limit: Duration, for_reader: bool) -> bool {
        let blocked = for_reader || self.lock().reader_blocks();
        let _ = timeout(limit, self.until(|s| s.abandoned || (blocked && !s.reader_blocks()))).await;
        !self.lock().abandoned
    }

    async fn until(&self, condition: impl Fn(&State) -> bool) {
        loop {
            // Made before the look at the state, so that it resolves for any change after it.
            let released = self.released.notified();
            if condition(&self.lock()) {
                return;
            }
            released.await;
        }
    }

    /// Appends a segment that holds `len` bytes already.
    pub(super) fn push(&self, number: u64, data: Arc<File>, len: u64) {
        let mut state = self.lock();
        let start = state.end();
        state.in_memory = false;
        let data = Some(data);
        state.segments.push_back(Extent { number, start, len, size: 0, data, in_memory: false, lost: 0 });
    }

    /// Appends a segment that is in memory.
    pub(super) fn push_in_memory(&self, number: u64, data: Arc<File>) {
        self.push(number, data, 0);
        let mut state = self.lock();
        state.in_memory = true;
        if let Some(last) = state.segments.back_mut() {
            last.in_memory = true;
        }
    }

    /// Lets the bytes of the last segment, which is in memory, go, unless an attached reader needs them.
    /// Whether they went.
    pub(super) fn let_go(&self) -> bool {
        let mut state = self.lock();
        if state.reader_blocks() && !state.abandoned {
            return false;
        }
        let Some(mut last) = state.segments.pop_back() else { return true };
        last.data = None;
        match state.segments.back_mut() {
            Some(before) if before.data.is_none() => {
                before.len += last.len;
                before.lost += last.lost;
            }
            _ => state.segments.push_back(last),
        }
        true
    }

    /// Segment `number` is closed, with `size` bytes of data and index on the disk.
    pub(super) fn close(&self, number: u64, size: u64) {
        if let Some(closed) = self.lock().segments.iter_mut().rfind(|extent| extent.number == number) {
            closed.size = size;
        }
    }

    /// Counts as lost what was in memory, segment `taken` but for `left` bytes, and, if `all`, all else. The
    /// number of bytes that were not counted before.
    pub(super) fn lose(&self, taken: Option<u64>, left: u64, all: bool) -> u64 {
        let mut state = self.lock();
        let mut bytes = 0u64;
        for extent in &mut state.segments {
            let is_taken = Some(extent.number) == taken;
            if extent.in_memory || is_taken || all {
                let lost = extent.len.saturating_sub(if is_taken { left } else { 0 });
                bytes += lost.saturating_sub(extent.lost);
                extent.lost = extent.lost.max(lost);
            }
        }
        state.lost = state.lost.saturating_add(bytes);
        bytes
    }

    /// Forgets the oldest segments that have no file in any directory any more, as far as no attached reader
    /// needs them: they take space as long as they are open.
    pub(super) fn forget_removed(&self) {
        use std::os::unix::fs::MetadataExt;
        let is_removed = |extent: &Extent| match &extent.data {
            Some(data) => data.metadata().is_ok_and(|metadata| metadata.nlink() == 0),
            None => true,
        };
        loop {
            let mut state = self.lock();
            if state.reader_blocks() || !state.segments.front().is_some_and(is_removed) {
                return;
            }
            // The last one says where the log ends.
            if state.segments.len() < 2 {
                return;
            }
            state.segments.pop_front();
        }
    }

    /// Bytes of data and index of the closed segments.
    pub(super) fn closed_size(&self) -> u64 {
        self.lock().segments.iter().map(|extent| extent.size).fold(0, u64::saturating_add)
    }

    /// The last segment has grown.
    pub(super) fn grow(&self, by: u64) {
        if let Some(last) = self.lock().segments.back_mut() {
            last.len += by;
        }
    }

    /// Segments retained.
    pub(super) fn count(&self) -> usize {
        self.lock().segments.len()
    }

    /// Number of the oldest segment if an attached reader does not need it.
    pub(super) fn droppable(&self) -> Option<u64> {
        let state = self.lock();
        let oldest = state.segments.front()?;
        (!state.reader_blocks() || state.abandoned).then_some(oldest.number)
    }

    /// Forgets the oldest segment.
    pub(super) fn pop(&self) {
        self.lock().segments.pop_front();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// preadv2(2) with RWF_NOWAIT: EAGAIN where it would wait, EOPNOTSUPP where it cannot know.
fn read_without_waiting(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let at = libc::off_t::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let into = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the iovec is that of a buffer that lives and that nobody else uses meanwhile.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const into, 1, at, libc::RWF_NOWAIT) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}
