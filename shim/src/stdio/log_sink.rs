//! The thread that takes one stream from the guest into its log.
//!
//! write(2) to the page cache takes microseconds until the disk is stuck, and then any time at all. So
//! each log has a thread of its own: a disk that hangs holds up this stream, and neither the others nor
//! a call of containerd. It is no blocking task of tokio, for whose end a runtime would wait.
//!
//! The relay runs on the same thread: to hand each chunk to another, and its acknowledgement back, takes
//! two wake-ups, which cost more than what they are about.

use std::{
    fmt,
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::{
    join, runtime,
    sync::{mpsc, oneshot, watch},
};

use super::{
    StdioError, error_chain,
    phase::READER_PATIENCE,
    sink::{Chunk, Halted, Life, Position, SinkEnd, Turn},
    status::{Counters, Obstacle},
};
use crate::log::{
    retained::Retained,
    writer::{LogWriter, Stalled},
};

/// How often a log that cannot be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How long output waits for a log that has no place: no directory, and none can be made, or one that takes no
/// files. Then it goes on without. What is wrong with the disk itself is waited for.
const PLACE_PATIENCE: Duration = Duration::from_secs(10);

/// How far the log may run ahead of a reader that is at work; the capacity of the process's own pipe.
/// A reader far behind would lose the rest when the process ends: clients of containerd 1.6 close their
/// end of the FIFO as soon as they hear of the exit.
const LEAD: u64 = 1 << 20;

/// The thread calls the kernel and a short stack of ours.
const STACK: usize = 256 << 10;

/// What fills the log.
type Relaying = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A thread that waits for what it is to run. It ends with the stream, when [`Retained::abandon`] is
/// called, or when this is dropped.
pub(super) struct LogThread {
    relaying: oneshot::Sender<Relaying>,
    ended: oneshot::Receiver<()>,
}

impl fmt::Debug for LogThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogThread").finish_non_exhaustive()
    }
}

impl LogThread {
    /// Starts the thread.
    pub(super) fn spawn(
        writer: LogWriter,
        name: &'static str,
        end: SinkEnd,
        life: watch::Sender<Life>,
        counters: Arc<Counters>,
    ) -> io::Result<LogThread> {
        let log = Log::new(writer, name, end, life, counters);
        let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (relaying, given) = oneshot::channel::<Relaying>();
        let (over, ended) = oneshot::channel();
        let work = async move {
            if let Ok(relaying) = given.await {
                join!(relaying, log.run());
            }
        };
        thread::Builder::new().name(format!("log-{name}")).stack_size(STACK).spawn(move || {
            runtime.block_on(work);
            // Nobody may be left to hear it.
            let _ = over.send(());
        })?;
        Ok(LogThread { relaying, ended })
    }

    /// Runs `relaying`, which feeds the log, on the thread; returns when both have ended. It goes on if
    /// this is cancelled.
    pub(super) async fn run(self, relaying: impl Future<Output = ()> + Send + 'static) {
        if self.relaying.send(Box::pin(relaying)).is_ok() {
            // An error is a thread that has panicked, and has said so.
            let _ = self.ended.await;
        }
    }
}

/// What takes a stream into its log, whatever thread it is on.
pub(super) struct Log {
    writer: LogWriter,
    name: &'static str,
    retained: Arc<Retained>,
    chunks: mpsc::Receiver<Chunk>,
    life: watch::Sender<Life>,
    safe: watch::Sender<u64>,
    halted: Halted,
    counters: Arc<Counters>,
    /// Whether the trouble that the log has with its disk was reported.
    told: bool,
}

/// What became of work that may have to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Entirely,
    /// Only in part: the sink is halted.
    Halted,
    /// Only in part: the log was abandoned.
    Abandoned,
}

impl Log {
    pub(super) fn new(
        writer: LogWriter,
        name: &'static str,
        end: SinkEnd,
        life: watch::Sender<Life>,
        counters: Arc<Counters>,
    ) -> Log {
        let retained = writer.retained();
        let SinkEnd { chunks, safe, halted } = end;
        Log { writer, name, retained, chunks, life, safe, halted, counters, told: false }
    }

