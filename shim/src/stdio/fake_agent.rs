//! The guest's end of the stream port for tests: keeps output until it is acknowledged, and fails in
//! every way that a connection to a guest can.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::BytesMut;
use cube_protocol::{
    frame::{Flags, Frame, Header, Kind, read_frame},
    ports,
    stream::{self, ErrorCode, Gap, Open, Opened, Stream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Handle,
    sync::watch,
};

use super::Begin;
use crate::agent::{Dial, DialError};

pub(super) const EPOCH: u64 = 77;
pub(super) const TIMELINE: u64 = 5;

/// What happens to one connection.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// It ends when this many bytes have gone to the host.
    CutAfterSending(usize),
    /// It ends when this many bytes have come from the host.
    CutAfterReceiving(usize),
    /// The host gets these bytes after OPENED, and then the end.
    Raw(Vec<u8>),
    /// OPEN is answered with this error.
    Refuse(ErrorCode),
    /// OPEN is not answered.
    Silence,
    /// The dial fails.
    NoDial,
    /// The stream goes on at this offset in OPENED.
    OpenedAt(u64),
}

#[derive(Default, Clone)]
struct State {
    /// 0 is [`TIMELINE`].
    timeline: u64,
    outputs: HashMap<i32, Output>,
    stdin: Stdin,
    faults: VecDeque<Fault>,
    opens: Vec<(u64, Open)>,
    /// The highest of each stream.
    attempts: HashMap<i32, u64>,
    /// Connections that are being served.
    connections: usize,
    ignores_stop: bool,
}

/// One output stream of the guest.
#[derive(Default, Clone)]
struct Output {
    /// All bytes; those in `gaps` are never sent.
    data: Vec<u8>,
    gaps: Vec<(u64, u64)>,
    acked: u64,
    eof: Option<Flags>,
    last_acked: bool,
}

/// What the guest sends next.
enum Step {
    /// Nothing up to this offset.
    Gap(u64),
    Data(Vec<u8>),
    End(Flags),
    Wait,
}

impl Output {
    /// What follows offset `at`, at most `size` bytes of it.
    fn step(&self, at: u64, size: usize) -> Step {
        let end = self.data.len() as u64;
        if let Some((from, to)) = self.gaps.iter().find(|(from, to)| (*from..*to).contains(&at)) {
            assert_eq!(*from, at);
            Step::Gap(*to)
        } else if at < end {
            let limit = self.gaps.iter().map(|gap| gap.0).find(|gap| *gap > at).unwrap_or(end);
            let to = limit.min(at + size as u64);
            Step::Data(self.data[at as usize..to as usize].to_vec())
        } else {
            self.eof.map_or(Step::Wait, Step::End)
        }
    }
}

/// What the process has been given.
#[derive(Default, Clone)]
pub(super) struct Stdin {
    pub(super) bytes: Vec<u8>,
    pub(super) eof: bool,
    /// Whether the process has closed it.
    pub(super) closed: bool,
}

/// The guest at some time.
pub(super) struct Snapshot(State);

impl Snapshot {
    /// It was taken when only so much of a stream was acknowledged.
    pub(super) fn acknowledge(&mut self, stream: Stream, offset: u64) {
        self.0.outputs.entry(stream as i32).or_default().acked = offset;
    }
}

/// The fake guest.
pub(super) struct FakeAgent {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    /// Bytes of one DATA frame at most.
    frame: usize,
    /// The test's: a stream with a log has a runtime of its own, which ends with it.
    runtime: Handle,
}

impl FakeAgent {
    pub(super) fn new(frame: usize) -> Arc<FakeAgent> {
        let (changed, _) = watch::channel(());
        Arc::new(FakeAgent { state: Mutex::default(), changed, frame, runtime: Handle::current() })
    }

    pub(super) fn with_faults(frame: usize, faults: impl IntoIterator<Item = Fault>) -> Arc<FakeAgent> {
        let agent = FakeAgent::new(frame);
        agent.lock().faults.extend(faults);
        agent
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.send_replace(());
        result
    }

