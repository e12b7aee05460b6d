//! An input stream: from the host into the pipe or terminal.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard},
};

use cube_protocol::{
    frame::{Flags, Frame, Header, Kind, STDIN_WINDOW},
    stream::ErrorCode,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use super::{
    locked, pipe,
    session::{Flow, Refusal, Session, Sessions, Signals, Step, Stop, Stream},
};

/// stdin of one process.
#[derive(Debug)]
pub(super) struct Input {
    epoch: u64,
    terminal: bool,
    state: Mutex<State>,
    /// The pump, its only waiter, may have something to do. `notify_one` leaves a permit, and the
    /// pump looks at the state after every wait, so no change is missed.
    work: Notify,
}

#[derive(Debug)]
struct State {
    /// Bytes written to the process, or given up because nobody reads them.
    consumed: u64,
    /// Received and not written yet; of the served connection, which repeats them if it dies.
    pending: VecDeque<u8>,
    /// The host says that its input ends after `pending`; of the served connection.
    eof: bool,
    sink: Sink,
    sessions: Sessions<Receiving>,
}

/// The far end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    /// Somebody may read, now or later.
    Open,
    /// Nobody reads any more: what comes is consumed and thrown away, so that the host never hangs.
    Abandoned,
    /// The agent's end is closed; the process has seen or will see the end. What another host sends all the
    /// same is thrown away as well.
    Closed,
}

/// What a connection has been told.
#[derive(Debug)]
struct Receiving {
    /// Offset of the last ACK, or of OPENED.
    acked: u64,
    /// It has sent EOF, and no ACK says yet that EOF has reached the process.
    eof_unanswered: bool,
}

/// What the pump does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Write,
    Wait,
    /// Let go of the sink.
    Finish,
}

/// Figures for `Guest.Info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figures {
    pub(super) received: u64,
    pub(super) consumed: u64,
    pub(super) connections: u64,
    pub(super) attempt: u64,
}

impl Input {
    /// On a `terminal`, EOF is acknowledged and does nothing else.
    pub(super) fn new(epoch: u64, terminal: bool) -> Arc<Input> {
        let state = State {
            consumed: 0,
            pending: VecDeque::new(),
            eof: false,
            sink: Sink::Open,
            sessions: Sessions::new(),
        };
        Arc::new(Input { epoch, terminal, state: Mutex::new(state), work: Notify::new() })
    }

    /// A copy without connections, whose sink is to be attached.
    #[cfg(feature = "fuzzing")]
    pub(super) fn fork(&self) -> Arc<Input> {
        let fork = Input::new(self.epoch, self.terminal);
        let (ours, mut theirs) = (self.state(), fork.state());
        theirs.consumed = ours.consumed;
        theirs.sink = ours.sink;
        theirs.sessions = ours.sessions.fork();
        drop(theirs);
        fork
    }

    /// Begins to write to `sink`.
    pub(super) fn attach(self: &Arc<Self>, sink: Arc<AsyncFd<OwnedFd>>) {
        tokio::spawn(Arc::clone(self).pump(sink));
    }

