//! Relays stdin from its FIFO to the guest.
//!
//! What the guest has not acknowledged is kept, at most [`STDIN_WINDOW`] bytes, and sent again on the
//! next connection from where the guest says that it is.

use std::{io, path::PathBuf, sync::Arc};

use bytes::{Buf, BytesMut};
use cube_protocol::frame::{Flags, Header, Kind, STDIN_WINDOW};
use tokio::{
    net::UnixStream,
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    connection::{At, Broken, Connected, Connections, Endpoint, refusal},
    error_chain,
    flow::Member,
    incoming::{Incoming, Read},
    phase::Phases,
    relay::{FAREWELL, STOP_LIMIT},
    rewind::{Rewind, Rewinds},
    source::Source,
    status::Counters,
};

/// The relay of one stdin.
pub(super) struct StdinRelay {
    endpoint: Endpoint,
    connections: Connections,
    counters: Arc<Counters>,
    path: PathBuf,
    /// `None` once nothing more is read from it.
    source: Option<Source>,
    /// Becomes true with CloseIO.
    close: watch::Receiver<bool>,
    flow: Member,
    rewinds: Rewinds,
    /// Bytes from offset `acknowledged` on.
    kept: BytesMut,
    acknowledged: u64,
    /// Whether the source has ended, so that `kept` holds the last bytes.
    ended: bool,
    epoch: u64,
}

/// Where input comes from.
pub(super) struct Input {
    pub(super) path: PathBuf,
    /// The open file at `path`.
    pub(super) source: Source,
    /// Becomes true with CloseIO.
    pub(super) close: watch::Receiver<bool>,
}

/// What one connection has seen.
struct Progress {
    /// Offset below which everything was staged for this connection.
    staged: u64,
    /// The frame that is being written.
    outgoing: BytesMut,
    eof_staged: bool,
    stop: Stop,
}

/// How far STOP has come on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    No,
    /// STOP is staged; the guest must have answered by then.
    Asked(Instant),
    /// The last ACK is staged; the guest must have closed by then.
    Answered(Instant),
}

impl Stop {
    fn deadline(self) -> Instant {
        match self {
            // Nobody waits for it.
            Stop::No => Instant::now(),
            Stop::Asked(deadline) | Stop::Answered(deadline) => deadline,
        }
    }
}

/// How a connection ended.
enum Followed {
    /// The guest takes, or needs, nothing more.
    Complete,
    /// The stream is at rest.
    Rested,
}

impl StdinRelay {
    /// The first byte of `input` is at stream offset `begin`.
    pub(super) fn new(
        endpoint: Endpoint,
        input: Input,
        begin: u64,
        flow: Member,
        rewinds: Rewinds,
        counters: Arc<Counters>,
    ) -> StdinRelay {
        let connections = Connections::new(endpoint.clone(), counters.clone());
        let Input { path, source, close } = input;
        StdinRelay {
            endpoint,
            connections,
            counters,
            path,
            source: Some(source),
            close,
            flow,
            rewinds,
            kept: BytesMut::new(),
            acknowledged: begin,
            ended: false,
            epoch: 0,
        }
    }

    /// Runs until the process has exited: before that, a stdin that it has closed may be open again, with its
    /// sandbox put back to a snapshot.
    pub(super) async fn run(mut self, mut phases: Phases) {
        tokio::select! {
            () = self.live() => {}
            () = phases.exited() => {}
        }
        self.connections.closed();
        self.lose_kept();
    }

    async fn live(&mut self) {
        loop {
            match self.relay().await {
                // A process may close its stdin before it has read everything.
                Ok(()) | Err(Broken::Refused { .. }) => {}
                Err(broken) => tracing::warn!(
                    container = self.endpoint.container_id,
                    exec = self.endpoint.exec_id,
                    error = %error_chain(&broken),
                    "stdin ends early"
                ),
            }
            self.connections.closed();
            self.counters.relayed.set(1);
            // Who writes to the FIFO is told that nobody reads it any more.
            self.source = None;
            self.lose_kept();
            tokio::select! {
                Some(rewind) = self.rewinds.recv() => self.rewind(rewind),
                () = self.flow.idle() => {}
            }
        }
    }

