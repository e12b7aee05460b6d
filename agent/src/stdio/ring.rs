//! The retention ring: output that the host has not acknowledged.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    sync::Arc,
};

use memmap2::MmapMut;

use super::pool::{CHUNK_LEN, Pool};

/// Most bytes that a ring holds.
pub(super) const RING_MAX: usize = 1024 * 1024;

/// Most bytes that one [`Ring::fill`] reads.
pub(super) const FILL_MAX: usize = 64 * 1024;

/// Most slices that `len` contiguous bytes of a ring are spread over.
pub(super) const fn slices_for(len: usize) -> usize {
    len / CHUNK_LEN + 2
}

/// Bytes `tail..end` of a stream, in chunks that are taken from the pool when bytes come and given
/// back when they are released. Every chunk but the last is full.
#[derive(Debug)]
pub(super) struct Ring {
    pool: Arc<Pool>,
    chunks: VecDeque<MmapMut>,
    /// Offset in the stream of the first byte of the first chunk.
    base: u64,
    tail: u64,
    end: u64,
}

/// What came of [`Ring::fill`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// The reader gave so many bytes; 0 is its end.
    Bytes(usize),
    /// The reader was not called: the ring holds [`RING_MAX`].
    Full,
    /// The reader was not called: all rings together hold what they may.
    Starved,
}

impl Ring {
    /// An empty ring at offset 0. Costs nothing until it is filled.
    pub(super) fn new(pool: Arc<Pool>) -> Ring {
        Ring { pool, chunks: VecDeque::new(), base: 0, tail: 0, end: 0 }
    }

    /// A copy, in memory of another pool.
    #[cfg(feature = "fuzzing")]
    pub(super) fn fork(&self, pool: Arc<Pool>) -> io::Result<Ring> {
        let mut fork =
            Ring { pool, chunks: VecDeque::new(), base: self.base, tail: self.tail, end: self.end };
        for chunk in &self.chunks {
            let taken = fork.pool.take(fork.chunks.len())?;
            let mut copy = taken.ok_or(io::ErrorKind::OutOfMemory)?;
            copy.copy_from_slice(chunk);
            fork.chunks.push_back(copy);
        }
        Ok(fork)
    }

    /// Offset of the first byte that the ring holds.
    pub(super) fn tail(&self) -> u64 {
        self.tail
    }

    /// Offset after the last byte that the ring holds.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Appends what `read` puts into the memory that it is given, at most `max` and [`FILL_MAX`] bytes.
    ///
    /// # Errors
    ///
    /// Those of `read`, and `OutOfMemory` from the kernel; the ring is then as before.
    pub(super) fn fill<F>(&mut self, max: usize, read: F) -> io::Result<Filled>
    where
        F: FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    {
        let max = max.min(FILL_MAX);
        let reserved = self.reserve(max);
        let result = match self.room() {
            0 => reserved,
            _ => read(self.vacant(max).as_mut_slice()).map(Filled::Bytes),
        };
        if let Ok(Filled::Bytes(read)) = result {
            self.end += read as u64;
        }
        self.trim();
        result
    }

    /// Forgets the bytes below `offset`, which lies between tail and end.
    pub(super) fn release(&mut self, offset: u64) {
        self.tail = offset.clamp(self.tail, self.end);
        while !self.chunks.is_empty() && self.base + CHUNK_LEN as u64 <= self.tail {
            self.give_back(VecDeque::pop_front);
            self.base += CHUNK_LEN as u64;
        }
        self.trim();
    }

    /// Forgets the oldest bytes, as many as make room for more. `fill` must have found none.
    pub(super) fn drop_oldest(&mut self) {
        self.release(self.base + CHUNK_LEN as u64);
    }

    /// Offset that [`Ring::drop_oldest`] would make the tail.
    pub(super) fn tail_after_drop(&self) -> u64 {
        (self.base + CHUNK_LEN as u64).min(self.end)
    }

