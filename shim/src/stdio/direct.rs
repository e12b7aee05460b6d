//! The sink of a stream that has no log, as those of execs and terminals: its outlet alone. An outlet
//! that is slow, or that nobody reads, holds its own stream back and no other.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    error_chain,
    outlet::{Closed, Outlet},
    phase::{GUEST_PATIENCE, Phases, TAKEN_PATIENCE},
    sink::{Chunk, Halted, Position, SinkEnd},
    status::{Awaited, Counters},
    uri::Target,
};

/// What became of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Entirely,
    /// Only in part: the sink is halted.
    Halted,
    /// Only in part: delivery is given up.
    GivenUp,
}

/// An outlet that is a sink by itself.
#[derive(Debug)]
pub(super) struct Direct {
    name: &'static str,
    /// `None` once the log program has gone away: what follows is discarded, so that the process does
    /// not wait for a reader that cannot return. And while the stream has ended.
    outlet: Option<Outlet>,
    /// What the outlet is of.
    target: Target,
    /// Whether the outlet was closed because the stream had ended, and is to be opened again for more.
    ended: bool,
    counters: Arc<Counters>,
    phases: Phases,
}

impl Direct {
    /// A sink that writes to `outlet`, which is one of `target`.
    pub(super) fn new(
        name: &'static str,
        outlet: Option<Outlet>,
        target: Target,
        counters: Arc<Counters>,
        phases: Phases,
    ) -> Direct {
        Direct { name, outlet, target, ended: false, counters, phases }
    }

    /// Runs until the stream has ended and everything is delivered, or delivery is given up.
    pub(super) async fn run(mut self, end: SinkEnd) {
        self.take_from(end).await;
        self.counters.wait_on(Awaited::Nothing);
    }

    async fn take_from(&mut self, end: SinkEnd) {
        let SinkEnd { mut chunks, safe, mut halted } = end;
        let mut last_chunk = Instant::now();
        let mut offset = *safe.borrow();
        // After a chunk that was not taken entirely nothing may follow.
        let mut dropping = false;
        let mut next = None;
        let (mut exit, mut exited) = (self.phases.clone(), false);
        loop {
            let chunk = match next.take() {
                Some(chunk) => chunk,
                None => tokio::select! {
                    chunk = chunks.recv() => chunk,
                    () = exit.exited(), if !exited => {
                        exited = true;
                        let attended = self.outlet.as_mut().map_or(Awaited::Nothing, Outlet::attended);
                        self.counters.wait_on(attended);
                        continue;
                    }
                    () = self.phases.exhausted(last_chunk, GUEST_PATIENCE) => return,
                },
            };
            match chunk {
                None => break,
                Some(Chunk::Rest(reply)) => {
                    dropping = false;
                    // The relay may have been abandoned meanwhile.
                    let _ = reply.send(Position { safe: offset, next: offset });
                }
                Some(Chunk::Rewind(turn, reply)) => {
                    (dropping, offset) = (false, turn.to);
                    self.counters.deliver_again();
                    safe.send_replace(offset);
                    let _ = reply.send(Ok(()));
                }
                Some(Chunk::End) => {
                    tokio::select! {
                        // Before the reader has seen the end, if there is none after all.
                        biased;
                        chunk = chunks.recv() => next = Some(chunk),
                        () = self.end() => {}
                    }
                }
                Some(_) if dropping => continue,
                Some(Chunk::Identity(_)) => {}
                Some(Chunk::Gap(to)) => {
                    self.counters.drop_in_guest(to.saturating_sub(offset));
                    offset = to;
                }
                Some(Chunk::Data(parts)) => {
                    self.open_again();
                    let before = self.counters.stored.get();
                    let taken = self.take_all(parts, &mut halted).await;
                    offset += self.counters.stored.get() - before;
                    match taken {
                        Taken::Entirely => {}
                        Taken::Halted => dropping = true,
                        Taken::GivenUp => return,
                    }
                }
            }
            safe.send_replace(offset);
            last_chunk = Instant::now();
        }
        self.end().await;
    }

    /// Lets the reader see the end, once it has the last bytes. Cancel safe.
    async fn end(&mut self) {
        if let Some(outlet) = &mut self.outlet {
            tokio::select! {
                () = outlet.emptied(TAKEN_PATIENCE) => {}
                () = self.phases.abandoned() => {}
            }
            self.outlet = None;
            self.ended = true;
        }
        if self.ended {
            self.counters.deliver();
        }
    }

    /// Opens the outlet that was closed at the end of the stream.
    fn open_again(&mut self) {
        if std::mem::take(&mut self.ended) {
            self.outlet = Outlet::open(&self.target).unwrap_or_else(|e| {
                tracing::warn!(stream = self.name, error = %error_chain(&e), "output goes on, and is discarded");
                None
            });
        }
    }

    async fn take_all(&mut self, parts: Vec<Bytes>, halted: &mut Halted) -> Taken {
        for part in parts {
            match self.take(part, halted).await {
                Taken::Entirely => {}
                other => return other,
            }
        }
        Taken::Entirely
    }

    /// Delivers `bytes`, and counts as stored what was.
    async fn take(&mut self, mut bytes: Bytes, halted: &mut Halted) -> Taken {
        while !bytes.is_empty() {
            let Some(outlet) = &mut self.outlet else {
                self.counters.lost.add(bytes.len() as u64);
                self.counters.discarded.add(bytes.len() as u64);
                self.counters.stored.add(bytes.len() as u64);
                self.counters.wait_on(Awaited::Nothing);
                return Taken::Entirely;
            };
            match outlet.deliver(&bytes, &mut self.phases, halted, &self.counters, |_| ()).await {
                Ok(Ok(n)) => {
                    self.counters.stored.add(n as u64);
                    bytes = bytes.slice(n..);
                }
                Ok(Err(Closed::Gone)) => {
                    tracing::warn!(stream = self.name, "the log program reads no more, output is discarded");
                    self.outlet = None;
                }
                Ok(Err(Closed::Halted)) => return Taken::Halted,
                Ok(Err(closed)) => {
                    tracing::warn!(stream = self.name, ?closed, "output was not delivered");
                    return Taken::GivenUp;
                }
                Err(e) => {
                    tracing::warn!(stream = self.name, error = %error_chain(&e), "output was not delivered");
                    self.outlet = None;
                }
            }
        }
        Taken::Entirely
    }
}
