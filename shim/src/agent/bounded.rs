//! The bound on what the agent may send on the control port.
//!
//! ttrpc takes messages of 4 MiB, and protobuf makes a struct of a hundred bytes out of two: an answer
//! full of empty events would take hundreds of MiB. It also queues stream data for a call without any
//! bound, and none of our calls is a stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest message, in bytes. The longest of an honest agent are metrics and, for 300 processes, `Info`.
pub(super) const MESSAGE_MAX: u32 = 256 << 10;

/// ttrpc's header: length, stream id, type, flags; the numbers are big-endian.
const HEADER_LEN: usize = 10;
const TYPE: usize = 8;
const RESPONSE: u8 = 2;

/// A connection that fails where the peer begins a message that is too long, or no response.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    inner: S,
    /// The header of the current message, of which `filled` bytes are known.
    header: [u8; HEADER_LEN],
    filled: usize,
    /// Bytes of the current message's body that are to come.
    body: usize,
}

impl<S> Bounded<S> {
    /// Nothing may have been read from `inner` before.
    pub(super) fn new(inner: S) -> Bounded<S> {
        Bounded { inner, header: [0; HEADER_LEN], filled: 0, body: 0 }
    }

    /// Follows the messages through the bytes that were read.
    fn check(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let body = self.body.min(bytes.len());
            self.body -= body;
            bytes = &bytes[body..];
            let header = (HEADER_LEN - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + header].copy_from_slice(&bytes[..header]);
            self.filled += header;
            bytes = &bytes[header..];
            if self.filled == HEADER_LEN {
                self.body = body_len(&self.header)?;
                self.filled = 0;
            }
        }
        Ok(())
    }
}

fn body_len(header: &[u8; HEADER_LEN]) -> io::Result<usize> {
    let [a, b, c, d, ..] = *header;
    let len = u32::from_be_bytes([a, b, c, d]);
    let refuse = |text| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    if len > MESSAGE_MAX {
        return refuse(format!("the guest sent a message of {len} bytes, at most {MESSAGE_MAX} are allowed"));
    }
    if header[TYPE] != RESPONSE {
        return refuse(format!("the guest sent a message of type {}, which is no response", header[TYPE]));
    }
    Ok(len as usize)
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        if let Poll::Ready(Ok(())) = polled
            && let Err(e) = self.check(&buffer.filled()[before..])
        {
            // A read that fails has read nothing.
            buffer.set_filled(before);
            return Poll::Ready(Err(e));
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn message(len: u32, kind: u8, body: usize) -> Vec<u8> {
        let mut wire = len.to_be_bytes().to_vec();
        wire.extend([0, 0, 0, 1, kind, 0]);
        wire.resize(HEADER_LEN + body, 0xff);
        wire
    }

    /// Reads `wire` in pieces of `step` bytes at most.
    async fn read(wire: &[u8], step: usize) -> io::Result<Vec<u8>> {
        let (near, mut far) = tokio::io::duplex(step);
        let wire = wire.to_vec();
        tokio::spawn(async move { tokio::io::AsyncWriteExt::write_all(&mut far, &wire).await });
        let mut bytes = Vec::new();
        Bounded::new(near).read_to_end(&mut bytes).await.map(|_| bytes)
    }

    #[tokio::test]
    async fn messages_pass_however_they_are_split() {
        let wire = [message(100, RESPONSE, 100), message(0, RESPONSE, 0), message(7, RESPONSE, 7)].concat();
        for step in 1..wire.len() {
            assert_eq!(read(&wire, step).await.unwrap(), wire, "in steps of {step}");
        }
        let longest = message(MESSAGE_MAX, RESPONSE, MESSAGE_MAX as usize);
        assert_eq!(read(&longest, 8192).await.unwrap(), longest);
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_or_no_response_fails_at_its_header() {
        for bad in [message(MESSAGE_MAX + 1, RESPONSE, 0), message(u32::MAX, RESPONSE, 0), message(1, 3, 0)] {
            let wire = [message(9, RESPONSE, 9), bad].concat();
            for step in [1, 5, 1000] {
                let error = read(&wire, step).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
            }
        }
    }
}
