//! An output stream: from the pipe or terminal into the retention ring, and from there to the host.

#[cfg(feature = "fuzzing")]
mod fork;
mod sending;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use cube_protocol::stream::ErrorCode;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use self::sending::Sending;
use super::{
    Policy, locked,
    losses::Losses,
    pipe::{self, Pending},
    pool::Pool,
    ring::{FILL_MAX, Filled, Ring},
    session::{Refusal, Sessions},
};
use crate::guest::active_clock::ActiveClock;

/// Bytes that the pump moves before other tasks get their turn.
const TURN: usize = 128 * 1024;

/// How long to wait for memory when the kernel had none.
const MEMORY_RETRY: Duration = Duration::from_secs(1);

/// One direction of output of one process.
#[derive(Debug)]
pub(super) struct Output {
    epoch: u64,
    policy: Policy,
    pool: Arc<Pool>,
    clock: Arc<ActiveClock>,
    state: Mutex<State>,
    /// The pump, its only waiter, may find room now. `notify_one` leaves a permit, and the pump
    /// looks for room after every wait, so a release between its look and its wait is not missed.
    room: Notify,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    phase: Phase,
    /// What the pump reads from; `None` before it begins and after it ends.
    source: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Whether the pump waits for room in the ring.
    waits: bool,
    /// Everything below is safe with the host.
    acked: u64,
    losses: Losses,
    sessions: Sessions<Sending>,
}

/// Where the stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// What is read goes to the ring.
    Open,
    /// The process has exited and another holds the pipe: what it had written by its deadline, up
    /// to this offset, still goes to the ring.
    Cut { at: u64 },
    /// The ring's end is the stream's. What is still read is discarded.
    Ended { truncated: bool },
}

/// What is left of an output once its process has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leftover {
    /// Nobody who writes, or nothing more that would be taken.
    Nobody,
    /// Somebody may write.
    Writer,
    /// Somebody who may have to wait, for the host takes nothing.
    HeldUp,
}

/// What the pump did in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pumped {
    Bytes(usize),
    /// The ring is full.
    Full,
    /// The ring could grow if another gave up its share of the budget.
    Starved,
    /// No writer is left.
    End,
}

/// Figures for `Guest.Info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figures {
    pub(super) end: u64,
    pub(super) acked: u64,
    pub(super) lost: u64,
    pub(super) connections: u64,
    pub(super) attempt: u64,
}

impl Output {
    /// `clock` stands still while nothing may be dropped.
    pub(super) fn new(epoch: u64, policy: Policy, pool: Arc<Pool>, clock: Arc<ActiveClock>) -> Arc<Output> {
        let state = State {
            ring: Ring::new(Arc::clone(&pool)),
            phase: Phase::Open,
            source: None,
            waits: false,
            acked: 0,
            losses: Losses::default(),
            sessions: Sessions::new(),
        };
        Arc::new(Output { epoch, policy, pool, clock, state: Mutex::new(state), room: Notify::new() })
    }

    /// Begins to drain `source`, until its last writer is gone, whatever becomes of the stream.
    pub(super) fn attach(self: &Arc<Self>, source: Arc<AsyncFd<OwnedFd>>) {
        self.state().source = Some(Arc::clone(&source));
        tokio::spawn(Arc::clone(self).pump(source));
    }

