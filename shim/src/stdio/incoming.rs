//! Frames out of a socket in large reads: many small frames cost one system call, and bodies are
//! handed on without being copied.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use cube_protocol::frame::{BODY_MAX, Frame, HEADER_LEN, Header, Malformed};
use tokio::net::UnixStream;

/// Bytes read at first. Grows while reads fill it, and shrinks again.
const BUFFER_MIN: usize = 16 << 10;

/// Most bytes read at once. Holds the longest frame.
pub(super) const BUFFER_MAX: usize = 256 << 10;

const _: () = assert!(BUFFER_MAX >= HEADER_LEN + BODY_MAX);

/// The reading side of one connection.
#[derive(Debug)]
pub(super) struct Incoming {
    buffer: BytesMut,
    read_size: usize,
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// Bytes.
    Some,
    /// Nothing at the moment.
    None,
    /// The end of the connection.
    End,
}

impl Incoming {
    pub(super) fn new() -> Incoming {
        Incoming { buffer: BytesMut::new(), read_size: BUFFER_MIN }
    }

    /// Reads once without waiting.
    pub(super) fn read(&mut self, socket: &UnixStream) -> io::Result<Read> {
        let missing = self.missing();
        // An idle stream holds no memory: the buffer is given up as soon as it is empty.
        self.buffer.reserve(self.read_size.max(missing));
        match socket.try_read_buf(&mut self.buffer) {
            Ok(0) => Ok(Read::End),
            Ok(n) => {
                self.adapt(n);
                Ok(Read::Some)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.release();
                Ok(Read::None)
            }
            Err(e) => Err(e),
        }
    }

    /// The next frame, if all of it was read.
    pub(super) fn frame(&mut self) -> Result<Option<Frame>, Malformed> {
        let Some(header) = self.header()? else { return Ok(None) };
        let len = header.len as usize;
        if self.buffer.len() < HEADER_LEN + len {
            return Ok(None);
        }
        self.buffer.advance(HEADER_LEN);
        let body: Bytes = self.buffer.split_to(len).freeze();
        self.release();
        Ok(Some(Frame { header, body }))
    }

    /// Whether the connection ended inside a frame.
    pub(super) fn is_partial(&self) -> bool {
        !self.buffer.is_empty()
    }

    fn header(&self) -> Result<Option<Header>, Malformed> {
        self.buffer.first_chunk::<HEADER_LEN>().map(Header::decode).transpose()
    }

    fn missing(&self) -> usize {
        let body = self.header().ok().flatten().map_or(0, |header| header.len as usize);
        (HEADER_LEN + body).saturating_sub(self.buffer.len())
    }

    fn adapt(&mut self, read: usize) {
        if read >= self.read_size {
            self.read_size = (self.read_size * 2).min(BUFFER_MAX);
        } else if read < self.read_size / 4 {
            self.read_size = (self.read_size / 2).max(BUFFER_MIN);
        }
    }

    fn release(&mut self) {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
    }
}