    /// Closes the agent's end and ends the connections.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.sink = Sink::Closed;
        state.pending = VecDeque::new();
        state.sessions.end_all(&Refusal::new(ErrorCode::NOT_FOUND, "the process has been deleted"));
        self.work.notify_one();
    }

    /// Ends the connections for a reason that the stream survives, and forgets what they have brought
    /// and the process has not got.
    pub(super) fn end_connections(&self, refusal: &Refusal) {
        let mut state = self.state();
        state.sessions.end_all(refusal);
        state.rewind();
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Bytes received and consumed; connections so far.
    pub(super) fn figures(&self) -> Figures {
        let state = self.state();
        Figures {
            received: state.received(),
            consumed: state.consumed,
            connections: state.sessions.admitted(),
            attempt: state.sessions.highest(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    async fn pump(self: Arc<Self>, sink: Arc<AsyncFd<OwnedFd>>) {
        loop {
            let work = self.state().work(self.terminal);
            match work {
                Work::Wait => self.work.notified().await,
                Work::Finish => return,
                // A full pipe may stay full for as long as it likes; meanwhile the stream may be
                // stopped or closed. Waiting for readiness can be given up at no loss.
                Work::Write => tokio::select! {
                    written = sink.async_io(Interest::WRITABLE, |fd| self.write_once(fd)) => {
                        if let Err(error) = written {
                            tracing::debug!(%error, "nobody reads this input any more");
                            self.state().abandon();
                        }
                    }
                    () = self.work.notified() => {}
                },
            }
        }
    }

    fn write_once(&self, sink: &OwnedFd) -> io::Result<()> {
        let mut state = self.state();
        if state.pending.is_empty() {
            return Ok(());
        }
        let (front, back) = state.pending.as_slices();
        let written = pipe::write(sink, &[IoSlice::new(front), IoSlice::new(back)])?;
        state.pending.drain(..written);
        state.consumed += written as u64;
        state.settle();
        Ok(())
    }
}

impl State {
    fn received(&self) -> u64 {
        self.consumed + self.pending.len() as u64
    }

    fn work(&mut self, terminal: bool) -> Work {
        match self.sink {
            Sink::Closed | Sink::Abandoned => Work::Finish,
            Sink::Open if !self.pending.is_empty() => Work::Write,
            Sink::Open if self.eof && !terminal => {
                self.sink = Sink::Closed;
                self.wake();
                Work::Finish
            }
            Sink::Open => Work::Wait,
        }
    }

    fn abandon(&mut self) {
        self.sink = Sink::Abandoned;
        self.consumed = self.received();
        self.pending.clear();
        self.settle();
    }

    /// After bytes were consumed: gives memory back, and has them acknowledged.
    fn settle(&mut self) {
        if self.pending.is_empty() {
            self.pending = VecDeque::new();
        }
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(session) = self.sessions.current() {
            session.wake();
        }
    }

    /// Forgets what the connection would have to repeat.
    fn rewind(&mut self) {
        self.pending = VecDeque::new();
        self.eof = false;
    }

    fn receive_data(&mut self, acked: u64, offset: u64, body: &[u8]) -> Result<(), Refusal> {
        let received = self.received();
        if offset != received {
            return Err(Refusal::protocol(format!("DATA at {offset}, but {received} comes next")));
        }
        let end = offset + body.len() as u64;
        if end - acked > STDIN_WINDOW {
            return Err(Refusal::protocol(format!(
                "DATA up to {end} with only {acked} acknowledged: the window is {STDIN_WINDOW}"
            )));
        }
        if self.eof {
            return Err(Refusal::protocol(format!("DATA at {offset} after EOF")));
        }
        match self.sink {
            // A host that has not sent the EOF itself need not know of it: in a clone, the host of the
            // original has.
            Sink::Abandoned | Sink::Closed => {
                self.consumed = end;
                self.wake();
            }
            Sink::Open => self.pending.extend(body),
        }
        Ok(())
    }

    fn receive_eof(&mut self, offset: u64) -> Result<(), Refusal> {
        let received = self.received();
        if offset != received {
            return Err(Refusal::protocol(format!("EOF at {offset}, but {received} comes next")));
        }
        self.eof = true;
        Ok(())
    }

    /// ACK if there is something new to acknowledge: bytes, or (LAST) that EOF has reached the process.
    fn next_ack(&mut self, attempt: u64, terminal: bool) -> Step {
        let eof_done = match self.sink {
            Sink::Open => terminal && self.pending.is_empty(),
            Sink::Abandoned | Sink::Closed => true,
        };
        let State { consumed, sessions, .. } = self;
        let Some(Session { detail: receiving, .. }) = sessions.get(attempt) else { return Step::Wait };
        let eof_answered = receiving.eof_unanswered && eof_done;
        if *consumed == receiving.acked && !eof_answered {
            return Step::Wait;
        }
        receiving.acked = *consumed;
        receiving.eof_unanswered &= !eof_answered;
        let flags = if eof_answered { Flags::LAST } else { Flags::NONE };
        Step::Plain(Header::new(Kind::Ack, *consumed).with_flags(flags))
    }
}

impl Stream for Input {
    fn open(&self, attempt: u64, offset: u64) -> Result<Arc<Signals>, Refusal> {
        let mut state = self.state();
        state.sessions.check(attempt)?;
        if offset != 0 && offset < state.consumed {
            return Err(Refusal::lost(offset, state.consumed));
        }
        state.rewind();
        let receiving = Receiving { acked: state.consumed, eof_unanswered: false };
        Ok(state.sessions.admit(attempt, receiving))
    }

    fn receive(&self, attempt: u64, frame: &Frame) -> Result<Flow, Refusal> {
        let mut state = self.state();
        let Some(session) = state.sessions.get(attempt).filter(|session| session.is_live()) else {
            return Ok(Flow::Continue);
        };
        let (stopped, acked) = (session.stop != Stop::No, session.detail.acked);
        let Header { kind, flags, offset, .. } = frame.header;
        match kind {
            Kind::Ack if flags.contains(Flags::LAST) => return Ok(Flow::Close),
            // STOPPED tells the host that none of it was consumed.
            Kind::Data | Kind::Eof if stopped => {}
            Kind::Stop => {
                if !stopped {
                    session.stop = Stop::Asked;
                    session.wake();
                    state.rewind();
                }
            }
            Kind::Data => {
                state.receive_data(acked, offset, &frame.body)?;
                self.work.notify_one();
            }
            Kind::Eof => {
                session.detail.eof_unanswered = true;
                session.wake();
                state.receive_eof(offset)?;
                self.work.notify_one();
            }
            kind => return Err(Refusal::unexpected(kind)),
        }
        Ok(Flow::Continue)
    }

    fn next(&self, attempt: u64) -> Step {
        let mut state = self.state();
        let consumed = state.consumed;
        let Some(session) = state.sessions.get(attempt) else { return Step::Wait };
        // What was consumed after OPEN and before this answer counts as acknowledged by it.
        if let Some(step) = session.first_step(self.epoch, session.detail.acked) {
            return step;
        }
        session.stop_step(consumed).unwrap_or_else(|| state.next_ack(attempt, self.terminal))
    }

    fn refuse(&self, attempt: u64, refusal: Refusal) {
        if let Some(session) = self.state().sessions.get(attempt) {
            session.end(refusal);
        }
    }

    fn leave(&self, attempt: u64) {
        let mut state = self.state();
        let served = state.sessions.remove(attempt).is_some_and(|session| session.is_live());
        if served {
            state.rewind();
        }
    }
}
