//! What the two kinds of stream have in common: the connections that have opened them.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use cube_protocol::{
    frame::{Frame, Header, Kind},
    stream::ErrorCode,
};
use tokio::{io::AsyncWrite, sync::Notify};

/// Why a connection ends with an ERROR frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    pub(super) message: String,
    /// `OFFSET_LOST` and `OFFSET_AHEAD`: by how much.
    pub(super) bytes: u64,
}

impl Refusal {
    pub(super) fn new(code: ErrorCode, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into(), bytes: 0 }
    }

    pub(super) fn protocol(message: impl Into<String>) -> Refusal {
        Refusal::new(ErrorCode::PROTOCOL, message)
    }

    /// A frame of a kind that the host never sends on such a stream, or not again.
    pub(super) fn unexpected(kind: Kind) -> Refusal {
        Refusal::protocol(format!("a frame of kind {kind:?} may not come here"))
    }

    pub(super) fn other_timeline(ours: u64, theirs: u64) -> Refusal {
        let message = format!("the guest is on timeline {ours:#018x}, not {theirs:#018x}");
        Refusal::new(ErrorCode::OTHER_TIMELINE, message)
    }

    pub(super) fn lost(offset: u64, held_from: u64) -> Refusal {
        let message = format!("offset {offset} is gone, the stream goes on at {held_from}");
        Refusal { bytes: held_from - offset, ..Refusal::new(ErrorCode::OFFSET_LOST, message) }
    }

    pub(super) fn ahead(offset: u64, end: u64) -> Refusal {
        let message = format!("offset {offset} is beyond the stream, which ends at {end}");
        Refusal { bytes: offset - end, ..Refusal::new(ErrorCode::OFFSET_AHEAD, message) }
    }
}

/// What a connection has to write next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The stream's first answer.
    Opened { epoch: u64, offset: u64 },
    /// A frame without a body.
    Plain(Header),
    /// Output was dropped before it was sent.
    Gap { offset: u64, lost: u64 },
    /// A DATA frame, whose body [`Stream::poll_send`] writes.
    Data(Header),
    /// ERROR; then the connection closes.
    Refuse(Refusal),
    /// Nothing, until [`Signals::wake`].
    Wait,
}

/// What to do after a frame was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// Read the next one.
    Continue,
    /// Close: the host is done with this connection.
    Close,
}

/// One stream as its connections see it. A connection is known by its attempt; all calls are short
/// and never wait.
pub(super) trait Stream: Send + Sync + 'static {
    /// Admits a connection, and tells the one it replaces.
    fn open(&self, attempt: u64, offset: u64) -> Result<Arc<Signals>, Refusal>;

    /// Takes a frame from the host.
    fn receive(&self, attempt: u64, frame: &Frame) -> Result<Flow, Refusal>;

    /// Decides what to write next.
    fn next(&self, attempt: u64) -> Step;

    /// Writes `head`, then the body that the last [`Step::Data`] announced. For streams that have any.
    fn poll_send<W: AsyncWrite + Unpin>(
        &self,
        _attempt: u64,
        _head: &mut &[u8],
        _writer: Pin<&mut W>,
        _context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Makes `refusal` the next and last step of the connection.
    fn refuse(&self, attempt: u64, refusal: Refusal);

    /// The connection is gone.
    fn leave(&self, attempt: u64);
}

/// How a stream reaches the task of one connection. Each has a single waiter, and `notify_one`
/// leaves a permit where nobody waits at that moment; whoever waits looks at the state after each
/// permit and before it waits again. So no change is missed.
#[derive(Debug, Default)]
pub(super) struct Signals {
    /// [`Stream::next`] may have another answer.
    pub(super) wake: Notify,
    /// The connection is to end.
    pub(super) ended: Notify,
}

/// How far STOP has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    No,
    Asked,
    Answered,
}

/// One connection's view of a stream.
#[derive(Debug)]
pub(super) struct Session<T> {
    signals: Arc<Signals>,
    opened: bool,
    pub(super) stop: Stop,
    refusal: Option<Refusal>,
    /// What only this kind of stream keeps.
    pub(super) detail: T,
}

