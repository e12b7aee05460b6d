//! The bound on what the agent may send on the control port.
//!
//! ttrpc takes messages of 4 MiB, and protobuf makes a struct of a hundred bytes out of two: an answer
//! full of empty events would take hundreds of MiB. It also queues stream data for a call without any
//! bound, and none of our calls is a stream. And it throws away answers to what nobody has asked, as fast as
//! they come: an answer costs a call here, and how often calls are made is ours to say.

use std::{
    collections::BTreeSet,
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

/// Calls without an answer that are remembered. Each has a deadline, and is made by somebody who waits; a guest
/// that leaves so many open never answers the first of them.
const OPEN_MAX: usize = 4096;

/// A connection that fails where the peer begins a message that is too long, no response, or one to a call
/// that was not made or is answered already.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    inner: S,
    received: Messages,
    sent: Messages,
    /// Stream ids of the calls that have no answer yet; one that nobody waits for any more may still come.
    open: BTreeSet<u32>,
}

/// Follows the messages of one direction.
#[derive(Debug, Default)]
struct Messages {
    /// The header of the current message, of which `filled` bytes are known.
    header: [u8; HEADER_LEN],
    filled: usize,
    /// Bytes of the current message's body that are to come.
    body: usize,
}

impl Messages {
    /// Goes through `bytes`, which come next; calls `begins` with the header of each message.
    fn follow(
        &mut self,
        mut bytes: &[u8],
        mut begins: impl FnMut(&[u8; HEADER_LEN]) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let body = self.body.min(bytes.len());
            self.body -= body;
            bytes = &bytes[body..];
            let header = (HEADER_LEN - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + header].copy_from_slice(&bytes[..header]);
            self.filled += header;
            bytes = &bytes[header..];
            if self.filled == HEADER_LEN {
                begins(&self.header)?;
                self.body = number(&self.header, 0) as usize;
                self.filled = 0;
            }
        }
        Ok(())
    }
}

/// The number at `at`, which is in the header.
fn number(header: &[u8; HEADER_LEN], at: usize) -> u32 {
    header[at..at + 4].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// The stream id behind the length.
fn stream(header: &[u8; HEADER_LEN]) -> u32 {
    number(header, 4)
}

impl<S> Bounded<S> {
    /// Nothing may have been read from `inner` before.
    pub(super) fn new(inner: S) -> Bounded<S> {
        Bounded { inner, received: Messages::default(), sent: Messages::default(), open: BTreeSet::new() }
    }

    /// Follows the answers through the bytes that were read.
    fn check(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Bounded { received, open, .. } = self;
        received.follow(bytes, |header| {
            let refuse = |text| Err(io::Error::new(io::ErrorKind::InvalidData, text));
            let (len, stream) = (number(header, 0), stream(header));
            if len > MESSAGE_MAX {
                return refuse(format!(
                    "the guest sent a message of {len} bytes, at most {MESSAGE_MAX} are allowed"
                ));
            }
            if header[TYPE] != RESPONSE {
                return refuse(format!(
                    "the guest sent a message of type {}, which is no response",
                    header[TYPE]
                ));
            }
            if !open.remove(&stream) {
                return refuse(format!("the guest answered the call {stream}, which waits for no answer"));
            }
            Ok(())
        })
    }

    /// Follows the calls through the bytes that were written.
    fn note(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Bounded { sent, open, .. } = self;
        sent.follow(bytes, |header| {
            open.insert(stream(header));
            if open.len() > OPEN_MAX {
                open.pop_first();
            }
            Ok(())
        })
    }
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
        let polled = Pin::new(&mut self.inner).poll_write(context, bytes);
        if let Poll::Ready(Ok(n)) = polled {
            self.note(&bytes[..n])?;
        }
        polled
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A message of the call `stream`.
    fn message(stream: u32, len: u32, kind: u8, body: usize) -> Vec<u8> {
        let mut wire = [len.to_be_bytes(), stream.to_be_bytes()].concat();
        wire.extend([kind, 0]);
        wire.resize(HEADER_LEN + body, 0xff);
        wire
    }

    /// Makes the calls 1, 3 and so on up to 9, and reads `wire` in pieces of `step` bytes at most.
    async fn read(wire: &[u8], step: usize) -> io::Result<Vec<u8>> {
        let (near, far) = tokio::io::duplex(step);
        let (mut asked, mut answers) = tokio::io::split(far);
        let wire = wire.to_vec();
        tokio::spawn(async move { tokio::io::copy(&mut asked, &mut tokio::io::sink()).await });
        let mut bounded = Bounded::new(near);
        for call in [1, 3, 5, 7, 9] {
            bounded.write_all(&message(call, 30, 1, 30)).await?;
        }
        tokio::spawn(async move {
            answers.write_all(&wire).await?;
            answers.shutdown().await
        });
        let mut bytes = Vec::new();
        bounded.read_to_end(&mut bytes).await.map(|_| bytes)
    }

    #[tokio::test]
    async fn messages_pass_however_they_are_split() {
        let wire =
            [message(1, 100, RESPONSE, 100), message(5, 0, RESPONSE, 0), message(3, 7, RESPONSE, 7)].concat();
        for step in 1..wire.len() {
            assert_eq!(read(&wire, step).await.unwrap(), wire, "in steps of {step}");
        }
        let longest = message(9, MESSAGE_MAX, RESPONSE, MESSAGE_MAX as usize);
        assert_eq!(read(&longest, 8192).await.unwrap(), longest);
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_or_no_response_fails_at_its_header() {
        let bad = [(MESSAGE_MAX + 1, RESPONSE), (u32::MAX, RESPONSE), (1, 3)];
        for bad in bad.map(|(len, kind)| message(3, len, kind, 0)) {
            fails(&[message(1, 9, RESPONSE, 9), bad].concat()).await;
        }
    }

    #[tokio::test]
    async fn an_answer_that_nobody_waits_for_fails_at_its_header() {
        for stream in [0, 2, 11, u32::MAX] {
            fails(&[message(1, 9, RESPONSE, 9), message(stream, 9, RESPONSE, 9)].concat()).await;
        }
        fails(&[message(7, 9, RESPONSE, 9), message(7, 9, RESPONSE, 9)].concat()).await;
    }

    async fn fails(wire: &[u8]) {
        for step in [1, 5, 1000] {
            let error = read(wire, step).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
    }
}