    /// Puts the bytes `from..to` into `slices`, without a copy; returns how many slices they take.
    /// What the ring does not hold, or `slices` has no place for, is left out at the end; all of it
    /// if the ring holds no longer what is at `from`.
    pub(super) fn slices<'a>(&'a self, from: u64, to: u64, slices: &mut [IoSlice<'a>]) -> usize {
        if from < self.tail {
            return 0;
        }
        let (mut at, to) = (from, to.min(self.end));
        let mut count = 0;
        while at < to && count < slices.len() {
            let (chunk, start) = self.position(at);
            let Some(chunk) = self.chunks.get(chunk) else { break };
            let len = (CHUNK_LEN - start).min((to - at) as usize);
            slices[count] = IoSlice::new(&chunk[start..start + len]);
            count += 1;
            at += len as u64;
        }
        count
    }

    /// A copy of the bytes `from..to`, at most [`FILL_MAX`].
    pub(super) fn copy(&self, from: u64, to: u64) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); slices_for(FILL_MAX)];
        let count = self.slices(from, to, &mut slices);
        let mut copy = Vec::with_capacity((to - from) as usize);
        slices[..count].iter().for_each(|slice| copy.extend_from_slice(slice));
        copy
    }

    /// Which chunk holds `offset`, and where in it.
    fn position(&self, offset: u64) -> (usize, usize) {
        let distance = (offset - self.base) as usize;
        (distance / CHUNK_LEN, distance % CHUNK_LEN)
    }

    /// Takes chunks until there is room for `len` bytes or there are no more to be had.
    fn reserve(&mut self, len: usize) -> io::Result<Filled> {
        while self.room() < len {
            if self.chunks.len() == RING_MAX / CHUNK_LEN {
                return Ok(Filled::Full);
            }
            match self.pool.take(self.chunks.len())? {
                Some(chunk) => self.chunks.push_back(chunk),
                None => return Ok(Filled::Starved),
            }
        }
        Ok(Filled::Bytes(0))
    }

    /// Bytes that fit into the chunks at hand.
    fn room(&self) -> usize {
        self.chunks.len() * CHUNK_LEN - (self.end - self.base) as usize
    }

    /// The memory after the end, at most `max` bytes of it.
    fn vacant(&mut self, max: usize) -> Vacant<'_> {
        let (first, mut start) = self.position(self.end);
        let mut vacant = Vacant { slices: std::array::from_fn(|_| IoSliceMut::new(&mut [])), count: 0 };
        let mut left = max;
        for (slice, chunk) in vacant.slices.iter_mut().zip(self.chunks.iter_mut().skip(first)) {
            let len = (CHUNK_LEN - start).min(left);
            if len == 0 {
                break;
            }
            *slice = IoSliceMut::new(&mut chunk[start..start + len]);
            vacant.count += 1;
            left -= len;
            start = 0;
        }
        vacant
    }

    /// Gives back the chunks after the last byte; all of them once nothing is held.
    fn trim(&mut self) {
        if self.tail == self.end {
            self.base = self.end;
        }
        let needed = ((self.end - self.base) as usize).div_ceil(CHUNK_LEN);
        while self.chunks.len() > needed {
            self.give_back(VecDeque::pop_back);
        }
    }

    fn give_back(&mut self, pop: fn(&mut VecDeque<MmapMut>) -> Option<MmapMut>) {
        if let Some(chunk) = pop(&mut self.chunks) {
            self.pool.put(chunk, self.chunks.len());
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.release(self.end);
    }
}

/// Where the next bytes go.
struct Vacant<'a> {
    slices: [IoSliceMut<'a>; slices_for(FILL_MAX)],
    count: usize,
}

