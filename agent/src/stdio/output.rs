//! An output stream: from the pipe or terminal into the retention ring, and from there to the host.

use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
    time::Duration,
};

use cube_protocol::{
    frame::{BODY_MAX, Flags, Frame, Header, Kind},
    stream::ErrorCode,
};
use tokio::{
    io::{AsyncWrite, Interest, unix::AsyncFd},
    sync::Notify,
};

use super::{
    Policy, locked,
    losses::Losses,
    pipe::{self, Pending},
    pool::Pool,
    ring::{FILL_MAX, Filled, Ring, slices_for},
    session::{Flow, Refusal, Session, Sessions, Signals, Step, Stop, Stream},
};

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

/// A connection's place in the stream.
#[derive(Debug)]
struct Sending {
    /// Everything below was given to the connection.
    sent: u64,
    /// End of the DATA frame that has begun; `sent` if none has.
    frame_end: u64,
    /// The rest of that frame, once the ring need not hold it any longer.
    detached: Option<Vec<u8>>,
    eof_sent: bool,
}

impl Sending {
    /// Lets the ring forget the rest of a frame whose header promises it already: a connection that
    /// takes its time holds at most one frame, and no ring. Due before the ring drops such bytes,
    /// and before the connection is ended.
    fn detach(&mut self, ring: &Ring) {
        if self.sent < self.frame_end && self.detached.is_none() {
            self.detached = Some(ring.copy(self.sent, self.frame_end));
        }
    }
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
}

