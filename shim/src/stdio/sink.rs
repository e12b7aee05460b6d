//! What an output relay hands to, whatever is behind it: the log's thread, or an outlet alone.

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

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
}

/// The relay's end of a sink. Dropping it is the end of the stream.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) chunks: mpsc::Sender<Chunk>,
    /// Stream offset below which everything is safe. Its sender is gone when the sink has ended, which
    /// before the end of the stream means that it takes nothing more.
    pub(super) safe: watch::Receiver<u64>,
}

/// The other end of a [`Sink`].
#[derive(Debug)]
pub(super) struct SinkEnd {
    pub(super) chunks: mpsc::Receiver<Chunk>,
    pub(super) safe: watch::Sender<u64>,
}

/// A sink that goes on at stream offset `from`.
pub(super) fn channel(from: u64) -> (Sink, SinkEnd) {
    let (chunks, receiver) = mpsc::channel(QUEUE);
    let (sender, safe) = watch::channel(from);
    (Sink { chunks, safe }, SinkEnd { chunks: receiver, safe: sender })
}
