//! What an output relay hands to, whatever is behind it: the log's thread, or an outlet alone.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use super::StdioError;
use crate::log::writer::Identity;

/// Chunks that may wait for the sink while it works on one. With [`super::incoming::BUFFER_MAX`] this
/// bounds what the shim holds for a stream.
pub(super) const QUEUE: usize = 1;

/// A step of a stream, in order.
#[derive(Debug)]
pub(super) enum Chunk {
    /// What the bytes that follow belong to.
    Identity(Identity),
    /// Bytes that continue the stream.
    Data(Vec<Bytes>),
    /// The stream goes on at this offset, what is between is lost.
    Gap(u64),
    /// The stream comes to rest: tells where the sink is, and that it goes on there, whatever came
    /// before.
    Rest(oneshot::Sender<Position>),
    /// The stream goes on elsewhere, at rest.
    Rewind(Turn, oneshot::Sender<Result<(), StdioError>>),
    /// The stream has ended, which is final unless it is rewound.
    End,
}

/// Where a stream goes on after its sandbox was put back to a snapshot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    /// Stream offset of the byte that comes next.
    pub(super) to: u64,
    /// The run of the guest that begins then.
    pub(super) timeline: u64,
}

/// How a stream is doing, for who follows its log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Life {
    /// How often it was rewound.
    pub(super) rewinds: u64,
    /// Whether it has ended since.
    pub(super) ended: bool,
}

/// Where a sink is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Stream offset below which everything is safe.
    pub(super) safe: u64,
    /// Stream offset of the byte that the sink takes next; above `safe` if the disk has taken bytes and
    /// not yet what belongs to them.
    pub(super) next: u64,
}

/// The relay's end of a sink. Dropping it is the end of the stream.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) chunks: mpsc::Sender<Chunk>,
    /// Stream offset below which everything is safe. Its sender is gone when the sink has ended, which
    /// before the end of the stream means that it takes nothing more.
    pub(super) safe: watch::Receiver<u64>,
    halt: watch::Sender<bool>,
}

impl Sink {
    /// From now on the sink takes what it can take without waiting, and drops what follows that. Until
    /// [`rest`](Sink::rest).
    pub(super) fn halt(&self) {
        self.halt.send_replace(true);
    }

    /// Halts the sink, and tells where it is; it goes on there. `None` if it has ended.
    pub(super) async fn rest(&self) -> Option<Position> {
        self.halt();
        let (reply, position) = oneshot::channel();
        self.chunks.send(Chunk::Rest(reply)).await.ok()?;
        let position = position.await.ok()?;
        self.halt.send_replace(false);
        Some(position)
    }

    /// Has the sink, which is at rest, go on elsewhere. The inner error is a disk that does not know of it
    /// yet. `None` if the sink has ended.
    pub(super) async fn rewind(&mut self, turn: Turn) -> Option<Result<(), StdioError>> {
        let (reply, done) = oneshot::channel();
        self.chunks.send(Chunk::Rewind(turn, reply)).await.ok()?;
        let result = done.await.ok()?;
        self.safe.borrow_and_update();
        Some(result)
    }
}

/// The other end of a [`Sink`].
#[derive(Debug)]
pub(super) struct SinkEnd {
    pub(super) chunks: mpsc::Receiver<Chunk>,
    pub(super) safe: watch::Sender<u64>,
    pub(super) halted: Halted,
}

/// Tells a sink that it must not wait.
#[derive(Debug, Clone)]
pub(super) struct Halted(watch::Receiver<bool>);

impl Halted {
    /// For who is not to be halted.
    pub(super) fn never() -> Halted {
        Halted(watch::Sender::new(false).subscribe())
    }

    /// Resolves when the sink is halted. Cancel safe.
    pub(super) async fn set(&mut self) {
        if self.0.wait_for(|halted| *halted).await.is_err() {
            // The stream has ended, and with it all reason to halt.
            std::future::pending().await
        }
    }
}

/// A sink that goes on at stream offset `from`.
pub(super) fn channel(from: u64) -> (Sink, SinkEnd) {
    let (chunks, receiver) = mpsc::channel(QUEUE);
    let (sender, safe) = watch::channel(from);
    let (halt, halted) = watch::channel(false);
    let end = SinkEnd { chunks: receiver, safe: sender, halted: Halted(halted) };
    (Sink { chunks, safe, halt }, end)
}
