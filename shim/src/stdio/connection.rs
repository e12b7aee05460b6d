//! Opening a stream of the guest, again and again.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::BytesMut;
use cube_protocol::{
    frame::{Frame, FrameError, Kind, Malformed, read_frame, write_frame},
    ports,
    stream::{self, ErrorCode, Open, Opened},
};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout},
};

use super::{flow::Member, status::Counters};
use crate::agent::{Dial, DialError, printable};

/// Time for one dial, and for the handshake after it.
pub(super) const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A connection that lived this long was worth having: the next is dialled at once.
const STABLE: Duration = Duration::from_secs(1);

/// Connections of one stream that may end because the guest broke the protocol. No agent of ours ever
/// does; one that an escaped container took over does not get to try for ever.
const REFUSALS_MAX: u64 = 16;

/// Which stream of which process, and how to reach it.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) container_id: String,
    pub(super) exec_id: String,
    pub(super) stream: stream::Stream,
    /// Every attempt must be higher.
    pub(super) attempt: u64,
    pub(super) dial: Arc<dyn Dial>,
}

/// Why there is no connection, or no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("cannot reach the guest")]
    Dial(#[from] DialError),
    #[error("the guest did not answer within {ATTEMPT_LIMIT:?}")]
    Timeout,
    #[error("the connection to the guest ended")]
    Closed,
    #[error("the connection to the guest failed")]
    Io(#[from] std::io::Error),
    #[error("the guest broke the protocol: {0}")]
    Protocol(String),
    #[error("the guest broke the protocol")]
    Malformed(#[from] Malformed),
    #[error("the guest broke the protocol")]
    Body(#[source] FrameError),
    #[error("the guest refused the stream: {code:?}, {bytes} bytes: {message}")]
    Refused { code: ErrorCode, bytes: u64, message: String },
}

impl Broken {
    /// Whether the guest did what the protocol forbids, or says that we did.
    fn is_misbehaviour(&self) -> bool {
        match self {
            Broken::Protocol(_) | Broken::Malformed(_) | Broken::Body(_) => true,
            Broken::Refused { code, .. } => {
                matches!(code, ErrorCode::PROTOCOL | ErrorCode::ERROR_UNSPECIFIED)
            }
            _ => false,
        }
    }

    /// Whether the stream cannot be had any more.
    fn is_final(&self) -> bool {
        match self {
            Broken::Refused { code, .. } => match code {
                ErrorCode::NOT_FOUND
                | ErrorCode::STALE_ATTEMPT
                | ErrorCode::PREEMPTED
                | ErrorCode::OFFSET_LOST
                | ErrorCode::OFFSET_AHEAD
                | ErrorCode::OTHER_TIMELINE => true,
                ErrorCode::EXHAUSTED | ErrorCode::PROTOCOL | ErrorCode::ERROR_UNSPECIFIED => false,
            },
            _ => false,
        }
    }

    /// Another connection has the stream now: nothing is wrong.
    pub(super) fn is_taken_over(&self) -> bool {
        matches!(self, Broken::Refused { code: ErrorCode::PREEMPTED | ErrorCode::STALE_ATTEMPT, .. })
    }
}

impl From<FrameError> for Broken {
    fn from(e: FrameError) -> Broken {
        match e {
            FrameError::Malformed(e) => Broken::Malformed(e),
            FrameError::Io(e) => Broken::Io(e),
            e @ FrameError::Body { .. } => Broken::Body(e),
        }
    }
}

/// The body of an ERROR frame as an error.
pub(super) fn refusal(frame: &Frame) -> Broken {
    match frame.message::<stream::Error>() {
        Ok(error) => {
            let code = error.code.enum_value_or_default();
            Broken::Refused { code, bytes: error.bytes, message: printable(&error.message) }
        }
        Err(e) => Broken::Body(e),
    }
}

/// Where a stream is to be opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub(super) timeline: u64,
    /// 0 if it is not known yet.
    pub(super) epoch: u64,
    pub(super) offset: u64,
}

/// A connection on which the guest has accepted the stream.
pub(super) struct Connected {
    pub(super) socket: UnixStream,
    pub(super) epoch: u64,
    /// Where the guest goes on (output) or wants us to (stdin).
    pub(super) offset: u64,
}

/// All connections that one stream ever has.
pub(super) struct Connections {
    endpoint: Endpoint,
    counters: Arc<Counters>,
    attempt: u64,
    backoff: Duration,
    connected: Option<Instant>,
}

impl Connections {
    /// The first attempt is the wall clock's microsecond, so that a successor of this process, which
    /// does not know how often it has dialled, has the higher attempt.
    pub(super) fn new(endpoint: Endpoint, counters: Arc<Counters>) -> Connections {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let attempt = u64::try_from(now.as_micros()).unwrap_or(u64::MAX / 2).max(endpoint.attempt);
        Connections { endpoint, counters, attempt, backoff: BACKOFF_MIN, connected: None }
    }

    /// Opens the stream at `offset`, trying until it works or cannot work any more, or until `flow` asks
    /// for rest, which is `None`. An attempt that has begun is not given up for that, but a connection be
    /// closed as every other is: a VM that is saved with one half open is not restored reliably.
    ///
    /// Cancel safe: the guest may have seen an attempt, which the next one replaces.
    pub(super) async fn open(&mut self, at: At, flow: &mut Member) -> Result<Option<Connected>, Broken> {
        loop {
            let broken = match self.try_open(at).await {
                Ok(connected) => {
                    self.counters.connections.add(1);
                    self.counters.connected.set(1);
                    self.connected = Some(Instant::now());
                    return Ok(Some(connected));
                }
                Err(broken) => broken,
            };
            tokio::select! {
                again = self.failed(broken) => again?,
                () = flow.asked_to_rest() => return Ok(None),
            }
        }
    }

    /// Takes note of why a connection ended, and waits as long as the next should wait. An error is
    /// final.
    pub(super) async fn failed(&mut self, broken: Broken) -> Result<(), Broken> {
        self.closed();
        if broken.is_misbehaviour() {
            self.counters.refused.add(1);
            tracing::warn!(
                container = self.endpoint.container_id,
                exec = self.endpoint.exec_id,
                stream = ?self.endpoint.stream,
                error = %super::error_chain(&broken),
                "closed a stream connection"
            );
            if self.counters.refused.get() >= REFUSALS_MAX {
                return Err(broken);
            }
        }
        if broken.is_final() {
            return Err(broken);
        }
        let stable = self.connected.take().is_some_and(|since| since.elapsed() >= STABLE);
        let wait = if stable { BACKOFF_MIN } else { self.backoff };
        tokio::time::sleep(wait).await;
        self.backoff = (wait * 2).min(BACKOFF_MAX);
        Ok(())
    }

    /// The guest has seen attempts up to `attempt`.
    pub(super) fn seen(&mut self, attempt: u64) {
        self.attempt = self.attempt.max(attempt);
        self.connected = None;
        self.progressed();
    }

    /// The last connection has ended.
    pub(super) fn closed(&self) {
        self.counters.connected.set(0);
    }

    /// Data has come through: a failure after that is a new one.
    pub(super) fn progressed(&mut self) {
        self.backoff = BACKOFF_MIN;
    }

    async fn try_open(&mut self, At { timeline, epoch, offset }: At) -> Result<Connected, Broken> {
        let dial = self.endpoint.dial.dial(ports::STREAM);
        let mut socket = timeout(ATTEMPT_LIMIT, dial).await.map_err(|_| Broken::Timeout)??;
        self.attempt += 1;
        let open = Open {
            container_id: self.endpoint.container_id.clone(),
            exec_id: self.endpoint.exec_id.clone(),
            stream: self.endpoint.stream.into(),
            timeline,
            epoch,
            attempt: self.attempt,
            ..Default::default()
        };
        let open = Frame::with_message(Kind::Open, offset, &open)?;
        let answer = async {
            write_frame(&mut socket, &open).await?;
            // Reads exactly one frame: what follows is left on the socket.
            read_frame(&mut socket, &mut BytesMut::new()).await?.ok_or(Broken::Closed)
        };
        let answer = timeout(ATTEMPT_LIMIT, answer).await.map_err(|_| Broken::Timeout)??;
        match answer.header.kind {
            Kind::Opened => {
                let opened = answer.message::<Opened>()?;
                if opened.epoch == 0 {
                    // It stands for "not known yet": the next connection could bring another one.
                    return Err(Broken::Protocol("opened epoch 0".into()));
                }
                if epoch != 0 && opened.epoch != epoch {
                    let text = format!("opened epoch {:#x} instead of {epoch:#x}", opened.epoch);
                    return Err(Broken::Protocol(text));
                }
                Ok(Connected { socket, epoch: opened.epoch, offset: answer.header.offset })
            }
            Kind::Error => Err(refusal(&answer)),
            kind => Err(Broken::Protocol(format!("answered OPEN with {kind:?}"))),
        }
    }
}
