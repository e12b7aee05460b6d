//! Counters of one stream.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use super::phase::{GUEST_LIMIT, Phases};
use crate::log::retained::Usage;

/// What has happened to one stream so far. Bytes, except where said otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamStatus {
    /// "stdin", "stdout" or "stderr"; the output of a terminal is "stdout".
    pub name: &'static str,
    /// Output: taken from the guest. stdin: taken from the FIFO.
    pub received: u64,
    /// Offset below which everything is safe: acknowledged to the guest (output), by it (stdin). Goes back
    /// with the sandbox; no other figure does.
    pub acknowledged: u64,
    /// Given to the FIFO, file or program.
    pub written: u64,
    /// Dropped by the guest in drop mode, or never given to the FIFO, file or program.
    pub lost: u64,
    /// Of `lost`, what the guest dropped: the log does not have it either.
    pub dropped: u64,
    /// Of `lost`, what was given up at the end because it was taken too slowly, or not at all.
    pub discarded: u64,
    /// What the shim has and the FIFO, file or program (stdin: the process) does not.
    pub lag: u64,
    /// Whether there is a connection to the guest at the moment.
    pub connected: bool,
    /// Connections after the first.
    pub reconnects: u64,
    /// Connections closed because the guest broke the protocol.
    pub refused: u64,
    /// Whether the guest has ended the stream, and all of it is in its sinks.
    pub complete: bool,
    /// Whether the guest discards what is written after the end of the process that it belonged to.
    pub truncated: bool,
    /// The log, if there is one.
    pub log: Option<LogStatus>,
}

/// The log of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogStatus {
    /// What is on disk, and was.
    pub usage: Usage,
    /// What writing waits for.
    pub waits_for: Option<Obstacle>,
}

/// What a log waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// An attached reader that is a whole retained log behind.
    Reader = 1,
    /// A disk that takes nothing.
    Disk = 2,
    /// Its directory, which cannot be made again, or takes no files.
    Directory = 3,
}

/// What the exit of a process waits for, as far as one output is concerned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Awaited {
    /// More from the guest: not for ever.
    #[default]
    Guest,
    /// A reader that is attached: for as long as it takes.
    Reader,
    /// A first reader, or a file that takes nothing: for a moment.
    Moment,
    /// Nothing: all is delivered, or there is nobody to take it.
    Nothing,
}

impl Awaited {
    /// The same, but for a moment if it is nothing.
    pub(super) fn at_least_a_moment(self) -> Awaited {
        if self == Awaited::Nothing { Awaited::Moment } else { self }
    }
}

/// The counters behind [`StreamStatus`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) received: Counter,
    pub(super) acknowledged: Counter,
    pub(super) written: Counter,
    pub(super) lost: Counter,
    /// Of `lost`, what the guest dropped.
    pub(super) dropped: Counter,
    pub(super) connections: Counter,
    /// 1 while there is a connection.
    pub(super) connected: Counter,
    pub(super) refused: Counter,
    /// What of `received` the first sink has: the log, or the outlet where there is no log. stdin: the process.
    pub(super) stored: Counter,
    /// Bytes that an outlet took too slowly, or that its program did not take at all.
    pub(super) discarded: Counter,
    /// Position in the log up to which the outlet has everything, or has missed it.
    pub(super) position: Counter,
    /// An [`Obstacle`] of the log; 0 for none.
    obstacle: Counter,
    /// 1 when the guest's EOF has come and the log, if any, has everything.
    pub(super) relayed: Counter,
    /// 1 when the FIFO, file or program has been given everything, or there is none.
    delivered: Counter,
    /// What [`Counters::taken`] waits for.
    awaited: watch::Sender<Awaited>,
    pub(super) truncated: Counter,
}

impl Counters {
    /// `lag` and `log` are the caller's to fill in.
    pub(super) fn status(&self, name: &'static str) -> StreamStatus {
        StreamStatus {
            name,
            lag: 0,
            log: None,
            dropped: self.dropped.get(),
            discarded: self.discarded.get(),
            connected: self.connected.get() > 0,
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

    /// The guest has dropped `n` bytes that no sink will ever see.
    pub(super) fn drop_in_guest(&self, n: u64) {
        self.lost.add(n);
        self.dropped.add(n);
    }

    /// The outlet has taken `n` bytes more.
    pub(super) fn write(&self, n: u64) {
        self.written.add(n);
        self.wait_on(Awaited::Guest);
    }

    /// The outlet has everything that it will ever get, or there is none.
    pub(super) fn deliver(&self) {
        self.delivered.set(1);
        self.wait_on(Awaited::Nothing);
    }

    /// There will be more for the outlet, after all.
    pub(super) fn deliver_again(&self) {
        self.delivered.set(0);
        self.wait_on(Awaited::Guest);
    }

    /// An exit waits for this from now on.
    pub(super) fn wait_on(&self, awaited: Awaited) {
        self.awaited.send_if_modified(|now| std::mem::replace(now, awaited) != awaited);
    }

    /// Resolves when an exit has nothing to wait for, or nothing but a `moment` that is over, or a guest that has
    /// had all of its time in which no reader held anything up: it may send on and on, and never an end.
    pub(super) async fn taken(&self, moment: Duration, phases: &Phases) {
        let mut awaited = self.awaited.subscribe();
        let mut left = GUEST_LIMIT;
        loop {
            let now = *awaited.borrow_and_update();
            // The sender is ours.
            match now {
                Awaited::Nothing => return,
                Awaited::Reader => _ = awaited.changed().await,
                Awaited::Guest => {
                    let (began, mut silence) = (Instant::now(), phases.clone());
                    tokio::select! {
                        _ = awaited.changed() => {
                            let flowing = silence.flowing().await;
                            left = left.saturating_sub(began.max(flowing).elapsed());
                        }
                        () = silence.exhausted(began, left) => return,
                    }
                }
                Awaited::Moment if timeout(moment, awaited.changed()).await.is_err() => return,
                Awaited::Moment => {}
            }
        }
    }

    pub(super) fn complete(&self) -> bool {
        self.relayed.get() > 0 && self.is_delivered()
    }

    /// Whether the outlet has everything that it will ever get, or there is none.
    pub(super) fn is_delivered(&self) -> bool {
        self.delivered.get() > 0
    }

    /// Notes what the log waits for.
    pub(super) fn wait_for(&self, obstacle: Option<Obstacle>) {
        self.obstacle.set(obstacle.map_or(0, |obstacle| obstacle as u64));
    }

    pub(super) fn obstacle(&self) -> Option<Obstacle> {
        let code = self.obstacle.get();
        let all = [Obstacle::Reader, Obstacle::Disk, Obstacle::Directory];
        all.into_iter().find(|obstacle| *obstacle as u64 == code)
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
