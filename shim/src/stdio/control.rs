//! What the host has to say on the connection of an output stream: acknowledgements, and STOP.

use std::io;

use cube_protocol::frame::{Flags, HEADER_LEN, Header, Kind};
use tokio::net::UnixStream;

/// The frames to the guest on one connection. An acknowledgement that is not written yet is overtaken by
/// what comes later.
pub(super) struct Control {
    /// Offset that was last acknowledged.
    sent: u64,
    /// Offset to acknowledge.
    target: u64,
    last: bool,
    stop: bool,
    /// Whether the guest has closed its end for reading.
    deaf: bool,
    wire: [u8; HEADER_LEN],
    /// Bytes of `wire` that are written.
    written: usize,
}

impl Control {
    /// OPEN has acknowledged everything below `offset`.
    pub(super) fn new(offset: u64) -> Control {
        Control {
            sent: offset,
            target: offset,
            last: false,
            stop: false,
            deaf: false,
            wire: [0; HEADER_LEN],
            written: HEADER_LEN,
        }
    }

    /// Everything below `offset` is safe.
    pub(super) fn acknowledge(&mut self, offset: u64) {
        self.target = offset;
    }

    /// Everything below `offset` is safe, and nothing more will be acknowledged here.
    pub(super) fn acknowledge_last(&mut self, offset: u64) {
        self.target = offset;
        self.last = true;
    }

    /// The guest is to send no more.
    pub(super) fn stop(&mut self) {
        self.stop = true;
    }

    pub(super) fn wants_to_write(&self) -> bool {
        !self.deaf && (self.written < HEADER_LEN || self.target > self.sent || self.last || self.stop)
    }

    /// Writes everything; returns early if the guest hears nothing any more. Cancel safe.
    pub(super) async fn send(&mut self, socket: &UnixStream) {
        self.flush(socket);
        while self.wants_to_write() && socket.writable().await.is_ok() {
            self.flush(socket);
        }
    }

    /// Writes what the socket takes without waiting. A guest that hears nothing any more may still have
    /// sent something: the end of a connection is for its reader to find.
    pub(super) fn flush(&mut self, socket: &UnixStream) {
        while self.wants_to_write() {
            if self.written == HEADER_LEN {
                self.wire = self.next().encode();
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

    fn next(&mut self) -> Header {
        if std::mem::take(&mut self.stop) {
            return Header::new(Kind::Stop, 0);
        }
        let flags = if std::mem::take(&mut self.last) { Flags::LAST } else { Flags::NONE };
        self.sent = self.target;
        Header::new(Kind::Ack, self.target).with_flags(flags)
    }
}