    /// Runs until the stream has ended, or the log was abandoned.
    pub(super) async fn run(mut self) {
        // After a chunk that was not taken entirely nothing may follow.
        let mut dropping = false;
        while let Some(chunk) = self.chunks.recv().await {
            let done = match chunk {
                Chunk::Rest(reply) => {
                    dropping = false;
                    // The relay may have been abandoned meanwhile.
                    let _ = reply.send(self.position());
                    continue;
                }
                Chunk::Rewind(turn, reply) => {
                    dropping = false;
                    let _ = reply.send(self.rewind(turn));
                    continue;
                }
                Chunk::End => {
                    self.life.send_modify(|life| life.ended = true);
                    continue;
                }
                _ if dropping => continue,
                Chunk::Identity(identity) => self.insist(|writer| writer.identify(identity)).await,
                Chunk::Gap(offset) => self.gap(offset).await,
                Chunk::Data(parts) => {
                    tokio::select! {
                        () = self.retained.pace(LEAD, READER_PATIENCE) => {}
                        () = self.halted.set() => {}
                    }
                    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
                    let mut rest = &mut slices[..];
                    let before = self.writer.next_offset();
                    let done = self.insist(|writer| writer.append(&mut rest)).await;
                    self.counters.stored.add(self.writer.next_offset() - before);
                    done
                }
            };
            match done {
                Done::Entirely => drop(self.safe.send_replace(self.writer.next_offset())),
                Done::Halted => dropping = true,
                Done::Abandoned => return,
            }
        }
    }

    fn position(&mut self) -> Position {
        let next = self.writer.next_offset();
        Position { safe: self.writer.safe_offset().unwrap_or(*self.safe.borrow()), next }
    }

    /// Does not wait: what the disk does not take now it takes before the next byte.
    fn rewind(&mut self, Turn { to, timeline }: Turn) -> Result<(), StdioError> {
        let result = self.writer.rewind(to, timeline);
        self.safe.send_replace(to);
        self.life.send_modify(|life| *life = Life { rewinds: life.rewinds + 1, ended: false });
        match result {
            Ok(()) => Ok(()),
            Err(Stalled::Disk(e)) => Err(e.into()),
            // A log that goes back waits for no reader.
            Err(Stalled::Reader) => Ok(()),
        }
    }

    async fn gap(&mut self, to: u64) -> Done {
        let lost = to.saturating_sub(self.writer.next_offset());
        let done = self.insist(|writer| writer.gap(to)).await;
        if self.writer.next_offset() == to {
            self.counters.drop_in_guest(lost);
        }
        done
    }

    /// Does `work` until it succeeds, or must not be waited for.
    async fn insist(&mut self, mut work: impl FnMut(&mut LogWriter) -> Result<(), Stalled>) -> Done {
        let since = Instant::now();
        while let Err(stall) = work(&mut self.writer) {
            self.counters.wait_for(Some(match &stall {
                Stalled::Reader => Obstacle::Reader,
                Stalled::Disk(_) if stall.is_misplaced() => Obstacle::Directory,
                Stalled::Disk(_) => Obstacle::Disk,
            }));
            self.report(&stall);
            if stall.is_misplaced() && since.elapsed() >= PLACE_PATIENCE && self.writer.go_to_memory().is_ok()
            {
                tracing::warn!(stream = self.name, "output goes on without the log, which misses it");
                continue;
            }
            // The reader must hear that the log has grown by a part of the work, even where nothing more
            // is safe: what it has not read yet may be what holds the log up.
            match self.writer.safe_offset() {
                Some(offset) => drop(self.safe.send_replace(offset)),
                None => self.safe.send_modify(|_| ()),
            }
            let waited = tokio::select! {
                goes_on = self.retained.wait(RETRY, matches!(stall, Stalled::Reader)) => Some(goes_on),
                () = self.halted.set() => None,
            };
            match waited {
                Some(true) => {}
                Some(false) => return Done::Abandoned,
                None => return Done::Halted,
            }
        }
        let in_memory = self.writer.is_in_memory();
        self.counters.wait_for(in_memory.then_some(Obstacle::Directory));
        if !in_memory && std::mem::take(&mut self.told) {
            tracing::info!(stream = self.name, "the log is being written again");
        }
        Done::Entirely
    }

    fn report(&mut self, stall: &Stalled) {
        match stall {
            // What a slow reader is meant to do. Nothing for an operator to act on.
            Stalled::Reader => tracing::debug!(stream = self.name, "{stall}"),
            Stalled::Disk(_) if self.told => {}
            Stalled::Disk(_) => {
                self.told = true;
                tracing::warn!(stream = self.name, error = %error_chain(stall), "output waits for the log");
            }
        }
    }
}
