//! Relays one output stream from the guest to its sink.
//!
//! A connection may end at any byte. The guest keeps what was not acknowledged, and only what the sink
//! has is acknowledged, so the next connection goes on exactly where the sink is. Reading stops while
//! the sink has enough to do: that is the back pressure, and the bound on memory.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use bytes::Bytes;
use cube_protocol::frame::{Flags, Frame, Header, Kind};
use cube_protocol::stream::Gap;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep_until, timeout},
};

use super::{
    connection::{At, Broken, Connected, Connections, Endpoint, refusal},
    control::Control,
    error_chain,
    flow::Member,
    incoming::{Incoming, Read},
    phase::Phases,
    rewind::{Rewind, Rewinds},
    sink::{Chunk, Position, Sink},
    status::Counters,
};
use crate::log::writer::Identity;

/// Frames that become one chunk, and so one write, at most.
const PARTS_MAX: usize = 64;

/// Time for the last acknowledgement, for which a guest that is busy has no room at once, and for the
/// guest to close the connection after it.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);

/// Time in which a guest must answer STOP.
pub(super) const STOP_LIMIT: Duration = Duration::from_secs(2);

/// The relay of one output stream.
pub(super) struct Relay {
    endpoint: Endpoint,
    connections: Connections,
    counters: Arc<Counters>,
    sink: Sink,
    flow: Member,
    rewinds: Rewinds,
    /// Run of the guest that the connections are of; 0 before the first.
    timeline: u64,
    /// Offset of the next byte to come from the guest.
    received: u64,
    /// Epoch of the stream; 0 until the guest has told.
    epoch: u64,
    /// What the sink knows the stream as.
    identity: Option<Identity>,
    /// Where the stream ends, once the guest has said so.
    eof: Option<u64>,
    /// What was received and waits for room in the sink.
    pending: VecDeque<Chunk>,
    stop: Stop,
}

/// Why a relay ended before the end of its stream.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the sink takes nothing more")]
    Sink,
    #[error("the stream cannot be continued")]
    Guest(#[source] Broken),
}

/// How a connection ended.
enum Followed {
    /// With the stream.
    Complete,
    /// Because the stream is to rest; the sink does.
    Rested,
    Broken(Broken),
}

/// How far STOP has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    No,
    /// The sink is halted; the guest must have answered by then.
    Asked(Instant),
    /// The guest has said where it stopped.
    Answered,
}

impl Relay {
    /// A relay that goes on where its sink is, once the streams flow. `epoch` is 0 if the stream is new.
    pub(super) fn new(
        endpoint: Endpoint,
        epoch: u64,
        sink: Sink,
        flow: Member,
        rewinds: Rewinds,
        counters: Arc<Counters>,
    ) -> Relay {
        let connections = Connections::new(endpoint.clone(), counters.clone());
        let received = *sink.safe.borrow();
        Relay {
            endpoint,
            connections,
            counters,
            sink,
            flow,
            rewinds,
            timeline: 0,
            received,
            epoch,
            identity: None,
            eof: None,
            pending: VecDeque::new(),
            stop: Stop::No,
        }
    }

    /// Runs until the sink has the whole stream, or until the stream cannot be continued, and the process has
    /// exited: before that a stream that has ended may go on, with its sandbox put back to a snapshot.
    pub(super) async fn run(mut self, mut phases: Phases) {
        let mut exit = phases.clone();
        tokio::select! {
            () = self.live(&mut exit) => self.connections.closed(),
            () = phases.abandoned() => {}
        }
    }

    async fn live(&mut self, phases: &mut Phases) {
        loop {
            let result = self.relay().await;
            self.connections.closed();
            match result {
                Ok(()) => self.counters.relayed.set(1),
                // The sink has said why.
                Err(Ended::Sink) => return,
                Err(Ended::Guest(broken)) if broken.is_taken_over() => {}
                Err(ended) => self.warn(&ended),
            }
            if self.end_sink().await.is_err() {
                return;
            }
            tokio::select! {
                rewound = self.is_rewound() => if rewound.is_err() { return },
                () = phases.exited() => return,
            }
        }
    }