    fn output<T>(&self, stream: Stream, change: impl FnOnce(&mut Output) -> T) -> T {
        self.change(|state| change(state.outputs.entry(stream as i32).or_default()))
    }

    fn look<T>(&self, stream: Stream, look: impl FnOnce(&Output) -> T) -> T {
        look(self.lock().outputs.entry(stream as i32).or_default())
    }

    /// The process writes.
    pub(super) fn write(&self, stream: Stream, bytes: &[u8]) {
        self.output(stream, |output| output.data.extend_from_slice(bytes));
    }

    /// The process writes, and the guest drops it.
    pub(super) fn lose(&self, stream: Stream, bytes: u64) {
        self.output(stream, |output| {
            let at = output.data.len() as u64;
            output.data.resize(output.data.len() + bytes as usize, 0);
            output.gaps.push((at, at + bytes));
        });
    }

    /// The last writer of the stream has gone.
    pub(super) fn end(&self, stream: Stream, flags: Flags) {
        self.output(stream, |output| output.eof = Some(flags));
    }

    /// What a snapshot of the guest has, which must be at rest.
    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot(self.lock().clone())
    }

    /// The guest is what it was, on another timeline. Tells where its streams are.
    pub(super) fn roll_back(&self, to: &Snapshot, timeline: u64) -> Begin {
        assert_eq!(self.connections(), 0, "the guest is not at rest");
        self.take_over(to, timeline)
    }

    /// The same of a guest that is not at rest.
    pub(super) fn take_over(&self, Snapshot(state): &Snapshot, timeline: u64) -> Begin {
        self.change(|now| {
            let (opens, connections) = (std::mem::take(&mut now.opens), now.connections);
            *now = State { timeline, opens, connections, ..state.clone() };
            let output = |stream: Stream| now.outputs.get(&(stream as i32)).map_or(0, |output| output.acked);
            Begin {
                stdin: now.stdin.bytes.len() as u64,
                stdout: output(Stream::STDOUT).max(output(Stream::TERMINAL)),
                stderr: output(Stream::STDERR),
                attempt: now.attempts.values().copied().max().unwrap_or(0),
            }
        })
    }

    fn timeline(&self) -> u64 {
        match self.lock().timeline {
            0 => TIMELINE,
            timeline => timeline,
        }
    }

    /// The process closes its stdin.
    pub(super) fn close_stdin(&self) {
        self.change(|state| state.stdin.closed = true);
    }

    /// From now on STOP is not answered.
    pub(super) fn ignore_stop(&self, ignore: bool) {
        self.lock().ignores_stop = ignore;
    }

    /// Connections at the moment.
    pub(super) fn connections(&self) -> usize {
        self.lock().connections
    }

    pub(super) fn acked(&self, stream: Stream) -> u64 {
        self.look(stream, |output| output.acked)
    }

    pub(super) fn is_released(&self, stream: Stream) -> bool {
        self.look(stream, |output| output.last_acked)
    }

    /// Offsets and bodies of all OPENs so far.
    pub(super) fn opens(&self) -> Vec<(u64, Open)> {
        self.lock().opens.clone()
    }

    pub(super) fn stdin(&self) -> Stdin {
        self.lock().stdin.clone()
    }

    /// Resolves when `condition` holds.
    pub(super) async fn until(&self, condition: impl Fn(&FakeAgent) -> bool) {
        let mut changed = self.changed.subscribe();
        while !condition(self) {
            changed.changed().await.unwrap();
        }
    }

    async fn serve(self: Arc<Self>, socket: UnixStream, fault: Option<Fault>) -> io::Result<()> {
        let (mut reader, writer) = socket.into_split();
        let mut writer = Cut { writer, left: usize::MAX };
        let mut receiving = usize::MAX;
        match &fault {
            Some(Fault::CutAfterSending(n)) => writer.left = *n,
            Some(Fault::CutAfterReceiving(n)) => receiving = *n,
            _ => {}
        }
        let mut budget = (&mut reader).take(receiving as u64);
        let open = read(&mut budget).await?;
        let message: Open = open.message().map_err(io::Error::other)?;
        let offset = open.header.offset;
        self.change(|state| {
            state.opens.push((offset, message.clone()));
            let highest = state.attempts.entry(message.stream.value()).or_default();
            assert!(message.attempt > *highest, "attempts must increase");
            *highest = message.attempt;
        });
        match fault {
            Some(Fault::Refuse(code)) => return writer.error(code).await,
            Some(Fault::Silence) => return std::future::pending().await,
            Some(Fault::Raw(bytes)) => {
                writer.message(Kind::Opened, offset, &opened()).await?;
                return writer.send(&bytes).await;
            }
            Some(Fault::OpenedAt(at)) => {
                writer.message(Kind::Opened, at, &opened()).await?;
                return std::future::pending().await;
            }
            _ => {}
        }
        if message.timeline != self.timeline() {
            return writer.error(ErrorCode::OTHER_TIMELINE).await;
        }
        match message.stream.enum_value_or_default() {
            Stream::STDIN => self.take_input(budget, writer).await,
            stream => {
                if message.epoch != 0 && message.epoch != EPOCH {
                    return writer.error(ErrorCode::NOT_FOUND).await;
                }
                self.give_output(stream, offset, budget, writer).await
            }
        }
    }

    async fn give_output(
        &self,
        stream: Stream,
        from: u64,
        mut reader: tokio::io::Take<&mut OwnedReadHalf>,
        mut writer: Cut,
    ) -> io::Result<()> {
        let held = self.output(stream, |output| (output.acked, output.data.len() as u64));
        if from < held.0 {
            return writer.error(ErrorCode::OFFSET_LOST).await;
        }
        if from > held.1 {
            return writer.error(ErrorCode::OFFSET_AHEAD).await;
        }
        self.output(stream, |output| output.acked = from);
        writer.message(Kind::Opened, from, &opened()).await?;
        // Not frames of the test: what goes on between two halves of one connection.
        let (asked_to_stop, stop) = watch::channel(false);
        let acks = async {
            loop {
                let frame = read(&mut reader).await?;
                if frame.header.kind == Kind::Stop {
                    asked_to_stop.send_replace(true);
                    continue;
                }
                assert_eq!(frame.header.kind, Kind::Ack);
                self.output(stream, |output| {
                    assert!(frame.header.offset <= output.data.len() as u64);
                    assert!(frame.header.offset >= output.acked, "an ACK must not go back");
                    output.acked = frame.header.offset;
                    // The stream is forgotten only if that was all of it.
                    let end = output.eof.is_some() && output.acked == output.data.len() as u64;
                    output.last_acked |= frame.header.flags.contains(Flags::LAST) && end;
                });
                if frame.header.flags.contains(Flags::LAST) && *stop.borrow() {
                    return Ok(());
                }
            }
        };
        let data = async {
            let mut changed = self.changed.subscribe();
            let mut at = from;
            let mut size = 1;
            let mut stop = stop.clone();
            loop {
                changed.borrow_and_update();
                if *stop.borrow_and_update() {
                    if !self.lock().ignores_stop {
                        writer.frame(Header::new(Kind::Stopped, at), &[]).await?;
                    }
                    return std::future::pending().await;
                }
                // Odd sizes, from single bytes to whole frames.
                size = (size * 7 + 3) % self.frame + 1;
                match self.look(stream, |output| output.step(at, size)) {
                    Step::Gap(to) => {
                        let lost = Gap { lost_bytes: to - at, ..Default::default() };
                        at = to;
                        writer.message(Kind::Gap, at, &lost).await?;
                    }
                    Step::Data(body) => {
                        writer.frame(Header::new(Kind::Data, at), &body).await?;
                        at += body.len() as u64;
                    }
                    Step::End(flags) => {
                        writer.frame(Header::new(Kind::Eof, at).with_flags(flags), &[]).await?;
                        let _ = stop.wait_for(|stop| *stop).await;
                    }
                    Step::Wait => tokio::select! {
                        changed = changed.changed() => changed.map_err(io::Error::other)?,
                        stop = stop.changed() => stop.map_err(io::Error::other)?,
                    },
                }
            }
        };
        tokio::select! {
            result = acks => result,
            result = data => result,
        }
    }

    async fn take_input(
        &self,
        mut reader: tokio::io::Take<&mut OwnedReadHalf>,
        mut writer: Cut,
    ) -> io::Result<()> {
        let consumed = self.lock().stdin.bytes.len() as u64;
        writer.message(Kind::Opened, consumed, &opened()).await?;
        loop {
            let frame = tokio::select! {
                frame = read(&mut reader) => frame?,
                () = self.until(|agent| agent.lock().stdin.closed) => {
                    return writer.frame(Header::new(Kind::Eof, consumed), &[]).await;
                }
            };
            match frame.header.kind {
                Kind::Stop => {
                    let at = self.lock().stdin.bytes.len() as u64;
                    writer.frame(Header::new(Kind::Stopped, at), &[]).await?;
                    continue;
                }
                Kind::Ack => return Ok(()),
                _ => {}
            }
            let at = self.change(|state| {
                assert_eq!(frame.header.offset, state.stdin.bytes.len() as u64);
                match frame.header.kind {
                    Kind::Data => state.stdin.bytes.extend_from_slice(&frame.body),
                    Kind::Eof => state.stdin.eof = true,
                    other => panic!("{other:?} on stdin"),
                }
                state.stdin.bytes.len() as u64
            });
            let flags = if frame.header.kind == Kind::Eof { Flags::LAST } else { Flags::NONE };
            writer.frame(Header::new(Kind::Ack, at).with_flags(flags), &[]).await?;
        }
    }
}

