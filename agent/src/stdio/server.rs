//! One connection of the stream port, from its OPEN to its end.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::BytesMut;
use cube_protocol::{
    frame::{Frame, FrameError, Header, Kind, read_frame, write_frame, write_header},
    stream::{self, ErrorCode},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    time::timeout,
};

use super::{
    Endpoint, Hub, ProcessId,
    session::{Flow, Refusal, Signals, Step, Stream},
};

/// Most connections at once: as many as Cloud Hypervisor gives to one guest.
const CONNECTIONS_MAX: usize = 1023;

/// How long a connection may take to send its OPEN.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that ends may take to read the ERROR that says why.
const LINGER: Duration = Duration::from_secs(10);

/// Bytes of input that are read ahead. A dozen ACKs: the bodies of larger frames pass it by.
const READ_AHEAD: usize = 256;

/// Bytes that one connection sends before other tasks get their turn.
const TURN: usize = 128 * 1024;

/// Why a connection ended, if not by the host's wish.
enum End {
    /// The host closed it, or it broke. The host opens another if it wants to.
    Closed,
    /// The agent wants no more of it.
    Refused(Refusal),
}

pub(super) async fn serve<S>(hub: Arc<Hub>, connection: S)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (reader, mut writer) = tokio::io::split(connection);
    let mut reader = BufReader::with_capacity(READ_AHEAD, reader);
    let _counted = match Counted::one_more(&hub) {
        Ok(counted) => counted,
        Err(refusal) => return tell(&mut writer, refusal).await,
    };
    let refusal = match timeout(OPEN_TIMEOUT, read_open(&mut reader)).await {
        Ok(Ok((open, offset))) => match find(&hub, &open) {
            Ok(Endpoint::Output(output)) => match output.open(open.attempt, offset) {
                Ok(signals) => {
                    return Connection::new(&hub, &*output, open.attempt, &signals).run(reader, writer).await;
                }
                Err(refusal) => refusal,
            },
            Ok(Endpoint::Input(input)) => match input.open(open.attempt, offset) {
                Ok(signals) => {
                    return Connection::new(&hub, &*input, open.attempt, &signals).run(reader, writer).await;
                }
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        },
        Ok(Err(End::Refused(refusal))) => refusal,
        Ok(Err(End::Closed)) => return,
        Err(_) => {
            tracing::warn!("a stream connection sent no OPEN for {OPEN_TIMEOUT:?} and is closed");
            hub.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
    };
    hub.count(&refusal);
    tell(&mut writer, refusal).await;
}

/// A connection among [`CONNECTIONS_MAX`].
struct Counted<'a>(&'a Hub);