    /// Tells the sink that the stream has ended. It may have a part of a stream that cannot be continued, and
    /// be slow to take it.
    async fn end_sink(&mut self) -> Result<(), Ended> {
        tokio::select! {
            sent = self.sink.chunks.send(Chunk::End) => return sent.map_err(|_| Ended::Sink),
            () = self.flow.asked_to_rest() => {}
        }
        self.rest().await?;
        self.sink.chunks.send(Chunk::End).await.map_err(|_| Ended::Sink)
    }

    fn warn(&self, ended: &Ended) {
        tracing::warn!(
            container = self.endpoint.container_id,
            exec = self.endpoint.exec_id,
            stream = ?self.endpoint.stream,
            offset = self.received,
            error = %error_chain(ended),
            "output ends early"
        );
    }

    async fn relay(&mut self) -> Result<(), Ended> {
        loop {
            self.timeline = self.flowing().await?;
            if self.flow_on().await? {
                return Ok(());
            }
            self.connections.closed();
            self.rest().await?;
        }
    }

    /// Rests until the stream is to flow, which it may do elsewhere by then.
    async fn flowing(&mut self) -> Result<u64, Ended> {
        loop {
            tokio::select! {
                // What was said at rest comes before what was said after it.
                biased;
                Some(rewind) = self.rewinds.recv() => self.rewind(rewind).await?,
                timeline = self.flow.flowing() => return Ok(timeline),
            }
        }
    }

    /// Waits for a stream that has ended to go on, for as long as it takes.
    async fn is_rewound(&mut self) -> Result<(), Ended> {
        let rewind = tokio::select! {
            Some(rewind) = self.rewinds.recv() => rewind,
            () = self.flow.idle() => return Ok(()),
        };
        self.rewind(rewind).await
    }

    /// Goes on elsewhere. What the sink has not taken without waiting was never acknowledged, and no guest
    /// has it any more.
    async fn rewind(&mut self, Rewind { turn, attempt, done }: Rewind) -> Result<(), Ended> {
        self.rest().await?;
        let result = self.sink.rewind(turn).await.ok_or(Ended::Sink)?;
        // Or what comes now would be taken for what the old timeline had brought there.
        debug_assert_eq!(*self.sink.safe.borrow(), turn.to);
        self.pending.clear();
        self.received = turn.to;
        self.connections.seen(attempt);
        self.counters.acknowledged.set(turn.to);
        self.counters.relayed.set(0);
        self.counters.truncated.set(0);
        // Who asked may not wait any more.
        let _ = done.send(result);
        Ok(())
    }

    /// Relays until the stream ends, which is `true`, or is to rest.
    async fn flow_on(&mut self) -> Result<bool, Ended> {
        loop {
            if !self.settle().await? {
                return Ok(false);
            }
            if self.eof.is_some() {
                return Ok(true);
            }
            let at = At { timeline: self.timeline, epoch: self.epoch, offset: self.received };
            let connected = self.connections.open(at, &mut self.flow).await.map_err(Ended::Guest)?;
            let Some(connected) = connected else { return Ok(false) };
            let broken = match self.follow(connected).await? {
                Followed::Complete => return Ok(true),
                Followed::Rested => return Ok(false),
                Followed::Broken(broken) => broken,
            };
            tracing::debug!(stream = ?self.endpoint.stream, error = %error_chain(&broken), "reconnecting");
            let again = tokio::select! {
                again = self.connections.failed(broken) => again,
                () = self.flow.asked_to_rest() => return Ok(false),
            };
            match again {
                _ if self.stop != Stop::No => return Ok(false),
                Ok(()) => {}
                Err(broken) => {
                    // Even if this was the last connection, what came over it is the sink's.
                    self.settle().await?;
                    return Err(Ended::Guest(broken));
                }
            }
        }
    }

    /// Waits until the sink has everything that was received, so that OPEN can name one offset for both.
    /// `false` if the stream is to rest before.
    async fn settle(&mut self) -> Result<bool, Ended> {
        let Relay { sink, flow, pending, received, .. } = self;
        let settled = async {
            while let Some(chunk) = pending.pop_front() {
                sink.chunks.send(chunk).await.map_err(|_| Ended::Sink)?;
            }
            sink.safe.wait_for(|safe| *safe >= *received).await.map_err(|_| Ended::Sink).map(drop)
        };
        tokio::select! {
            biased;
            settled = settled => settled?,
            () = flow.asked_to_rest() => return Ok(false),
        }
        self.counters.acknowledged.set(self.received);
        Ok(true)
    }