#[async_trait]
impl Dial for Arc<FakeAgent> {
    async fn dial(&self, port: u32) -> Result<UnixStream, DialError> {
        assert_eq!(port, ports::STREAM);
        let fault = self.change(|state| state.faults.pop_front());
        if let Some(Fault::NoDial) = fault {
            let source = io::ErrorKind::ConnectionRefused.into();
            return Err(DialError::Connect { path: "fake".into(), source });
        }
        let (host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        guest.set_nonblocking(true).unwrap();
        let agent = self.clone();
        let served = self.runtime.spawn(async move {
            let guest = UnixStream::from_std(guest).unwrap();
            agent.change(|state| state.connections += 1);
            let served = agent.clone().serve(guest, fault).await;
            agent.change(|state| state.connections -= 1);
            served
        });
        self.runtime.spawn(async move {
            // Connections fail all the time here, but a broken assertion must not look like one.
            if served.await.is_err_and(|e| e.is_panic()) {
                std::process::abort();
            }
        });
        Ok(UnixStream::from_std(host).unwrap())
    }
}

async fn read(reader: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<Frame> {
    let frame = read_frame(reader, &mut BytesMut::new()).await.map_err(io::Error::other)?;
    frame.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn opened() -> Opened {
    Opened { epoch: EPOCH, ..Default::default() }
}

/// A frame as it goes over the wire.
pub(super) fn wire(header: Header, body: &[u8]) -> Vec<u8> {
    let mut wire = Header { len: body.len() as u32, ..header }.encode().to_vec();
    wire.extend_from_slice(body);
    wire
}

/// A writer that ends the connection after so many bytes.
struct Cut {
    writer: OwnedWriteHalf,
    left: usize,
}

impl Cut {
    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let part = bytes.len().min(self.left);
        self.writer.write_all(&bytes[..part]).await?;
        self.left -= part;
        if part < bytes.len() { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    async fn frame(&mut self, header: Header, body: &[u8]) -> io::Result<()> {
        self.send(&wire(header, body)).await
    }

    async fn message(&mut self, kind: Kind, offset: u64, body: &impl protobuf::Message) -> io::Result<()> {
        let frame = Frame::with_message(kind, offset, body).map_err(io::Error::other)?;
        self.frame(frame.header, &frame.body).await
    }

    async fn error(&mut self, code: ErrorCode) -> io::Result<()> {
        let error = stream::Error { code: code.into(), message: "as told".into(), ..Default::default() };
        self.message(Kind::Error, 0, &error).await
    }
}
