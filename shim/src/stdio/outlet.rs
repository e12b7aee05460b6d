//! Where output goes beside the log: a FIFO, a file, or the pipe of a log program.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    fifo::{Offer, PipeWriter},
    phase::{Phases, READER_PATIENCE},
    sink::Halted,
    status::{Awaited, Counters},
    uri::Target,
};

/// How often a file that cannot be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// One destination of one stream.
#[derive(Debug)]
pub(super) enum Outlet {
    /// A FIFO, or the pipe of a log program.
    Pipe(PipeWriter),
    /// A file that is appended to.
    File {
        /// Opened with O_APPEND.
        file: Arc<File>,
        /// For messages.
        path: PathBuf,
        /// Whether the trouble it has was reported.
        warned: bool,
    },
}

/// Why an outlet takes nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// The log program has closed its end, for good.
    Gone,
    /// Nobody reads the FIFO, and the process is being deleted.
    Unread,
    /// No progress within the time that was left after the end of the process was wanted.
    Slow,
    /// Not for good: who delivers must not wait.
    Halted,
}

/// What the one who delivers may have to tell others while he waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// For a reader that is attached.
    Reader,
    /// For anybody to read.
    Nobody,
    /// For a disk.
    Disk,
}

impl Outlet {
    /// What `target` names. `None` for nothing, and for a log program, whose pipe comes with its start.
    pub(super) fn open(target: &Target) -> io::Result<Option<Outlet>> {
        match target {
            Target::Null | Target::Program(_) => Ok(None),
            Target::Path(path) => Outlet::open_path(path).map(Some),
            Target::File(path) => Outlet::open_file(path).map(Some),
        }
    }

    /// A path as containerd gives it: a FIFO, or an existing file to append to.
    fn open_path(path: &Path) -> io::Result<Outlet> {
        if std::fs::metadata(path)?.file_type().is_fifo() {
            return Ok(Outlet::Pipe(PipeWriter::open(path)?));
        }
        let file =
            OpenOptions::new().append(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open(path)?;
        Ok(Outlet::File { file: Arc::new(file), path: path.into(), warned: false })
    }

    /// `file://`: appended to, created with mode 0600 and its parents if it does not exist.
    fn open_file(path: &Path) -> io::Result<Outlet> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOCTTY)
            .open(path)?;
        Ok(Outlet::File { file: Arc::new(file), path: path.into(), warned: false })
    }

    /// Delivers the beginning of `bytes`, waiting as long as `phases` and `halted` allow: for a reader that is
    /// attached without limit, until the end of the process is wanted. Calls `waiting` each time before it
    /// waits. Gives the number of bytes taken, at least one, which it has counted.
    ///
    /// Not cancel safe: a file may have taken bytes that nobody is told of.
    pub(super) async fn deliver(
        &mut self,
        bytes: &Bytes,
        phases: &mut Phases,
        halted: &mut Halted,
        counters: &Counters,
        mut waiting: impl FnMut(Waiting),
    ) -> io::Result<Result<usize, Closed>> {
        let (mut since, mut waited, mut exited) = (Instant::now(), None, phases.have_exited());
        loop {
            let state = match self.offer(bytes).await? {
                Offer::Taken(n) => {
                    counters.write(n as u64);
                    return Ok(Ok(n));
                }
                Offer::NoReader if !self.may_return() => return Ok(Err(Closed::Gone)),
                Offer::NoReader => Waiting::Nobody,
                Offer::Full if matches!(self, Outlet::File { .. }) => Waiting::Disk,
                Offer::Full => Waiting::Reader,
            };
            // Who has come back may not have been noticed yet: there is another look at the exit.
            counters.wait_on(if exited {
                self.awaited(state)
            } else {
                self.awaited(state).at_least_a_moment()
            });
            waiting(state);
            if waited.replace(state).is_some_and(|before| before != state) {
                since = Instant::now();
            }
            let (mut exit, mut also, mut over) = (phases.clone(), phases.clone(), phases.clone());
            tokio::select! {
                ready = self.ready(state) => ready?,
                () = over.exited(), if !exited => exited = true,
                () = phases.overdue(since, READER_PATIENCE), if state == Waiting::Reader => {
                    return Ok(Err(Closed::Slow));
                }
                () = exit.exhausted(since, READER_PATIENCE), if state != Waiting::Reader => {
                    return Ok(Err(if state == Waiting::Nobody { Closed::Unread } else { Closed::Slow }));
                }
                () = also.finishing(), if state == Waiting::Nobody => return Ok(Err(Closed::Unread)),
                () = halted.set() => return Ok(Err(Closed::Halted)),
            }
        }
    }

    /// What an exit waits for while nothing is offered.
    pub(super) fn attended(&mut self) -> Awaited {
        let state = match self {
            Outlet::File { .. } => Waiting::Disk,
            // One that cannot be asked is found out with the next offer.
            Outlet::Pipe(pipe) => match pipe.is_read() {
                Ok(false) => Waiting::Nobody,
                // It has nothing to take.
                Ok(true) | Err(_) => return Awaited::Guest,
            },
        };
        self.awaited(state)
    }

    /// What an exit waits for, while `state` is waited for here.
    fn awaited(&self, state: Waiting) -> Awaited {
        match (self, state) {
            (_, Waiting::Reader) => Awaited::Reader,
            // A reader that has gone may come back, and has to say so before.
            (Outlet::Pipe(pipe), Waiting::Nobody) if pipe.was_read() => Awaited::Nothing,
            (_, Waiting::Nobody | Waiting::Disk) => Awaited::Moment,
        }
    }

    /// Waits until a reader that is there has taken the last bytes, or takes nothing for `patience`: what
    /// is in a pipe is lost to a client that closes its end. Cancel safe.
    pub(super) async fn emptied(&mut self, patience: Duration) {
        if let Outlet::Pipe(pipe) = self
            && let Err(error) = pipe.emptied(patience).await
        {
            tracing::debug!(%error, "cannot tell whether output was read");
        }
    }

    fn may_return(&self) -> bool {
        match self {
            Outlet::Pipe(pipe) => pipe.may_return(),
            Outlet::File { .. } => true,
        }
    }

    async fn offer(&mut self, bytes: &Bytes) -> io::Result<Offer> {
        let (file, path, warned) = match self {
            Outlet::Pipe(pipe) => return pipe.offer(bytes),
            Outlet::File { file, path, warned } => (file, path, warned),
        };
        let (file, bytes) = (file.clone(), bytes.clone());
        // A disk can be stuck for any time: not on the thread that all streams share.
        let written = tokio::task::spawn_blocking(move || (&*file).write(&bytes)).await;
        match written.unwrap_or_else(|e| Err(io::Error::other(e))) {
            Ok(n) if n > 0 => {
                *warned = false;
                Ok(Offer::Taken(n))
            }
            Ok(_) => Ok(Offer::Full),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                Ok(Offer::Full)
            }
            Err(e) => {
                if !std::mem::replace(warned, true) {
                    tracing::warn!(path = %path.display(), error = %e, "cannot write output, trying again each second");
                }
                Ok(Offer::Full)
            }
        }
    }

    async fn ready(&mut self, state: Waiting) -> io::Result<()> {
        match (self, state) {
            (Outlet::Pipe(pipe), Waiting::Reader) => pipe.drained().await,
            (Outlet::Pipe(pipe), Waiting::Nobody | Waiting::Disk) => pipe.reader().await,
            (Outlet::File { .. }, _) => {
                tokio::time::sleep(RETRY).await;
                Ok(())
            }
        }
    }
}