impl<'a> Vacant<'a> {
    fn as_mut_slice(&mut self) -> &mut [IoSliceMut<'a>] {
        &mut self.slices[..self.count]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{guest::active_clock::ActiveClock, stdio::pool::FLOOR_CHUNKS};

    /// The byte at `offset` of the stream that the tests write.
    fn byte_at(offset: u64) -> u8 {
        (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    fn held(from: u64, to: u64) -> Vec<u8> {
        (from..to).map(byte_at).collect()
    }

    fn write(ring: &mut Ring, len: usize) -> Filled {
        let mut at = ring.end();
        ring.fill(len, |slices| {
            let mut written = 0;
            for byte in slices.iter_mut().flat_map(|slice| slice.iter_mut()) {
                *byte = byte_at(at);
                at += 1;
                written += 1;
            }
            Ok(written)
        })
        .unwrap()
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// Offer `max` bytes of room to a reader that takes `len` of them.
        Fill {
            max: usize,
            len: usize,
        },
        /// Release this share of what is held, in 1/256.
        Release(u8),
        DropOldest,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (1..2 * FILL_MAX, 0..2 * FILL_MAX).prop_map(|(max, len)| Step::Fill { max, len }),
            3 => any::<u8>().prop_map(Step::Release),
            1 => Just(Step::DropOldest),
        ];
        prop::collection::vec(step, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against the simplest model there is: two offsets, with bytes known by their offset.
        #[test]
        fn a_ring_holds_exactly_what_was_filled_and_not_released(steps in steps(), budget in 0..96usize) {
            let pool = Pool::new(budget * CHUNK_LEN, ActiveClock::start());
            let mut ring = Ring::new(Arc::clone(&pool));
            let (mut tail, mut end) = (0u64, 0u64);
            for step in steps {
                match step {
                    Step::Fill { max, len } => {
                        let mut taken = 0;
                        let filled = ring.fill(max, |slices| {
                            for byte in slices.iter_mut().flat_map(|slice| slice.iter_mut()).take(len) {
                                *byte = byte_at(end + taken);
                                taken += 1;
                            }
                            Ok(taken as usize)
                        });
                        match filled.unwrap() {
                            Filled::Bytes(n) => {
                                prop_assert_eq!(n as u64, taken);
                                prop_assert!(n <= max.min(FILL_MAX));
                            }
                            Filled::Full => prop_assert!((end - tail) as usize > RING_MAX - CHUNK_LEN),
                            Filled::Starved => {
                                prop_assert!((end - tail) as usize > (FLOOR_CHUNKS + budget - 1) * CHUNK_LEN);
                            }
                        }
                        end += taken;
                    }
                    Step::Release(share) => {
                        tail += (end - tail) * u64::from(share) / 255;
                        ring.release(tail);
                    }
                    Step::DropOldest => {
                        tail = ring.tail_after_drop().max(tail);
                        ring.drop_oldest();
                    }
                }
                prop_assert_eq!((ring.tail(), ring.end()), (tail, end));
                prop_assert!(ring.chunks.len() <= RING_MAX / CHUNK_LEN);
                prop_assert!(ring.chunks.len() * CHUNK_LEN < (end - tail) as usize + 2 * CHUNK_LEN);
                prop_assert_eq!(pool.held_bytes(), ring.chunks.len() * CHUNK_LEN);
                for at in [tail, tail + (end - tail) / 2, end.saturating_sub(1).max(tail)] {
                    prop_assert_eq!(ring.copy(at, end.min(at + 1)), held(at, end.min(at + 1)));
                }
            }
            for at in (tail..end).step_by(FILL_MAX) {
                let to = end.min(at + FILL_MAX as u64);
                prop_assert!(ring.copy(at, to) == held(at, to));
            }
            drop(ring);
            prop_assert_eq!(pool.held_bytes(), 0);
        }
    }

    #[test]
    fn a_ring_that_is_full_or_starved_does_not_read() {
        let mut ring = Ring::new(Pool::new(RING_MAX, ActiveClock::start()));
        while matches!(write(&mut ring, FILL_MAX), Filled::Bytes(_)) {}
        assert_eq!(ring.end(), RING_MAX as u64);
        assert_eq!(write(&mut ring, 1), Filled::Full);

        let mut ring = Ring::new(Pool::new(0, ActiveClock::start()));
        while matches!(write(&mut ring, FILL_MAX), Filled::Bytes(_)) {}
        assert_eq!(ring.end() as usize, FLOOR_CHUNKS * CHUNK_LEN);
        assert_eq!(write(&mut ring, 1), Filled::Starved);
    }

    #[test]
    fn a_read_that_fails_or_ends_leaves_no_memory_behind() {
        let pool = Pool::new(RING_MAX, ActiveClock::start());
        let mut ring = Ring::new(Arc::clone(&pool));
        let refused = ring.fill(10, |_| Err(io::ErrorKind::WouldBlock.into()));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(ring.fill(10, |_| Ok(0)).unwrap(), Filled::Bytes(0));
        assert_eq!(pool.held_bytes(), 0);
    }
}