    /// What is kept no process will get.
    fn lose_kept(&mut self) {
        self.counters.lost.add(self.kept.len() as u64);
        self.kept = BytesMut::new();
    }

    async fn relay(&mut self) -> Result<(), Broken> {
        loop {
            let timeline = self.flowing().await;
            match self.flow_on(timeline).await? {
                Followed::Complete => return Ok(()),
                Followed::Rested => self.connections.closed(),
            }
        }
    }

    /// As in the relay of output.
    async fn flowing(&mut self) -> u64 {
        loop {
            tokio::select! {
                biased;
                Some(rewind) = self.rewinds.recv() => self.rewind(rewind),
                timeline = self.flow.flowing() => return timeline,
            }
        }
    }

    /// What was kept is the next that the process gets, wherever that is now.
    fn rewind(&mut self, Rewind { turn, attempt, done }: Rewind) {
        self.acknowledged = turn.to;
        self.connections.seen(attempt);
        self.counters.acknowledged.set(turn.to);
        self.counters.relayed.set(0);
        if self.source.is_none() && !self.ended {
            match Source::open(&self.path) {
                Ok(source) => self.source = Some(source),
                Err(e) => {
                    tracing::warn!(error = %error_chain(&e), "cannot open stdin again, it ends here");
                    self.ended = true;
                }
            }
        }
        let _ = done.send(Ok(()));
    }

    async fn flow_on(&mut self, timeline: u64) -> Result<Followed, Broken> {
        loop {
            // OPEN names the final offset if it is known.
            let offset = if self.ended { self.end() } else { 0 };
            let at = At { timeline, epoch: self.epoch, offset };
            let Some(connected) = self.connections.open(at, &mut self.flow).await? else {
                return Ok(Followed::Rested);
            };
            let broken = match self.follow(connected).await {
                Ok(followed) => return Ok(followed),
                Err(broken) => broken,
            };
            tokio::select! {
                again = self.connections.failed(broken) => again?,
                () = self.flow.asked_to_rest() => return Ok(Followed::Rested),
            }
        }
    }

    /// Offset after the last byte that was read from the source.
    fn end(&self) -> u64 {
        self.acknowledged + self.kept.len() as u64
    }

    /// Follows one connection to its end.
    async fn follow(&mut self, connected: Connected) -> Result<Followed, Broken> {
        let Connected { socket, epoch, offset } = connected;
        self.epoch = epoch;
        if offset > self.acknowledged {
            self.connections.progressed();
        }
        // Anything up to what an earlier connection may have brought.
        self.acknowledge(offset, self.end())?;
        let mut progress =
            Progress { staged: offset, outgoing: BytesMut::new(), eof_staged: false, stop: Stop::No };
        let mut incoming = Incoming::new();
        loop {
            while let Some(frame) = incoming.frame()? {
                match frame.header.kind {
                    Kind::Ack => {
                        self.acknowledge(frame.header.offset, progress.staged)?;
                        self.connections.progressed();
                        if frame.header.flags.contains(Flags::LAST) && self.is_done(&progress) {
                            return Ok(Followed::Complete);
                        }
                    }
                    // The process has closed its stdin.
                    Kind::Eof => return Ok(Followed::Complete),
                    Kind::Stopped if matches!(progress.stop, Stop::Asked(_)) => {
                        self.acknowledge(frame.header.offset, progress.staged)?;
                        progress.stop = Stop::Answered(Instant::now() + FAREWELL);
                        let last = Header::new(Kind::Ack, self.acknowledged).with_flags(Flags::LAST);
                        progress.outgoing.extend_from_slice(&last.encode());
                    }
                    Kind::Error => return Err(refusal(&frame)),
                    kind => return Err(Broken::Protocol(format!("sent {kind:?} on a stdin stream"))),
                }
            }
            if progress.stop == Stop::No {
                self.stage(&mut progress);
            }
            let room = (STDIN_WINDOW as usize).saturating_sub(self.kept.len());
            let closing = *self.close.borrow();
            if closing && let Some(source) = &mut self.source {
                source.let_end();
            }
            tokio::select! {
                // As in the relay of output.
                biased;
                () = self.flow.asked_to_rest(), if progress.stop == Stop::No => {
                    progress.stop = Stop::Asked(Instant::now() + STOP_LIMIT);
                    progress.outgoing.extend_from_slice(&Header::new(Kind::Stop, 0).encode());
                }
                () = sleep_until(progress.stop.deadline()), if progress.stop != Stop::No => {
                    return Err(Broken::Timeout);
                }
                ready = socket.writable(), if !progress.outgoing.is_empty() => {
                    ready?;
                    write_some(&socket, &mut progress.outgoing)?;
                }
                ready = socket.readable() => {
                    ready?;
                    if incoming.read(&socket)? == Read::End {
                        return match progress.stop {
                            Stop::Answered(_) => Ok(Followed::Rested),
                            Stop::No | Stop::Asked(_) => Err(Broken::Closed),
                        };
                    }
                }
                bytes = read(&mut self.source, room), if room > 0 && !self.ended => self.take(bytes),
                closed = self.close.changed(), if !closing => {
                    // An owner that is gone sends no CloseIO any more.
                    if closed.is_err() { return Ok(Followed::Complete) }
                }
            }
        }
    }

