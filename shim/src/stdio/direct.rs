//! The sink of a stream that has no log, as those of execs and terminals: its outlet alone. An outlet
//! that is slow, or that nobody reads, holds its own stream back and no other.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    error_chain,
    outlet::{Closed, Outlet},
    phase::{GUEST_PATIENCE, Phases, TAKEN_PATIENCE},
    sink::{Chunk, SinkEnd},
    status::Counters,
};

/// An outlet that is a sink by itself.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) name: &'static str,
    /// `None` once the log program has gone away: what follows is discarded, so that the process does
    /// not wait for a reader that cannot return.
    pub(super) outlet: Option<Outlet>,
    pub(super) counters: Arc<Counters>,
    pub(super) phases: Phases,
}

impl Direct {
    /// Runs until the stream has ended and everything is delivered, or delivery is given up.
    pub(super) async fn run(mut self, mut end: SinkEnd) {
        let mut last_chunk = Instant::now();
        let mut offset = *end.safe.borrow();
        loop {
            let chunk = tokio::select! {
                chunk = end.chunks.recv() => chunk,
                () = self.phases.exhausted(last_chunk, GUEST_PATIENCE) => return,
            };
            match chunk {
                None => break,
                Some(Chunk::Identity(_)) => {}
                Some(Chunk::Gap(to)) => offset = to,
                Some(Chunk::Data(parts)) => {
                    for part in parts {
                        let len = part.len() as u64;
                        if !self.take(part).await {
                            return;
                        }
                        offset += len;
                    }
                }
            }
            end.safe.send_replace(offset);
            last_chunk = Instant::now();
        }
        if let Some(outlet) = &mut self.outlet {
            tokio::select! {
                () = outlet.emptied(TAKEN_PATIENCE) => {}
                () = self.phases.abandoned() => {}
            }
            self.counters.deliver();
        }
    }

    /// Delivers all of `bytes`; `false` if that is given up.
    async fn take(&mut self, mut bytes: Bytes) -> bool {
        while !bytes.is_empty() {
            let Some(outlet) = &mut self.outlet else {
                self.counters.lost.add(bytes.len() as u64);
                self.counters.discarded.add(bytes.len() as u64);
                self.counters.stored.add(bytes.len() as u64);
                return true;
            };
            match outlet.deliver(&bytes, &mut self.phases, |_| ()).await {
                Ok(Ok(n)) => {
                    self.counters.stored.add(n as u64);
                    self.counters.write(n as u64);
                    bytes = bytes.slice(n..);
                }
                Ok(Err(Closed::Gone)) => {
                    tracing::warn!(stream = self.name, "the log program reads no more, output is discarded");
                    self.outlet = None;
                }
                Ok(Err(closed)) => {
                    tracing::warn!(stream = self.name, ?closed, "output was not delivered");
                    return false;
                }
                Err(e) => {
                    tracing::warn!(stream = self.name, error = %error_chain(&e), "output was not delivered");
                    self.outlet = None;
                }
            }
        }
        true
    }
}
