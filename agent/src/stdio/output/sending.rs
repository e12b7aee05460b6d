//! An output stream towards the host: what each connection gets, and how its ACKs free the ring.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use cube_protocol::frame::{BODY_MAX, Flags, Frame, Header, Kind};
use tokio::io::AsyncWrite;

use super::{Output, Phase, State};
use crate::stdio::{
    Policy,
    ring::{Ring, slices_for},
    session::{Flow, Refusal, Session, Signals, Step, Stop, Stream},
};

/// A connection's place in the stream.
#[derive(Debug)]
pub(super) struct Sending {
    /// Everything below was given to the connection.
    pub(super) sent: u64,
    /// End of the DATA frame that has begun; `sent` if none has.
    frame_end: u64,
    /// The rest of that frame, once the ring need not hold it any longer.
    detached: Option<Vec<u8>>,
    eof_sent: bool,
}

impl Sending {
    /// Lets the ring forget the rest of a frame whose header promises it already: a connection that
    /// takes its time holds at most one frame, and no ring. Due before the ring drops such bytes,
    /// and before the connection is ended.
    pub(super) fn detach(&mut self, ring: &Ring) {
        if self.sent < self.frame_end && self.detached.is_none() {
            self.detached = Some(ring.copy(self.sent, self.frame_end));
        }
    }
}

impl State {
    /// What a connection that is neither refused nor stopped has to write next.
    fn next_output(&mut self, attempt: u64) -> Step {
        let State { ring, phase, losses, sessions, .. } = self;
        let Some(Session { detail: sending, .. }) = sessions.get(attempt) else { return Step::Wait };
        let (tail, end) = (ring.tail(), ring.end());
        if sending.sent < tail {
            let lost = tail - sending.sent;
            losses.add(tail, lost);
            (sending.sent, sending.frame_end) = (tail, tail);
            return Step::Gap { offset: tail, lost };
        }
        if sending.sent < end {
            let len = (end - sending.sent).min(BODY_MAX as u64);
            sending.frame_end = sending.sent + len;
            return Step::Data(Header { len: len as u32, ..Header::new(Kind::Data, sending.sent) });
        }
        match *phase {
            Phase::Ended { truncated } if !sending.eof_sent => {
                sending.eof_sent = true;
                let flags = if truncated { Flags::TRUNCATED } else { Flags::NONE };
                Step::Plain(Header::new(Kind::Eof, end).with_flags(flags))
            }
            _ => Step::Wait,
        }
    }
}

impl Stream for Output {
    fn open(&self, attempt: u64, offset: u64) -> Result<Arc<Signals>, Refusal> {
        let mut state = self.state();
        state.sessions.check(attempt)?;
        let (tail, end) = (state.ring.tail(), state.ring.end());
        if offset > end {
            return Err(Refusal::ahead(offset, end));
        }
        if offset < tail && self.policy == Policy::Block {
            return Err(Refusal::lost(offset, tail));
        }
        let State { ring, sessions, .. } = &mut *state;
        if let Some(replaced) = sessions.current() {
            replaced.detail.detach(ring);
        }
        state.acknowledge(offset);
        state.losses.forget_unconfirmed();
        let start = offset.max(tail);
        state.losses.add(start, start - offset);
        self.room.notify_one();
        let sending = Sending { sent: start, frame_end: start, detached: None, eof_sent: false };
        Ok(state.sessions.admit(attempt, sending))
    }

    fn receive(&self, attempt: u64, frame: &Frame) -> Result<Flow, Refusal> {
        let mut state = self.state();
        let Some(session) = state.sessions.get(attempt).filter(|session| session.is_live()) else {
            return Ok(Flow::Continue);
        };
        let Header { kind, flags, offset, .. } = frame.header;
        match kind {
            Kind::Ack if offset > session.detail.sent => Err(Refusal::protocol(format!(
                "ACK of {offset}, but only {} was sent on this connection",
                session.detail.sent
            ))),
            Kind::Ack => {
                state.acknowledge(offset);
                self.room.notify_one();
                Ok(if flags.contains(Flags::LAST) { Flow::Close } else { Flow::Continue })
            }
            Kind::Stop => {
                if session.stop == Stop::No {
                    session.stop = Stop::Asked;
                    session.wake();
                }
                Ok(Flow::Continue)
            }
            kind => Err(Refusal::unexpected(kind)),
        }
    }

    fn next(&self, attempt: u64) -> Step {
        let mut state = self.state();
        let Some(session) = state.sessions.get(attempt) else { return Step::Wait };
        let sent = session.detail.sent;
        session
            .first_step(self.epoch, sent)
            .or_else(|| session.stop_step(sent))
            .unwrap_or_else(|| state.next_output(attempt))
    }

    /// Writes header and ring memory in one system call. The lock is held across it, which does not
    /// wait: nothing is copied, and no memory is shared beyond the call.
    fn poll_send<W: AsyncWrite + Unpin>(
        &self,
        attempt: u64,
        head: &mut &[u8],
        mut writer: Pin<&mut W>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.state();
        let State { ring, sessions, .. } = &mut *state;
        let Some(session) = sessions.get(attempt) else { return Poll::Ready(Ok(())) };
        let sending = &mut session.detail;
        while !head.is_empty() || sending.sent < sending.frame_end {
            let mut slices = [IoSlice::new(&[]); slices_for(BODY_MAX) + 1];
            slices[0] = IoSlice::new(head);
            let (first, rest) = if head.is_empty() { (0, &mut slices[..]) } else { (1, &mut slices[1..]) };
            let count = match &sending.detached {
                Some(detached) => {
                    let left = (sending.frame_end - sending.sent) as usize;
                    rest[0] = IoSlice::new(&detached[detached.len().saturating_sub(left)..]);
                    1
                }
                None => ring.slices(sending.sent, sending.frame_end, rest),
            };
            let written = ready!(writer.as_mut().poll_write_vectored(context, &slices[..first + count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_head = written.min(head.len());
            *head = &head[of_head..];
            sending.sent += (written - of_head) as u64;
        }
        sending.detached = None;
        Poll::Ready(Ok(()))
    }

    fn refuse(&self, attempt: u64, refusal: Refusal) {
        let mut state = self.state();
        let State { ring, sessions, .. } = &mut *state;
        if let Some(session) = sessions.get(attempt) {
            session.detail.detach(ring);
            session.end(refusal);
        }
    }

    fn leave(&self, attempt: u64) {
        self.state().sessions.remove(attempt);
    }
}