impl<T> Session<T> {
    pub(super) fn is_live(&self) -> bool {
        self.refusal.is_none()
    }

    pub(super) fn wake(&self) {
        self.signals.wake.notify_one();
    }

    pub(super) fn end(&mut self, refusal: Refusal) {
        self.refusal.get_or_insert(refusal);
        self.signals.wake.notify_one();
        self.signals.ended.notify_one();
    }

    /// The step that comes before anything that the kind of stream decides: the refusal whenever
    /// there is one, and once the answer to OPEN.
    pub(super) fn first_step(&mut self, epoch: u64, offset: u64) -> Option<Step> {
        if let Some(refusal) = &self.refusal {
            return Some(Step::Refuse(refusal.clone()));
        }
        if !self.opened {
            self.opened = true;
            return Some(Step::Opened { epoch, offset });
        }
        None
    }

    /// STOPPED if it is due. `Some(Wait)` after it: nothing else may follow.
    pub(super) fn stop_step(&mut self, offset: u64) -> Option<Step> {
        match self.stop {
            Stop::No => None,
            Stop::Asked => {
                self.stop = Stop::Answered;
                Some(Step::Plain(Header::new(Kind::Stopped, offset)))
            }
            Stop::Answered => Some(Step::Wait),
        }
    }
}

/// The connections of one stream: one that is served, and those it has replaced and that have not
/// gone yet.
#[derive(Debug)]
pub(super) struct Sessions<T> {
    highest: Option<u64>,
    admitted: u64,
    by_attempt: BTreeMap<u64, Session<T>>,
}

impl<T> Sessions<T> {
    pub(super) fn new() -> Sessions<T> {
        Sessions { highest: None, admitted: 0, by_attempt: BTreeMap::new() }
    }

    /// What is left of them when all are gone.
    #[cfg(feature = "fuzzing")]
    pub(super) fn fork(&self) -> Sessions<T> {
        Sessions { highest: self.highest, admitted: self.admitted, by_attempt: BTreeMap::new() }
    }

    /// Connections so far.
    pub(super) fn admitted(&self) -> u64 {
        self.admitted
    }

    /// The highest attempt so far; 0 before the first.
    pub(super) fn highest(&self) -> u64 {
        self.highest.unwrap_or(0)
    }

    /// Refuses an attempt that is not above every earlier one.
    pub(super) fn check(&self, attempt: u64) -> Result<(), Refusal> {
        match self.highest {
            Some(highest) if attempt <= highest => Err(Refusal::new(
                ErrorCode::STALE_ATTEMPT,
                format!("attempt {attempt} comes after attempt {highest}"),
            )),
            _ => Ok(()),
        }
    }

    /// Adds a connection that was checked, and ends the others.
    pub(super) fn admit(&mut self, attempt: u64, detail: T) -> Arc<Signals> {
        self.end_all(&Refusal::new(
            ErrorCode::PREEMPTED,
            format!("attempt {attempt} has taken the stream over"),
        ));
        let signals = Arc::<Signals>::default();
        let session =
            Session { signals: Arc::clone(&signals), opened: false, stop: Stop::No, refusal: None, detail };
        self.highest = Some(attempt);
        self.admitted += 1;
        self.by_attempt.insert(attempt, session);
        signals
    }

    /// The connection that is served.
    pub(super) fn current(&mut self) -> Option<&mut Session<T>> {
        self.by_attempt.values_mut().next_back().filter(|session| session.is_live())
    }

    pub(super) fn get(&mut self, attempt: u64) -> Option<&mut Session<T>> {
        self.by_attempt.get_mut(&attempt)
    }

    pub(super) fn end_all(&mut self, refusal: &Refusal) {
        for session in self.by_attempt.values_mut() {
            session.end(refusal.clone());
        }
    }

    pub(super) fn remove(&mut self, attempt: u64) -> Option<Session<T>> {
        self.by_attempt.remove(&attempt)
    }
}
