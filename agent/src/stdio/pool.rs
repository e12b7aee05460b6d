//! Memory of all retention rings, in chunks, under one budget.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use memmap2::MmapMut;
use tokio::sync::{Notify, futures::Notified};

use super::locked;
use crate::guest::active_clock::ActiveClock;

/// Bytes in a chunk. Also the grain in which drop-oldest drops and an almost silent stream holds memory.
pub(super) const CHUNK_LEN: usize = 16 * 1024;

/// Chunks that a ring gets whatever the others hold, 64 KiB: every stream can always make progress.
pub(super) const FLOOR_CHUNKS: usize = 64 * 1024 / CHUNK_LEN;

/// Unused chunks kept for the next ring that asks, 1 MiB. One busy stream goes through that much
/// between two acknowledgements; to map and fault in fresh memory each time would cost as much as
/// the copy into it.
const SPARE_CHUNKS: usize = 1024 * 1024 / CHUNK_LEN;

/// How long a chunk stays spare before the kernel gets it back; at most twice this.
const TRIM_INTERVAL: Duration = Duration::from_secs(1);

/// Where rings take their chunks from.
///
/// Chunks are mapped, not allocated: what one busy minute has taken would otherwise stay in the
/// allocator's heap, below whatever small object was allocated last.
#[derive(Debug)]
pub(super) struct Pool {
    /// Chunks that all rings together may hold beyond their floors.
    budget: usize,
    clock: Arc<ActiveClock>,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Chunks in rings.
    held: usize,
    /// Those of `held` that count against the budget.
    beyond_floors: usize,
    spare: Vec<MmapMut>,
    /// Fewest spare chunks since the last trim: nobody has needed these.
    spare_low_water: usize,
    trimming: bool,
}

impl Pool {
    /// A pool whose rings hold at most `budget` bytes beyond [`FLOOR_CHUNKS`] each, and which gives
    /// memory back by `clock`.
    pub(super) fn new(budget: usize, clock: Arc<ActiveClock>) -> Arc<Pool> {
        let budget = budget / CHUNK_LEN;
        Arc::new(Pool { budget, clock, state: Mutex::default(), freed: Notify::new() })
    }

    /// A chunk for a ring that holds `holds` already. `None` if the budget is used up.
    ///
    /// # Errors
    ///
    /// The kernel has no memory.
    pub(super) fn take(&self, holds: usize) -> io::Result<Option<MmapMut>> {
        let mut state = self.state();
        let beyond_floor = holds >= FLOOR_CHUNKS;
        if beyond_floor && state.beyond_floors >= self.budget {
            return Ok(None);
        }
        let chunk = match state.spare.pop() {
            Some(chunk) => chunk,
            None => MmapMut::map_anon(CHUNK_LEN)?,
        };
        state.spare_low_water = state.spare_low_water.min(state.spare.len());
        state.held += 1;
        state.beyond_floors += usize::from(beyond_floor);
        Ok(Some(chunk))
    }

    /// Takes `chunk` back from a ring that still holds `holds` others.
    pub(super) fn put(self: &Arc<Self>, chunk: MmapMut, holds: usize) {
        let mut state = self.state();
        state.held -= 1;
        if state.spare.len() < SPARE_CHUNKS {
            state.spare.push(chunk);
            self.trim_later(&mut state);
        }
        if holds >= FLOOR_CHUNKS {
            state.beyond_floors -= 1;
            drop(state);
            self.freed.notify_waiters();
        }
    }

    /// Resolves when budget comes free after this call, whether or not it was polled by then: call
    /// it before the look at the ring that finds no room, and no release in between is missed.
    pub(super) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    /// Bytes in rings.
    pub(super) fn held_bytes(&self) -> usize {
        self.state().held * CHUNK_LEN
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Sees to it that spare chunks which stay unused go back to the kernel. The task ends with the
    /// last of them, so that an idle agent has no timer.
    fn trim_later(self: &Arc<Self>, state: &mut State) {
        if state.trimming {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        state.trimming = true;
        state.spare_low_water = 0;
        let (pool, clock) = (Arc::downgrade(self), Arc::clone(&self.clock));
        runtime.spawn(async move {
            loop {
                clock.sleep(TRIM_INTERVAL).await;
                let Some(pool) = pool.upgrade() else { return };
                if !pool.trim() {
                    return;
                }
            }
        });
    }

    /// Unmaps what was spare for a whole interval; false once nothing is left to watch.
    fn trim(&self) -> bool {
        let mut state = self.state();
        let needed = state.spare.len().saturating_sub(state.spare_low_water);
        state.spare.truncate(needed);
        state.spare_low_water = state.spare.len();
        state.trimming = !state.spare.is_empty();
        state.trimming
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_given_whatever_the_budget_and_the_rest_is_not() {
        let pool = Pool::new(CHUNK_LEN, ActiveClock::start());
        let mut chunks: Vec<_> = (0..FLOOR_CHUNKS).map(|n| pool.take(n).unwrap().unwrap()).collect();
        chunks.push(pool.take(FLOOR_CHUNKS).unwrap().unwrap());
        assert!(pool.take(FLOOR_CHUNKS + 1).unwrap().is_none());
        assert!(pool.take(FLOOR_CHUNKS).unwrap().is_none(), "another ring draws on the same budget");
        assert!(pool.take(0).unwrap().is_some(), "another ring has a floor of its own");
        pool.put(chunks.pop().unwrap(), FLOOR_CHUNKS);
        assert!(pool.take(FLOOR_CHUNKS).unwrap().is_some());
        assert_eq!(pool.held_bytes(), (FLOOR_CHUNKS + 2) * CHUNK_LEN);
    }

    #[tokio::test(start_paused = true)]
    async fn spare_chunks_go_back_to_the_kernel_once_nobody_needs_them() {
        let pool = Pool::new(0, ActiveClock::start());
        let chunk = pool.take(0).unwrap().unwrap();
        pool.put(chunk, 0);
        assert_eq!(pool.state().spare.len(), 1);
        tokio::time::sleep(3 * TRIM_INTERVAL).await;
        assert_eq!(pool.state().spare.len(), 0);
        assert!(!pool.state().trimming);
    }

    #[tokio::test]
    async fn who_asked_before_a_release_is_told_of_it() {
        let pool = Pool::new(CHUNK_LEN, ActiveClock::start());
        let chunk = pool.take(FLOOR_CHUNKS).unwrap().unwrap();
        let freed = pool.freed();
        assert!(pool.take(FLOOR_CHUNKS).unwrap().is_none());
        pool.put(chunk, FLOOR_CHUNKS);
        freed.await;
    }
}