impl Output {
    pub(super) fn new(epoch: u64, policy: Policy, pool: Arc<Pool>) -> Arc<Output> {
        let state = State {
            ring: Ring::new(Arc::clone(&pool)),
            phase: Phase::Open,
            source: None,
            acked: 0,
            losses: Losses::default(),
            sessions: Sessions::new(),
        };
        Arc::new(Output { epoch, policy, pool, state: Mutex::new(state), room: Notify::new() })
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

    /// Drops what is held and ends the connections. The pump goes on discarding as long as there is
    /// a writer: a process that outlives the one that was deleted gets no SIGPIPE.
    pub(super) fn close(&self) {
        let mut state = self.state();
        let State { ring, sessions, .. } = &mut *state;
        if let Some(session) = sessions.current() {
            session.detail.detach(ring);
        }
        sessions.end_all(&Refusal::new(ErrorCode::NOT_FOUND, "the process has been deleted"));
        ring.release(ring.end());
        state.finish(Phase::Ended { truncated: true });
        self.room.notify_one();
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn figures(&self) -> Figures {
        let mut state = self.state();
        let expected = state.sessions.current().map_or(0, |session| session.detail.sent).max(state.acked);
        Figures {
            end: state.ring.end(),
            acked: state.acked,
            lost: state.losses.total() + state.ring.tail().saturating_sub(expected),
            connections: state.sessions.admitted(),
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
                    state.filled();
                    return Ok(Pumped::Bytes(len));
                }
                Filled::Full => Pumped::Full,
                Filled::Starved => Pumped::Starved,
            };
            if self.policy == Policy::Block {
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

    /// What a connection that is neither refused nor stopped has to write next.
    fn next_output(&mut self, attempt: u64) -> Step {
        let State { ring, phase, losses, sessions, .. } = self;
        let Some(Session { detail: sending, .. }) = sessions.get(attempt) else { return Step::Wait };
        let (tail, end) = (ring.tail(), ring.end());
        if sending.sent < tail {
            let lost = tail - sending.sent;
            losses.add(tail, lost);
            (sending.sent, sending.frame_end) = (tail, tail);
            return Step::Gap { offset: tail, lost };
        }
        if sending.sent < end {
            let len = (end - sending.sent).min(BODY_MAX as u64);
            sending.frame_end = sending.sent + len;
            return Step::Data(Header { len: len as u32, ..Header::new(Kind::Data, sending.sent) });
        }
        match *phase {
            Phase::Ended { truncated } if !sending.eof_sent => {
                sending.eof_sent = true;
                let flags = if truncated { Flags::TRUNCATED } else { Flags::NONE };
                Step::Plain(Header::new(Kind::Eof, end).with_flags(flags))
            }
            _ => Step::Wait,
        }
    }
}

impl Stream for Output {
    fn open(&self, attempt: u64, offset: u64) -> Result<Arc<Signals>, Refusal> {
        let mut state = self.state();
        state.sessions.check(attempt)?;
        let (tail, end) = (state.ring.tail(), state.ring.end());
        if offset > end {
            return Err(Refusal::ahead(offset, end));
        }
        if offset < tail && self.policy == Policy::Block {
            return Err(Refusal::lost(offset, tail));
        }
        let State { ring, sessions, .. } = &mut *state;
        if let Some(replaced) = sessions.current() {
            replaced.detail.detach(ring);
        }
        state.acknowledge(offset);
        state.losses.forget_unconfirmed();
        let start = offset.max(tail);
        state.losses.add(start, start - offset);
        self.room.notify_one();
        let sending = Sending { sent: start, frame_end: start, detached: None, eof_sent: false };
        Ok(state.sessions.admit(attempt, sending))
    }

    fn receive(&self, attempt: u64, frame: &Frame) -> Result<Flow, Refusal> {
        let mut state = self.state();
        let Some(session) = state.sessions.get(attempt).filter(|session| session.is_live()) else {
            return Ok(Flow::Continue);
        };
        let Header { kind, flags, offset, .. } = frame.header;
        match kind {
            Kind::Ack if offset > session.detail.sent => Err(Refusal::protocol(format!(
                "ACK of {offset}, but only {} was sent on this connection",
                session.detail.sent
            ))),
            Kind::Ack => {
                state.acknowledge(offset);
                self.room.notify_one();
                Ok(if flags.contains(Flags::LAST) { Flow::Close } else { Flow::Continue })
            }
            Kind::Stop => {
                if session.stop == Stop::No {
                    session.stop = Stop::Asked;
                    session.wake();
                }
                Ok(Flow::Continue)
            }
            kind => Err(Refusal::unexpected(kind)),
        }
    }

    fn next(&self, attempt: u64) -> Step {
        let mut state = self.state();
        let Some(session) = state.sessions.get(attempt) else { return Step::Wait };
        let sent = session.detail.sent;
        session
            .first_step(self.epoch, sent)
            .or_else(|| session.stop_step(sent))
            .unwrap_or_else(|| state.next_output(attempt))
    }

    /// Writes header and ring memory in one system call. The lock is held across it, which does not
    /// wait: nothing is copied, and no memory is shared beyond the call.
    fn poll_send<W: AsyncWrite + Unpin>(
        &self,
        attempt: u64,
        head: &mut &[u8],
        mut writer: Pin<&mut W>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.state();
        let State { ring, sessions, .. } = &mut *state;
        let Some(session) = sessions.get(attempt) else { return Poll::Ready(Ok(())) };
        let sending = &mut session.detail;
        while !head.is_empty() || sending.sent < sending.frame_end {
            let mut slices = [IoSlice::new(&[]); slices_for(BODY_MAX) + 1];
            slices[0] = IoSlice::new(head);
            let (first, rest) = if head.is_empty() { (0, &mut slices[..]) } else { (1, &mut slices[1..]) };
            let count = match &sending.detached {
                Some(detached) => {
                    let left = (sending.frame_end - sending.sent) as usize;
                    rest[0] = IoSlice::new(&detached[detached.len().saturating_sub(left)..]);
                    1
                }
                None => ring.slices(sending.sent, sending.frame_end, rest),
            };
            let written = ready!(writer.as_mut().poll_write_vectored(context, &slices[..first + count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_head = written.min(head.len());
            *head = &head[of_head..];
            sending.sent += (written - of_head) as u64;
        }
        sending.detached = None;
        Poll::Ready(Ok(()))
    }

    fn refuse(&self, attempt: u64, refusal: Refusal) {
        let mut state = self.state();
        let State { ring, sessions, .. } = &mut *state;
        if let Some(session) = sessions.get(attempt) {
            session.detail.detach(ring);
            session.end(refusal);
        }
    }

    fn leave(&self, attempt: u64) {
        self.state().sessions.remove(attempt);
    }
}
