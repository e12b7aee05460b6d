//! Feeds a FIFO, a file or a log program from the log, which is its buffer.

use std::{io, sync::Arc};

use bytes::{Bytes, BytesMut};
use tokio::{sync::watch, time::Instant};

use super::{
    error_chain,
    outlet::{Closed, Outlet, Waiting},
    phase::{GUEST_PATIENCE, Phases, TAKEN_PATIENCE},
    sink::{Halted, Life},
    status::{Awaited, Counters},
    uri::Target,
};
use crate::log::retained::{Found, Retained};

/// Bytes read from the log at once; the default capacity of a pipe.
const CHUNK: usize = 64 << 10;

/// One outlet that follows one log.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) name: &'static str,
    pub(super) retained: Arc<Retained>,
    /// Changes when the log has grown; its sender is gone when it will not any more.
    pub(super) grown: watch::Receiver<u64>,
    /// As that of `grown`.
    pub(super) life: watch::Receiver<Life>,
    /// How often the stream was rewound, as far as is known here.
    pub(super) rewinds: u64,
    /// `None` while the stream has ended.
    pub(super) outlet: Option<Outlet>,
    /// What the outlet is of.
    pub(super) target: Target,
    pub(super) counters: Arc<Counters>,
    pub(super) phases: Phases,
    /// Position in the log up to which the outlet has everything.
    pub(super) position: u64,
}

impl Feed {
    /// Runs until the log has ended and everything is delivered, or delivery is given up.
    pub(super) async fn run(mut self) {
        loop {
            self.retained.hold(self.position);
            let result = self.follow().await;
            self.retained.release();
            self.close().await;
            self.counters.wait_on(Awaited::Nothing);
            if matches!(result, Ok(Ok(()))) || self.give_up(result).await {
                self.counters.deliver();
            }
            if !self.is_rewound().await {
                return;
            }
            self.counters.deliver_again();
        }
    }

    /// The reader sees the end of the stream now; the log itself may still grow.
    async fn close(&mut self) {
        let Some(mut outlet) = self.outlet.take() else { return };
        tokio::select! {
            () = outlet.emptied(TAKEN_PATIENCE) => {}
            () = self.phases.abandoned() => {}
        }
    }

    /// Counts what the outlet does not get, once the stream has ended. Whether nobody wants it.
    async fn give_up(&mut self, result: io::Result<Result<(), Closed>>) -> bool {
        tokio::select! {
            _ = self.life.wait_for(|life| life.ended) => {}
            () = self.phases.abandoned() => {}
        }
        self.rewinds = self.life.borrow().rewinds;
        let rest = self.retained.end().saturating_sub(self.position);
        self.position = self.retained.end();
        self.counters.lost.add(rest);
        self.counters.position.set(self.position);
        let cause = match result {
            // Nobody reads: nobody misses it, and the log has it.
            Ok(Ok(()) | Err(Closed::Unread)) => return true,
            Ok(Err(Closed::Slow | Closed::Halted)) => "it was taken too slowly".to_owned(),
            Ok(Err(Closed::Gone)) => "the log program reads no more".to_owned(),
            Err(e) => error_chain(&e),
        };
        self.counters.discarded.add(rest);
        let stream = self.name;
        tracing::warn!(stream, bytes = rest, cause, "output was not delivered, the log has it");
        false
    }

    /// Resolves when a stream that has ended goes on, or cannot any more, which is `false`.
    async fn is_rewound(&mut self) -> bool {
        let Feed { life, phases, rewinds, .. } = self;
        tokio::select! {
            rewound = life.wait_for(|life| life.rewinds != *rewinds) => rewound.is_ok(),
            () = phases.abandoned() => false,
        }
    }

    /// Delivers until the stream has ended.
    async fn follow(&mut self) -> io::Result<Result<(), Closed>> {
        let (mut last_growth, mut exit, mut exited) = (Instant::now(), self.phases.clone(), false);
        loop {
            // Before the look at what there is: nothing is added after the end.
            let life = *self.life.borrow_and_update();
            let ended = life.ended || self.life.has_changed().is_err();
            self.rewinds = life.rewinds;
            match self.read().await? {
                (Found::Bytes(_), bytes) => {
                    if let Err(closed) = self.deliver(bytes).await? {
                        return Ok(Err(closed));
                    }
                    last_growth = Instant::now();
                }
                (Found::Dropped(to), _) => {
                    self.counters.lost.add(to - self.position);
                    self.position = to;
                    self.counters.position.set(to);
                }
                (Found::End, _) if ended => return Ok(Ok(())),
                (Found::End, _) => tokio::select! {
                    // An error is the end, which the next look finds.
                    _ = self.grown.changed() => {}
                    _ = self.life.changed() => {}
                    () = exit.exited(), if !exited => {
                        exited = true;
                        let attended = self.outlet.as_mut().map_or(Awaited::Nothing, Outlet::attended);
                        self.counters.wait_on(attended);
                    }
                    () = self.phases.exhausted(last_growth, GUEST_PATIENCE) => return Ok(Err(Closed::Slow)),
                },
            }
        }
    }

    async fn deliver(&mut self, mut bytes: Bytes) -> io::Result<Result<(), Closed>> {
        let Feed { retained, outlet, target, counters, phases, position, .. } = self;
        if outlet.is_none() {
            *outlet = Outlet::open(target)?;
        }
        let Some(outlet) = outlet else { return Ok(Err(Closed::Gone)) };
        let mut halted = Halted::never();
        while !bytes.is_empty() {
            let at = *position;
            let taken = outlet.deliver(&bytes, phases, &mut halted, counters, |waiting| match waiting {
                Waiting::Reader | Waiting::Disk => retained.hold(at),
                Waiting::Nobody => retained.release(),
            });
            match taken.await? {
                Ok(n) => {
                    *position += n as u64;
                    counters.position.set(*position);
                    retained.hold(*position);
                    bytes = bytes.slice(n..);
                }
                Err(closed) => return Ok(Err(closed)),
            }
        }
        Ok(Ok(()))
    }

    async fn read(&self) -> io::Result<(Found, Bytes)> {
        let available = self.retained.end().saturating_sub(self.position);
        if available == 0 {
            return Ok((Found::End, Bytes::new()));
        }
        let (retained, position) = (self.retained.clone(), self.position);
        let mut buffer = BytesMut::zeroed(usize::try_from(available).unwrap_or(CHUNK).min(CHUNK));
        // What was just written is in the page cache; a thread of its own costs more than the read.
        if let Some(found) = retained.read_cached(position, &mut buffer)? {
            return Ok(read_into(buffer, found));
        }
        let read = tokio::task::spawn_blocking(move || {
            let found = retained.read_at(position, &mut buffer)?;
            Ok(read_into(buffer, found))
        });
        read.await.map_err(io::Error::other)?
    }
}

fn read_into(mut buffer: BytesMut, found: Found) -> (Found, Bytes) {
    buffer.truncate(if let Found::Bytes(n) = found { n } else { 0 });
    (found, buffer.freeze())
}
