//! One connection of a host, and the rules that whatever the agent says on it keeps to.

use std::sync::Arc;

use bytes::Buf;
use cube_protocol::{
    frame::{Flags, Frame, HEADER_LEN, Header, Kind},
    stream::{self, Gap, Open, Opened, Stream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    time::timeout,
};

use super::{MOMENT, byte_at, process};
use crate::stdio::Hub;

/// What the connection holds in either direction.
const CAPACITY: usize = 16 << 10;

pub(super) struct Host {
    /// `None` once the host has closed it.
    connection: Option<DuplexStream>,
    /// What came and is no whole frame yet.
    incoming: Vec<u8>,
    /// The stream that the first OPEN named, if that was an honest one.
    stream: Option<Stream>,
    said: Said,
    /// Whether the agent may close inside a frame: the host has not read for longer than the agent waits
    /// with an ERROR, or may have said that it is done.
    given_up: bool,
}

/// What the agent has said so far.
#[derive(Debug, Default)]
struct Said {
    opened: bool,
    /// Offset that follows, in a DATA, GAP, EOF, ACK or STOPPED.
    offset: u64,
    lost: u64,
    stopped: bool,
    ended: bool,
    /// With EOF: the rest of what the process wrote is discarded.
    truncated: bool,
    /// ERROR, or the end of the connection.
    over: bool,
}

impl Host {
    pub(super) fn dial(hub: &Arc<Hub>) -> Host {
        let (near, far) = tokio::io::duplex(CAPACITY);
        tokio::spawn(Arc::clone(hub).serve(far));
        let said = Said::default();
        Host { connection: Some(near), incoming: Vec::new(), stream: None, said, given_up: false }
    }

    /// Sends as much as the agent takes.
    pub(super) async fn send(&mut self, bytes: &[u8]) {
        if let Some(connection) = &mut self.connection {
            let _ = timeout(MOMENT, connection.write_all(bytes)).await;
        }
    }

    pub(super) async fn send_open(&mut self, timeline: u64, stream: Stream, attempt: u64, offset: u64) {
        let open = Open {
            container_id: process::id().container,
            stream: stream.into(),
            timeline,
            attempt,
            ..Default::default()
        };
        let frame = Frame::with_message(Kind::Open, offset, &open).unwrap();
        self.stream = Some(stream);
        self.send(&[&frame.header.encode()[..], &frame.body].concat()).await;
    }

    /// As [`Host::send_open`]; the agent must agree.
    pub(super) async fn open(&mut self, timeline: u64, stream: Stream, attempt: u64, offset: u64) {
        self.send_open(timeline, stream, attempt, offset).await;
        while !self.said.opened && self.receive(HEADER_LEN).await > 0 {}
        assert!(self.said.opened && !self.said.over, "{:?}", self.said);
    }

    /// Where the stream has ended, and whether that is all that the process wrote.
    pub(super) fn end(&self) -> (u64, bool) {
        (self.said.offset, !self.said.truncated)
    }

    pub(super) fn give_up(&mut self) {
        self.given_up = true;
    }

    pub(super) fn hang_up(&mut self) {
        self.connection = None;
    }

    /// Takes and acknowledges all from `offset` to EOF; gives how much of it was dropped.
    pub(super) async fn take_everything(&mut self, offset: u64) -> u64 {
        let before = self.said.offset - offset;
        while !self.said.ended {
            assert!(self.receive(CAPACITY).await > 0, "the agent owes bytes and EOF: {:?}", self.said);
            let ack = Header::new(Kind::Ack, self.said.offset);
            let flags = if self.said.ended { Flags::LAST } else { Flags::NONE };
            self.send(&ack.with_flags(flags).encode()).await;
        }
        before + self.said.lost
    }

    /// Reads what comes until nothing more does.
    pub(super) async fn leave(&mut self) {
        while self.receive(usize::MAX).await > 0 {}
        self.hang_up();
    }

    /// Reads at most `most` bytes, and at least one if any comes soon; looks at each frame. Gives how many.
    pub(super) async fn receive(&mut self, most: usize) -> usize {
        let mut buffer = vec![0; most.clamp(1, CAPACITY)];
        let mut received = 0;
        while received < most
            && let Some(connection) = &mut self.connection
        {
            match timeout(MOMENT, connection.read(&mut buffer)).await {
                Ok(Ok(0)) | Ok(Err(_)) => {
                    assert!(self.given_up || self.incoming.is_empty(), "the agent closed inside a frame");
                    self.connection = None;
                    break;
                }
                Ok(Ok(read)) => {
                    received += read;
                    self.incoming.extend_from_slice(&buffer[..read]);
                }
                Err(_) => break,
            }
            self.look();
        }
        received
    }

    fn look(&mut self) {
        while let Some(header) = self.incoming.first_chunk::<HEADER_LEN>() {
            let header = Header::decode(header).expect("the agent keeps to the protocol");
            let end = HEADER_LEN + header.len as usize;
            if self.incoming.len() < end {
                break;
            }
            let mut wire: bytes::Bytes = self.incoming.drain(..end).collect();
            wire.advance(HEADER_LEN);
            self.said.hear(self.stream, &Frame { header, body: wire });
        }
    }
}

impl Said {
    fn hear(&mut self, stream: Option<Stream>, frame: &Frame) {
        let Header { kind, offset, .. } = frame.header;
        let told = || format!("{:?} after {self:?}", frame.header);
        assert!(!self.over, "{}", told());
        assert!(self.opened || matches!(kind, Kind::Opened | Kind::Error), "{}", told());
        assert!(!self.stopped || kind == Kind::Error, "{}", told());
        let is_input = stream == Some(Stream::STDIN);
        match kind {
            Kind::Opened => {
                assert!(!self.opened, "{}", told());
                assert_ne!(frame.message::<Opened>().unwrap().epoch, 0);
                self.opened = true;
                self.offset = offset;
            }
            Kind::Data => {
                assert!(!is_input && !self.ended && offset == self.offset && !frame.body.is_empty());
                assert!(frame.body.iter().copied().eq((offset..frame.header.end()).map(byte_at)));
                self.offset = frame.header.end();
            }
            Kind::Gap => {
                let lost = frame.message::<Gap>().unwrap().lost_bytes;
                assert!(!is_input && !self.ended && lost > 0 && offset == self.offset + lost, "{}", told());
                self.offset = offset;
                self.lost += lost;
            }
            Kind::Eof => {
                assert!(!is_input && !self.ended && offset == self.offset, "{}", told());
                self.ended = true;
                self.truncated = frame.header.flags.contains(Flags::TRUNCATED);
            }
            Kind::Ack => {
                // LAST may repeat the offset: it tells that EOF has arrived.
                assert!(stream.is_none_or(|_| is_input) && offset >= self.offset, "{}", told());
                self.offset = offset;
            }
            Kind::Stopped => {
                assert!(offset >= self.offset && (is_input || offset == self.offset), "{}", told());
                self.stopped = true;
            }
            Kind::Error => {
                let error = frame.message::<stream::Error>().unwrap();
                assert!(!error.message.is_empty());
                self.over = true;
            }
            Kind::Open | Kind::Stop => panic!("{}", told()),
        }
    }
}