    /// Brings the sink to rest, with no connection to the guest. What the sink could not take without
    /// waiting is dropped: the guest has it.
    async fn rest(&mut self) -> Result<Position, Ended> {
        let position = self.sink.rest().await.ok_or(Ended::Sink)?;
        self.pending.clear();
        self.stop = Stop::No;
        // The sink may have dropped either. The guest says them again.
        (self.identity, self.eof) = (None, None);
        self.received = position.next;
        self.counters.received.set(self.counters.stored.get());
        self.counters.acknowledged.set(position.safe);
        if position.next > position.safe {
            // Makes the disk take what belongs to the bytes that it has.
            self.pending.push_back(Chunk::Data(Vec::new()));
        }
        Ok(position)
    }

    /// Follows one connection to its end.
    async fn follow(&mut self, connected: Connected) -> Result<Followed, Ended> {
        let Connected { socket, epoch, offset } = connected;
        if let Err(broken) = self.opened(epoch, offset) {
            return Ok(Followed::Broken(broken));
        }
        let mut incoming = Incoming::new();
        let mut control = Control::new(self.received);
        loop {
            if self.pending.is_empty()
                && let Err(broken) = self.parse(&mut incoming)
            {
                return Ok(Followed::Broken(broken));
            }
            if self.pending.is_empty() {
                match self.stop {
                    Stop::No if self.eof.is_some() => return self.end(&socket, control).await,
                    Stop::No => {}
                    // EOF is as good an answer as any.
                    Stop::Asked(_) if self.eof.is_none() => {}
                    Stop::Asked(_) | Stop::Answered => return self.take_leave(&socket, control).await,
                }
            }
            let deadline = if let Stop::Asked(deadline) = self.stop { Some(deadline) } else { None };
            tokio::select! {
                // What would be read and stored before a STOP is seen is what a pause waits for; nor may a
                // guest put a deadline off by sending on and on.
                biased;
                () = self.flow.asked_to_rest(), if self.stop == Stop::No => {
                    self.sink.halt();
                    self.stop = Stop::Asked(Instant::now() + STOP_LIMIT);
                    control.stop();
                    control.flush(&socket);
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    return Ok(Followed::Broken(Broken::Timeout));
                }
                permit = self.sink.chunks.reserve(), if !self.pending.is_empty() => {
                    let permit = permit.map_err(|_| Ended::Sink)?;
                    if let Some(chunk) = self.pending.pop_front() {
                        permit.send(chunk);
                    }
                }
                safe = self.sink.safe.changed() => {
                    safe.map_err(|_| Ended::Sink)?;
                    let safe = *self.sink.safe.borrow_and_update();
                    self.counters.acknowledged.set(safe);
                    control.acknowledge(safe);
                    control.flush(&socket);
                }
                _ = socket.writable(), if control.wants_to_write() => control.flush(&socket),
                ready = socket.readable(), if self.pending.is_empty() => {
                    match ready.and_then(|()| incoming.read(&socket)) {
                        Ok(Read::Some | Read::None) => {}
                        Ok(Read::End) if incoming.is_partial() => {
                            let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
                            return Ok(Followed::Broken(cut.into()));
                        }
                        Ok(Read::End) => return Ok(Followed::Broken(Broken::Closed)),
                        Err(e) => return Ok(Followed::Broken(e.into())),
                    }
                }
            }
        }
    }

    fn opened(&mut self, epoch: u64, offset: u64) -> Result<(), Broken> {
        self.epoch = epoch;
        let identity = Identity { timeline: self.timeline, epoch };
        if self.identity != Some(identity) {
            self.identity = Some(identity);
            self.pending.push_back(Chunk::Identity(identity));
        }
        // In drop mode the guest may have dropped what we had not seen; else it answers OFFSET_LOST.
        self.skip_to(offset, "OPENED")
    }

