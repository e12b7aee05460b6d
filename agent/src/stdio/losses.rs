//! What drop-oldest has lost, counted once.

use std::collections::VecDeque;

/// Jumps of the host's offset that are remembered singly until they are acknowledged.
const UNCONFIRMED_MAX: usize = 64;

/// Bytes that the host will never get.
///
/// A jump is told to the host by GAP or OPENED, and the connection may die before the host hears of
/// it. It then opens from before the jump, and what it has lost is told, and counted, anew.
#[derive(Debug, Clone, Default)]
pub(super) struct Losses {
    confirmed: u64,
    unconfirmed: VecDeque<Jump>,
}

#[derive(Debug, Clone)]
struct Jump {
    /// Where the stream goes on.
    to: u64,
    bytes: u64,
}

impl Losses {
    /// The host was told that it goes on at `to`, for want of `bytes`.
    pub(super) fn add(&mut self, to: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let crowded = self.unconfirmed.len() >= UNCONFIRMED_MAX;
        match self.unconfirmed.back_mut() {
            Some(last) if crowded => *last = Jump { to, bytes: last.bytes + bytes },
            _ => self.unconfirmed.push_back(Jump { to, bytes }),
        }
    }

    /// The host has everything that it will ever get below `offset`.
    pub(super) fn confirm(&mut self, offset: u64) {
        while let Some(jump) = self.unconfirmed.front().filter(|jump| jump.to <= offset) {
            self.confirmed += jump.bytes;
            self.unconfirmed.pop_front();
        }
    }

    /// The connection on which the jumps were told is gone.
    pub(super) fn forget_unconfirmed(&mut self) {
        self.unconfirmed.clear();
    }

    /// What the host knows that it has lost.
    pub(super) fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// That, and what it was told on the connection that is served.
    pub(super) fn total(&self) -> u64 {
        self.confirmed + self.unconfirmed.iter().map(|jump| jump.bytes).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_that_the_host_did_not_hear_of_is_not_counted_twice() {
        let mut losses = Losses::default();
        losses.add(100, 50);
        losses.add(300, 10);
        losses.confirm(200);
        assert_eq!(losses.total(), 60);
        losses.forget_unconfirmed();
        losses.add(400, 200);
        assert_eq!(losses.total(), 250);
    }

    #[test]
    fn a_host_that_never_acknowledges_costs_bounded_memory_and_no_count() {
        let mut losses = Losses::default();
        for jump in 1..=10_000 {
            losses.add(jump * 10, 3);
        }
        assert_eq!(losses.unconfirmed.len(), UNCONFIRMED_MAX);
        assert_eq!(losses.total(), 30_000);
        losses.confirm(100_000);
        assert_eq!((losses.total(), losses.unconfirmed.len()), (30_000, 0));
    }
}
