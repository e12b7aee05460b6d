//! Counters of one stream.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};

/// What has happened to one stream so far. Bytes, except where said otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamStatus {
    /// "stdin", "stdout" or "stderr"; the output of a terminal is "stdout".
    pub name: &'static str,
    /// Output: taken from the guest. stdin: taken from the FIFO.
    pub received: u64,
    /// Offset below which everything is safe: acknowledged to the guest (output), by it (stdin).
    pub acknowledged: u64,
    /// Given to the FIFO, file or program.
    pub written: u64,
    /// Dropped by the guest in drop mode, or never given to the FIFO, file or program.
    pub lost: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// Connections closed because the guest broke the protocol.
    pub refused: u64,
    /// Whether the guest has ended the stream, and all of it is in its sinks.
    pub complete: bool,
    /// Whether the guest discards what is written after the end of the process that it belonged to.
    pub truncated: bool,
}

/// The counters behind [`StreamStatus`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) received: Counter,
    pub(super) acknowledged: Counter,
    pub(super) written: Counter,
    pub(super) lost: Counter,
    pub(super) connections: Counter,
    pub(super) refused: Counter,
    /// What of `received` the first sink has: the log, or the outlet where there is no log.
    pub(super) stored: Counter,
    /// Bytes that an outlet took too slowly, or that its program did not take at all.
    pub(super) discarded: Counter,
    /// 1 when the guest's EOF has come and the log, if any, has everything.
    pub(super) relayed: Counter,
    /// 1 when the FIFO, file or program has been given everything, or there is none.
    delivered: Counter,
    /// `written` or `delivered` has changed. [`Counters::taken`] is the only waiter.
    moved: Notify,
    pub(super) truncated: Counter,
}

impl Counters {
    pub(super) fn status(&self, name: &'static str) -> StreamStatus {
        StreamStatus {
            name,
            received: self.received.get(),
            acknowledged: self.acknowledged.get(),
            written: self.written.get(),
            lost: self.lost.get(),
            reconnects: self.connections.get().saturating_sub(1),
            refused: self.refused.get(),
            complete: self.complete(),
            truncated: self.truncated.get() > 0,
        }
    }

    /// The outlet has taken `n` bytes more.
    pub(super) fn write(&self, n: u64) {
        self.written.add(n);
        self.moved.notify_one();
    }

    /// The outlet has everything that it will ever get, or there is none.
    pub(super) fn deliver(&self) {
        self.delivered.set(1);
        self.moved.notify_one();
    }

    /// Resolves when the outlet has everything, or has taken nothing for `patience`. One caller at a time.
    pub(super) async fn taken(&self, patience: Duration) {
        while self.delivered.get() == 0 {
            // A change between the look and the wait leaves a permit.
            if timeout(patience, self.moved.notified()).await.is_err() {
                return;
            }
        }
    }

    pub(super) fn complete(&self) -> bool {
        self.relayed.get() > 0 && self.delivered.get() > 0
    }
}

/// A number that several tasks change. Nothing is ordered by it.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        // A guest can make offsets jump by anything in 64 bits, and more than once.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(old.saturating_add(n)));
    }

    pub(super) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