    /// The process has exited a while ago. If another still holds the pipe, the stream ends with
    /// what has been written by now.
    pub(super) fn expire(&self) {
        let mut state = self.state();
        let Phase::Open = state.phase else { return };
        let Some(source) = state.source.clone() else {
            return state.finish(Phase::Ended { truncated: false });
        };
        match pipe::pending(&*source) {
            Ok(Pending { writers_gone: true, .. }) => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "cannot tell whether a process still writes"),
        }
        let unread = pipe::unread(&*source).unwrap_or(0) as u64;
        let at = state.ring.end() + unread;
        state.finish(if unread == 0 { Phase::Ended { truncated: true } } else { Phase::Cut { at } });
        self.room.notify_one();
    }

    /// Who is left, after the process has exited.
    pub(super) fn leftover(&self) -> Leftover {
        let state = self.state();
        let Phase::Open = state.phase else { return Leftover::Nobody };
        let Some(source) = &state.source else { return Leftover::Writer };
        let look = || {
            if pipe::pending(&**source)?.writers_gone {
                return Ok(Leftover::Nobody);
            }
            let held_up = state.waits && pipe::is_full(&**source)?;
            Ok(if held_up { Leftover::HeldUp } else { Leftover::Writer })
        };
        match look() {
            Ok(who) => who,
            Err::<_, io::Error>(error) => {
                tracing::warn!(%error, "cannot tell whether a process still writes");
                Leftover::Writer
            }
        }
    }

    /// Drops what is held and ends the connections. The pump goes on discarding as long as there is
    /// a writer: a process that outlives the one that was deleted gets no SIGPIPE.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.end_connections(&Refusal::new(ErrorCode::NOT_FOUND, "the process has been deleted"));
        let end = state.ring.end();
        state.ring.release(end);
        state.finish(Phase::Ended { truncated: true });
        self.room.notify_one();
    }

    /// Ends the connections for a reason that the stream survives.
    pub(super) fn end_connections(&self, refusal: &Refusal) {
        self.state().end_connections(refusal);
    }

    /// The clock runs again: what stood still for its sake may go on.
    pub(super) fn go_on(&self) {
        self.room.notify_one();
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn figures(&self) -> Figures {
        let mut state = self.state();
        let sent = state.sessions.current().map(|session| session.detail.sent);
        // What was told on a connection that is gone is told, and counted, anew on the next.
        let (told, expected) = match sent {
            Some(sent) => (state.losses.total(), sent.max(state.acked)),
            None => (state.losses.confirmed(), state.acked),
        };
        Figures {
            end: state.ring.end(),
            acked: state.acked,
            lost: told + state.ring.tail().saturating_sub(expected),
            connections: state.sessions.admitted(),
            attempt: state.sessions.highest(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    async fn pump(self: Arc<Self>, source: Arc<AsyncFd<OwnedFd>>) {
        let mut turn = 0;
        loop {
            // Made before the look at the ring, so that it resolves for any release after it.
            let freed = self.pool.freed();
            match source.async_io(Interest::READABLE, |fd| self.pump_once(fd)).await {
                Ok(Pumped::Bytes(len)) => turn += len,
                Ok(Pumped::Full) => self.room.notified().await,
                Ok(Pumped::Starved) => tokio::select! {
                    () = freed => {}
                    () = self.room.notified() => {}
                },
                Ok(Pumped::End) => break,
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {
                    tracing::warn!(%error, "no memory for output, which waits");
                    tokio::time::sleep(MEMORY_RETRY).await;
                }
                Err(error) => {
                    tracing::error!(%error, "cannot read output, which ends here");
                    self.state().finish(Phase::Ended { truncated: true });
                    break;
                }
            }
            if turn >= TURN {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
        self.state().source = None;
    }

    /// Moves what fits into the ring. The lock is held across the system call, which does not wait:
    /// it reads straight into the ring.
    fn pump_once(&self, source: &OwnedFd) -> io::Result<Pumped> {
        let mut state = self.state();
        let max = match state.phase {
            Phase::Open => FILL_MAX,
            Phase::Cut { at } => (at - state.ring.end()).min(FILL_MAX as u64) as usize,
            Phase::Ended { .. } => return self.discard(source),
        };
        loop {
            let full = match state.ring.fill(max, |into| pipe::read(source, into))? {
                Filled::Bytes(0) => {
                    state.finish(Phase::Ended { truncated: false });
                    return Ok(Pumped::End);
                }
                Filled::Bytes(len) => {
                    state.waits = false;
                    state.filled();
                    return Ok(Pumped::Bytes(len));
                }
                Filled::Full => Pumped::Full,
                Filled::Starved => Pumped::Starved,
            };
            if self.policy == Policy::Block || self.clock.is_held() {
                state.waits = true;
                return Ok(full);
            }
            // Nothing may be dropped for bytes that do not come.
            match pipe::pending(source)? {
                Pending { data: true, .. } => state.drop_oldest(),
                Pending { writers_gone: true, .. } => {
                    state.finish(Phase::Ended { truncated: false });
                    return Ok(Pumped::End);
                }
                _ => return Err(io::ErrorKind::WouldBlock.into()),
            }
        }
    }

    /// Reads into memory that nobody looks at.
    fn discard(&self, source: &OwnedFd) -> io::Result<Pumped> {
        let mut scratch = Ring::new(Arc::clone(&self.pool));
        match scratch.fill(FILL_MAX, |into| pipe::read(source, into))? {
            Filled::Bytes(0) => Ok(Pumped::End),
            Filled::Bytes(len) => Ok(Pumped::Bytes(len)),
            Filled::Full | Filled::Starved => Ok(Pumped::Starved),
        }
    }
}

impl State {
    /// Enters `phase`, unless the stream has ended.
    fn finish(&mut self, phase: Phase) {
        if !matches!(self.phase, Phase::Ended { .. }) {
            self.phase = phase;
        }
        self.wake();
    }

    fn end_connections(&mut self, refusal: &Refusal) {
        if let Some(session) = self.sessions.current() {
            session.detail.detach(&self.ring);
        }
        self.sessions.end_all(refusal);
    }

    fn filled(&mut self) {
        if self.phase == (Phase::Cut { at: self.ring.end() }) {
            self.phase = Phase::Ended { truncated: true };
        }
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(session) = self.sessions.current() {
            session.wake();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(session) = self.sessions.current()
            && session.detail.sent < self.ring.tail_after_drop()
        {
            session.detail.detach(&self.ring);
        }
        self.ring.drop_oldest();
    }

    fn acknowledge(&mut self, offset: u64) {
        self.acked = self.acked.max(offset);
        self.losses.confirm(offset);
        if offset > self.ring.tail() {
            self.ring.release(offset);
        }
    }
}
