//! Relays one output stream from the guest to its sink.
//!
//! A connection may end at any byte. The guest keeps what was not acknowledged, and only what the sink
//! has is acknowledged, so the next connection goes on exactly where the sink is. Reading stops while
//! the sink has enough to do: that is the back pressure, and the bound on memory.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use bytes::Bytes;
use cube_protocol::frame::{Flags, Frame, HEADER_LEN, Header, Kind};
use cube_protocol::stream::Gap;
use tokio::{net::UnixStream, time::timeout};

use super::{
    connection::{Broken, Connected, Connections, Endpoint, refusal},
    error_chain,
    incoming::{Incoming, Read},
    phase::Phases,
    sink::{Chunk, Sink},
    status::Counters,
};
use crate::log::writer::Identity;

/// Frames that become one chunk, and so one write, at most.
const PARTS_MAX: usize = 64;

/// Time for the last acknowledgement, for which a guest that is busy has no room at once.
const FAREWELL: Duration = Duration::from_secs(2);

/// The relay of one output stream.
pub(super) struct Relay {
    endpoint: Endpoint,
    connections: Connections,
    counters: Arc<Counters>,
    sink: Sink,
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
}

/// Why a relay ended before the end of its stream.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the sink takes nothing more")]
    Sink,
    #[error("the stream cannot be continued")]
    Guest(#[source] Broken),
}

impl Relay {
    /// A relay that goes on where its sink is. `epoch` is 0 if the stream is new.
    pub(super) fn new(endpoint: Endpoint, epoch: u64, sink: Sink, counters: Arc<Counters>) -> Relay {
        let connections = Connections::new(endpoint.clone(), counters.clone());
        let received = *sink.safe.borrow();
        Relay {
            endpoint,
            connections,
            counters,
            sink,
            received,
            epoch,
            identity: None,
            eof: None,
            pending: VecDeque::new(),
        }
    }

    /// Runs until the sink has the whole stream, or until the stream cannot be continued.
    pub(super) async fn run(mut self, mut phases: Phases) {
        let result = tokio::select! {
            result = self.relay() => result,
            () = phases.abandoned() => return,
        };
        self.connections.closed();
        match result {
            Ok(()) => self.counters.relayed.set(1),
            // The sink has said why.
            Err(Ended::Sink) => {}
            Err(Ended::Guest(broken)) if broken.is_taken_over() => {}
            Err(ended) => tracing::warn!(
                container = self.endpoint.container_id,
                exec = self.endpoint.exec_id,
                stream = ?self.endpoint.stream,
                offset = self.received,
                error = %error_chain(&ended),
                "output ends early"
            ),
        }
    }

    async fn relay(&mut self) -> Result<(), Ended> {
        loop {
            if self.eof.is_some() {
                return Ok(());
            }
            let connected = self.connections.open(self.received, self.epoch).await.map_err(Ended::Guest)?;
            let broken = match self.follow(connected).await? {
                Ok(()) => return Ok(()),
                Err(broken) => broken,
            };
            tracing::debug!(stream = ?self.endpoint.stream, error = %error_chain(&broken), "reconnecting");
            let again = self.connections.failed(broken).await;
            // Even if this was the last connection, what came over it is the sink's.
            self.settle().await?;
            again.map_err(Ended::Guest)?;
        }
    }

    /// Waits until the sink has everything that was received, so that OPEN can name one offset for both.
    async fn settle(&mut self) -> Result<(), Ended> {
        while let Some(chunk) = self.pending.pop_front() {
            self.sink.chunks.send(chunk).await.map_err(|_| Ended::Sink)?;
        }
        let received = self.received;
        self.sink.safe.wait_for(|safe| *safe >= received).await.map_err(|_| Ended::Sink)?;
        self.counters.acknowledged.set(received);
        Ok(())
    }

    /// Follows one connection to its end. `Ok(Ok(()))` if that is the end of the stream.
    async fn follow(&mut self, connected: Connected) -> Result<Result<(), Broken>, Ended> {
        let Connected { socket, epoch, offset } = connected;
        if let Err(broken) = self.opened(epoch, offset) {
            return Ok(Err(broken));
        }
        let mut incoming = Incoming::new();
        let mut acks = Acks::new(self.received);
        loop {
            if self.pending.is_empty()
                && let Err(broken) = self.parse(&mut incoming)
            {
                return Ok(Err(broken));
            }
            if self.pending.is_empty() && self.eof.is_some() {
                return self.end(&socket, acks).await.map(Ok);
            }
            tokio::select! {
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
                    acks.target = safe;
                    acks.flush(&socket);
                }
                _ = socket.writable(), if acks.wants_to_write() => acks.flush(&socket),
                ready = socket.readable(), if self.pending.is_empty() => {
                    match ready.and_then(|()| incoming.read(&socket)) {
                        Ok(Read::Some | Read::None) => {}
                        Ok(Read::End) if incoming.is_partial() => {
                            return Ok(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
                        }
                        Ok(Read::End) => return Ok(Err(Broken::Closed)),
                        Err(e) => return Ok(Err(e.into())),
                    }
                }
            }
        }
    }

    fn opened(&mut self, epoch: u64, offset: u64) -> Result<(), Broken> {
        self.epoch = epoch;
        let identity = Identity { timeline: self.endpoint.timeline, epoch };
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
            self.counters.lost.add(lost);
            self.counters.dropped.add(lost);
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
    async fn end(&mut self, socket: &UnixStream, mut acks: Acks) -> Result<(), Ended> {
        self.settle().await?;
        acks.target = self.received;
        acks.last = true;
        let told = async {
            acks.flush(socket);
            while acks.wants_to_write() && socket.writable().await.is_ok() {
                acks.flush(socket);
            }
        };
        let _ = timeout(FAREWELL, told).await;
        Ok(())
    }
}

/// The acknowledgements of one connection. What is not written yet is overtaken by what comes later.
struct Acks {
    sent: u64,
    target: u64,
    last: bool,
    /// Whether the guest has closed its end for reading.
    deaf: bool,
    wire: [u8; HEADER_LEN],
    /// Bytes of `wire` that are written.
    written: usize,
}

impl Acks {
    /// OPEN has acknowledged everything below `offset`.
    fn new(offset: u64) -> Acks {
        Acks {
            sent: offset,
            target: offset,
            last: false,
            deaf: false,
            wire: [0; HEADER_LEN],
            written: HEADER_LEN,
        }
    }

    fn wants_to_write(&self) -> bool {
        !self.deaf && (self.written < HEADER_LEN || self.target > self.sent || self.last)
    }

    /// Writes what the socket takes without waiting. A guest that hears nothing any more may still have
    /// sent something: the end of a connection is for its reader to find.
    fn flush(&mut self, socket: &UnixStream) {
        while self.wants_to_write() {
            if self.written == HEADER_LEN {
                let flags = if std::mem::take(&mut self.last) { Flags::LAST } else { Flags::NONE };
                self.wire = Header::new(Kind::Ack, self.target).with_flags(flags).encode();
                self.sent = self.target;
                self.written = 0;
            }
            match socket.try_write(&self.wire[self.written..]) {
                Ok(n) => {
                    self.written += n;
                    cube_fault::point("log.acknowledged");
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.deaf = true,
            }
        }
    }
}