    fn take(&mut self, bytes: io::Result<Vec<u8>>) {
        match bytes {
            Ok(bytes) => {
                self.ended = bytes.is_empty();
                self.counters.received.add(bytes.len() as u64);
                self.kept.extend_from_slice(&bytes);
            }
            Err(e) => {
                tracing::warn!(error = %error_chain(&e), "cannot read stdin, it ends here");
                self.ended = true;
            }
        }
    }

    /// The guest has everything below `offset`, which must be from what it had before up to `limit`.
    fn acknowledge(&mut self, offset: u64, limit: u64) -> Result<(), Broken> {
        if !(self.acknowledged..=limit).contains(&offset) {
            let text = format!(
                "acknowledged stdin up to {offset}, it must be from {} to {limit}",
                self.acknowledged
            );
            return Err(Broken::Protocol(text));
        }
        self.kept.advance((offset - self.acknowledged) as usize);
        if self.kept.is_empty() {
            self.kept = BytesMut::new();
        }
        self.counters.stored.add(offset - self.acknowledged);
        self.counters.written.add(offset - self.acknowledged);
        self.acknowledged = offset;
        self.counters.acknowledged.set(offset);
        Ok(())
    }

    /// Stages the next frame once the one before is written.
    fn stage(&self, progress: &mut Progress) {
        if !progress.outgoing.is_empty() || progress.eof_staged {
            return;
        }
        let unsent = &self.kept[(progress.staged - self.acknowledged) as usize..];
        if !unsent.is_empty() {
            // At most the window, which is the longest frame.
            let header = Header { len: unsent.len() as u32, ..Header::new(Kind::Data, progress.staged) };
            progress.outgoing.reserve(cube_protocol::frame::HEADER_LEN + unsent.len());
            progress.outgoing.extend_from_slice(&header.encode());
            progress.outgoing.extend_from_slice(unsent);
            progress.staged = self.end();
        } else if self.ended {
            progress.outgoing.extend_from_slice(&Header::new(Kind::Eof, self.end()).encode());
            progress.eof_staged = true;
        } else {
            progress.outgoing = BytesMut::new();
        }
    }

    fn is_done(&self, progress: &Progress) -> bool {
        progress.eof_staged && progress.outgoing.is_empty() && self.kept.is_empty()
    }
}

async fn read(source: &mut Option<Source>, limit: usize) -> io::Result<Vec<u8>> {
    match source {
        Some(source) => source.read(limit).await,
        None => Ok(Vec::new()),
    }
}

fn write_some(socket: &UnixStream, outgoing: &mut BytesMut) -> io::Result<()> {
    match socket.try_write(outgoing) {
        Ok(n) => outgoing.advance(n),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
        Err(e) => return Err(e),
    }
    Ok(())
}