    fn skip_to(&mut self, offset: u64, what: &str) -> Result<(), Broken> {
        let Some(lost) = offset.checked_sub(self.received) else {
            let text = format!("{what} goes back from offset {} to {offset}", self.received);
            return Err(Broken::Protocol(text));
        };
        if lost > 0 {
            self.received = offset;
            self.pending.push_back(Chunk::Gap(offset));
        }
        Ok(())
    }

    /// Takes frames out of `incoming` until a chunk is full or no whole frame is left.
    fn parse(&mut self, incoming: &mut Incoming) -> Result<(), Broken> {
        let mut parts = Vec::new();
        let result = self.parse_into(incoming, &mut parts);
        if !parts.is_empty() {
            self.connections.progressed();
            // A GAP that ended the chunk comes after it.
            self.pending.push_front(Chunk::Data(parts));
        }
        result
    }

    fn parse_into(&mut self, incoming: &mut Incoming, parts: &mut Vec<Bytes>) -> Result<(), Broken> {
        while parts.len() < PARTS_MAX
            && self.eof.is_none()
            && self.stop != Stop::Answered
            && let Some(frame) = incoming.frame()?
        {
            let Header { kind, offset, .. } = frame.header;
            match kind {
                Kind::Data => parts.push(self.data(frame)?),
                Kind::Gap => {
                    let gap: Gap = frame.message()?;
                    if self.received.checked_add(gap.lost_bytes) != Some(offset) || gap.lost_bytes == 0 {
                        let text = format!(
                            "GAP of {} bytes leads from offset {} to {offset}",
                            gap.lost_bytes, self.received
                        );
                        return Err(Broken::Protocol(text));
                    }
                    return self.skip_to(offset, "GAP");
                }
                Kind::Eof if offset == self.received => {
                    self.eof = Some(offset);
                    self.counters.truncated.set(frame.header.flags.contains(Flags::TRUNCATED).into());
                }
                Kind::Eof => {
                    let text = format!("EOF is at offset {offset} instead of {}", self.received);
                    return Err(Broken::Protocol(text));
                }
                Kind::Stopped if matches!(self.stop, Stop::Asked(_)) && offset == self.received => {
                    self.stop = Stop::Answered;
                }
                Kind::Error => return Err(refusal(&frame)),
                Kind::Open | Kind::Opened | Kind::Ack | Kind::Stop | Kind::Stopped => {
                    return Err(Broken::Protocol(format!("sent {kind:?} on an open output stream")));
                }
            }
        }
        Ok(())
    }

    fn data(&mut self, frame: Frame) -> Result<Bytes, Broken> {
        let Header { offset, len, .. } = frame.header;
        if offset != self.received || len == 0 {
            let text = format!("DATA of {len} bytes is at offset {offset} instead of {}", self.received);
            return Err(Broken::Protocol(text));
        }
        self.received = frame.header.end();
        self.counters.received.add(len.into());
        Ok(frame.body)
    }

    /// The stream has ended: waits for the sink, and tells the guest that it may forget the stream. A
    /// guest that does not take that forgets the stream with its process.
    async fn end(&mut self, socket: &UnixStream, mut control: Control) -> Result<Followed, Ended> {
        if !self.settle().await? {
            self.sink.halt();
            return self.take_leave(socket, control).await;
        }
        control.acknowledge_last(self.received);
        let _ = timeout(FAREWELL, control.send(socket)).await;
        Ok(Followed::Complete)
    }

    /// The guest has stopped: acknowledges what the sink has taken, for the last time on this connection,
    /// and waits until the guest has closed it.
    async fn take_leave(&mut self, socket: &UnixStream, mut control: Control) -> Result<Followed, Ended> {
        let eof = self.eof;
        let position = self.rest().await?;
        control.acknowledge_last(position.safe);
        let farewell = async {
            control.send(socket).await;
            closed(socket).await;
        };
        let _ = timeout(FAREWELL, farewell).await;
        Ok(if eof == Some(position.safe) { Followed::Complete } else { Followed::Rested })
    }
}

/// Resolves when the guest has closed its end. What it still sends it has sent before it saw STOP, and
/// holds.
async fn closed(socket: &UnixStream) {
    let mut scratch = [0; 4096];
    while socket.readable().await.is_ok() {
        match socket.try_read(&mut scratch) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