impl<'a> Counted<'a> {
    fn one_more(hub: &'a Hub) -> Result<Counted<'a>, Refusal> {
        let counted = Counted(hub);
        match hub.connections.fetch_add(1, Ordering::Relaxed) {
            before if before < CONNECTIONS_MAX => Ok(counted),
            _ => Err(Refusal::new(
                ErrorCode::EXHAUSTED,
                format!("there are {CONNECTIONS_MAX} connections already"),
            )),
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn read_open<R: AsyncRead + Unpin>(reader: &mut R) -> Result<(stream::Open, u64), End> {
    let frame = next_frame(reader).await?;
    let Header { kind: Kind::Open, offset, .. } = frame.header else {
        let message = format!("the first frame is of kind {:?}, not Open", frame.header.kind);
        return Err(End::Refused(Refusal::protocol(message)));
    };
    let open = frame.message().map_err(|error| End::Refused(malformed(&error)))?;
    Ok((open, offset))
}

async fn next_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Frame, End> {
    // A buffer for each frame: one that is kept would hold 64 KiB for a connection that is silent.
    match read_frame(reader, &mut BytesMut::new()).await {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(End::Closed),
        Err(FrameError::Io(error)) => {
            tracing::debug!(%error, "a stream connection broke");
            Err(End::Closed)
        }
        Err(error) => Err(End::Refused(malformed(&error))),
    }
}

fn malformed(error: &FrameError) -> Refusal {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Refusal::protocol(format!("{error}{cause}"))
}

fn find(hub: &Hub, open: &stream::Open) -> Result<Endpoint, Refusal> {
    let ours = hub.timeline();
    if open.timeline != ours {
        return Err(Refusal::other_timeline(ours, open.timeline));
    }
    let wanted = open
        .stream
        .enum_value()
        .ok()
        .filter(|wanted| *wanted != stream::Stream::STREAM_UNSPECIFIED)
        .ok_or_else(|| Refusal::protocol(format!("stream {} is not defined", open.stream.value())))?;
    let process = ProcessId { container: open.container_id.clone(), exec: open.exec_id.clone() };
    let endpoint = hub.endpoint(&process, wanted).ok_or_else(|| {
        Refusal::new(ErrorCode::NOT_FOUND, format!("process {process:?} has no stream {wanted:?}"))
    })?;
    match open.epoch {
        0 => Ok(endpoint),
        epoch if epoch == endpoint.epoch() => Ok(endpoint),
        epoch => Err(Refusal::new(
            ErrorCode::NOT_FOUND,
            format!("the stream of epoch {epoch:#018x} is gone, another has its name"),
        )),
    }
}

/// Sends ERROR to a connection that opened no stream.
async fn tell<W: AsyncWrite + Unpin>(writer: &mut W, refusal: Refusal) {
    tracing::info!(code = ?refusal.code, "stream connection refused: {}", refusal.message);
    if let Ok(Err(error)) = timeout(LINGER, write_error(writer, refusal)).await {
        tracing::debug!(%error, "the refused connection broke");
    }
}

async fn write_error<W: AsyncWrite + Unpin>(writer: &mut W, refusal: Refusal) -> Result<(), FrameError> {
    let Refusal { code, message, bytes } = refusal;
    let body = stream::Error { code: code.into(), message, bytes, ..Default::default() };
    write_frame(writer, &Frame::with_message(Kind::Error, 0, &body)?).await
}

/// A connection that has opened a stream.
struct Connection<'a, T: Stream> {
    hub: &'a Hub,
    stream: &'a T,
    attempt: u64,
    signals: &'a Signals,
}

impl<'a, T: Stream> Connection<'a, T> {
    fn new(hub: &'a Hub, stream: &'a T, attempt: u64, signals: &'a Signals) -> Self {
        Connection { hub, stream, attempt, signals }
    }

    /// Reads and writes at once until one of them ends the connection. Neither waits for the other:
    /// STOP and ACK are seen however slowly the host takes output.
    async fn run<R, W>(self, mut reader: R, mut writer: W)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let transmit = self.transmit(&mut writer);
        tokio::pin!(transmit);
        tokio::select! {
            biased;
            end = self.receive(&mut reader) => match end {
                End::Closed => return,
                End::Refused(refusal) => {
                    self.hub.count(&refusal);
                    self.stream.refuse(self.attempt, refusal);
                }
            },
            () = self.signals.ended.notified() => {}
            result = &mut transmit => {
                if let Err(error) = result {
                    tracing::debug!(%error, "a stream connection broke");
                }
                return;
            }
        }
        // The frame that has begun must be finished before ERROR; a host that reads neither is left.
        let _ = timeout(LINGER, transmit).await;
    }

    async fn receive<R: AsyncRead + Unpin>(&self, reader: &mut R) -> End {
        loop {
            let frame = match next_frame(reader).await {
                Ok(frame) => frame,
                Err(end) => return end,
            };
            match self.stream.receive(self.attempt, &frame) {
                Ok(Flow::Continue) => {}
                Ok(Flow::Close) => return End::Closed,
                Err(refusal) => return End::Refused(refusal),
            }
        }
    }

    /// Writes what the stream has to say, up to and including an ERROR.
    async fn transmit<W: AsyncWrite + Unpin>(&self, writer: &mut W) -> Result<(), FrameError> {
        let mut turn = 0;
        loop {
            match self.stream.next(self.attempt) {
                Step::Wait => {
                    turn = 0;
                    self.signals.wake.notified().await;
                }
                Step::Data(header) => {
                    let head = header.encode();
                    let mut head = &head[..];
                    poll_fn(|context| {
                        self.stream.poll_send(self.attempt, &mut head, Pin::new(&mut *writer), context)
                    })
                    .await?;
                    turn += header.len as usize;
                }
                Step::Plain(header) => write_header(writer, header).await?,
                Step::Opened { epoch, offset } => {
                    let body = stream::Opened { epoch, ..Default::default() };
                    write_frame(writer, &Frame::with_message(Kind::Opened, offset, &body)?).await?;
                }
                Step::Gap { offset, lost } => {
                    let body = stream::Gap { lost_bytes: lost, ..Default::default() };
                    write_frame(writer, &Frame::with_message(Kind::Gap, offset, &body)?).await?;
                }
                Step::Refuse(refusal) => return write_error(writer, refusal).await,
            }
            if turn >= TURN {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

impl<T: Stream> Drop for Connection<'_, T> {
    fn drop(&mut self) {
        self.stream.leave(self.attempt);
    }
}
