//! What the fuzz targets of this crate run, and the tests that replay their corpus.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a fuzz target tells by panicking")]

use std::{
    fs, io,
    path::Path,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::BytesMut;
use protobuf::Message;
use tokio::io::{AsyncRead, ReadBuf};

use crate::{
    frame::{BODY_MAX, Frame, FrameError, HEADER_LEN, Header, Kind, read_frame, write_frame},
    stream,
};

/// Runs `target` with each file of the committed corpus `name`.
///
/// # Panics
///
/// If the target does, after the file was named on standard error; and if there is no corpus.
pub fn replay(name: &str, target: impl Fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "nothing is in {}", corpus.display());
    for file in files {
        eprintln!("{}", file.display());
        target(&fs::read(&file).unwrap());
    }
}

/// The frame codec: the first byte says in pieces of how many bytes the rest comes over a connection.
///
/// # Panics
///
/// If a frame that is taken is not the bytes that came, if bytes are taken for another frame than what they
/// stand for, or if a frame costs more memory than the longest.
pub fn frame(input: &[u8]) {
    let Some((piece, wire)) = input.split_first() else { return };
    let mut reader = Pieces { left: wire, most: usize::from(*piece).max(1) };
    let mut buffer = BytesMut::new();
    let mut taken = Vec::new();
    loop {
        let at = taken.len();
        match at_once(read_frame(&mut reader, &mut buffer)) {
            Ok(Some(frame)) => {
                check(&frame);
                at_once(write_frame(&mut taken, &frame)).unwrap();
                assert_eq!(taken, wire[..taken.len()], "a frame is the bytes that came");
            }
            Ok(None) => return assert_eq!(taken, wire, "the end comes after the last byte"),
            Err(FrameError::Malformed(malformed)) => {
                let header = wire[at..].first_chunk().unwrap();
                return assert_eq!(Header::decode(header), Err(malformed));
            }
            Err(FrameError::Io(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                return assert!(is_cut_short(&wire[at..]));
            }
            Err(error @ FrameError::Body { .. }) => panic!("nothing asked for a message: {error}"),
        }
        assert!(buffer.capacity() <= BODY_MAX, "{} bytes are kept for a frame", buffer.capacity());
    }
}

fn is_cut_short(wire: &[u8]) -> bool {
    match wire.first_chunk::<HEADER_LEN>() {
        None => true,
        Some(header) => wire.len() < HEADER_LEN + Header::decode(header).unwrap().len as usize,
    }
}

fn check(frame: &Frame) {
    let Frame { header, body } = frame;
    assert_eq!(header.len as usize, body.len());
    assert!(body.len() <= BODY_MAX);
    assert_eq!(header.end() - header.offset, u64::from(header.len));
    match header.kind {
        Kind::Open => survives::<stream::Open>(frame),
        Kind::Opened => survives::<stream::Opened>(frame),
        Kind::Gap => survives::<stream::Gap>(frame),
        Kind::Error => survives::<stream::Error>(frame),
        Kind::Data => {}
        Kind::Ack | Kind::Eof | Kind::Stop | Kind::Stopped => assert!(body.is_empty()),
    }
}

/// A body that is a message is the same message once it was sent on.
fn survives<M: Message + std::fmt::Debug>(frame: &Frame) {
    let Ok(message) = frame.message::<M>() else { return };
    // What protobuf leaves open may take more bytes than it came in.
    match Frame::with_message(frame.header.kind, frame.header.offset, &message) {
        Ok(again) => assert_eq!(again.message::<M>().unwrap(), message),
        Err(error) => assert!(message.compute_size() > BODY_MAX as u64, "{error}"),
    }
}

/// A connection that gives at most so many bytes at once.
struct Pieces<'a> {
    left: &'a [u8],
    most: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (piece, left) = self.left.split_at(self.left.len().min(self.most).min(buffer.remaining()));
        buffer.put_slice(piece);
        self.left = left;
        Poll::Ready(Ok(()))
    }
}

/// What a future gives that has nothing to wait for.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("memory is always ready"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_of_the_frame_codec_holds() {
        super::replay("frame", super::frame);
    }
}
