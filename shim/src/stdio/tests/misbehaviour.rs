//! A guest that an escaped container controls.

use cube_protocol::{
    frame::{HEADER_LEN, Header, Kind},
    stream::ErrorCode,
};

use super::*;
use crate::stdio::fake_agent::{Fault, wire};

fn data(offset: u64, body: &[u8]) -> Vec<u8> {
    wire(Header::new(Kind::Data, offset), body)
}

#[tokio::test]
async fn a_frame_that_the_protocol_forbids_closes_the_connection_and_costs_no_byte() {
    let mut long = data(3, b"");
    long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut reserved = data(3, b"x");
    reserved[2] = 1;
    for bad in [
        data(4, b"ahead"),
        data(2, b"back"),
        data(3, b""),
        long,
        reserved,
        vec![0xff; HEADER_LEN],
        wire(Header::new(Kind::Eof, 4), b""),
        wire(Header::new(Kind::Eof, 2), b""),
        wire(Header::new(Kind::Gap, u64::MAX), b""),
        wire(Header::new(Kind::Gap, 3), b""),
        wire(Header::new(Kind::Gap, 10), &[0xff; 4]),
        wire(Header::new(Kind::Opened, 3), b""),
        wire(Header::new(Kind::Ack, 3), b""),
        wire(Header::new(Kind::Stopped, 3), b""),
        wire(Header::new(Kind::Error, 0), &[0xff; 4]),
        data(u64::MAX, b"overflow"),
    ] {
        let place = Place::new();
        // What came before the bad frame was good.
        let raw = Fault::Raw([data(0, b"abc"), bad.clone()].concat());
        let agent = FakeAgent::with_faults(100, [raw]);
        agent.write(Stream::STDOUT, b"abcdef");
        agent.end(Stream::STDOUT, Flags::NONE);
        let mut config = place.config();
        config.stdout = place.fifo("out");
        let mut reader = open_reader(&config.stdout);
        let io = started(config, &agent).await;
        assert_eq!(soon(read_to_end(&mut reader)).await, b"abcdef", "after {bad:?}");
        assert_eq!(output(&io, "stdout").refused, 1, "after {bad:?}");
    }
}

#[tokio::test]
async fn a_guest_that_never_behaves_is_given_up() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(100, std::iter::repeat_n(Fault::Raw(vec![0xff; 40]), 1000));
    let mut config = place.config();
    config.stdout = place.fifo("out");
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    assert_eq!(soon(read_to_end(&mut reader)).await, b"");
    assert_eq!(output(&io, "stdout").refused, 16);
    assert!(!soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn a_stream_that_cannot_be_continued_is_not_dialled_again() {
    for code in [
        ErrorCode::NOT_FOUND,
        ErrorCode::PREEMPTED,
        ErrorCode::STALE_ATTEMPT,
        ErrorCode::OFFSET_LOST,
        ErrorCode::OFFSET_AHEAD,
        ErrorCode::OTHER_TIMELINE,
    ] {
        let place = Place::new();
        let agent = FakeAgent::with_faults(100, [Fault::Refuse(code)]);
        let mut config = place.config();
        config.stdout = place.fifo("out");
        let mut reader = open_reader(&config.stdout);
        let io = started(config, &agent).await;
        assert_eq!(soon(read_to_end(&mut reader)).await, b"");
        let report = soon(io.finish(LIMIT)).await;
        assert!(!report.complete, "{code:?}");
        assert_eq!(agent.opens().len(), 1, "{code:?}");
    }
}

#[tokio::test]
async fn a_guest_that_is_full_is_tried_again() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(100, std::iter::repeat_n(Fault::Refuse(ErrorCode::EXHAUSTED), 5));
    agent.write(Stream::STDOUT, b"at last");
    agent.end(Stream::STDOUT, Flags::NONE);
    let mut config = place.config();
    config.stdout = place.fifo("out");
    let mut reader = open_reader(&config.stdout);
    let _io = started(config, &agent).await;
    assert_eq!(soon(read_to_end(&mut reader)).await, b"at last");
}

#[tokio::test]
async fn an_acknowledgement_of_what_was_never_sent_is_refused() {
    let place = Place::new();
    let ahead = Fault::Raw(wire(Header::new(Kind::Ack, 1), b""));
    let agent = FakeAgent::with_faults(100, [ahead, Fault::OpenedAt(99)]);
    let config = StdioConfig { stdin: place.fifo("in"), ..place.config() };
    let path = config.stdin.clone();
    let io = started(config, &agent).await;
    soon(until(|| output(&io, "stdin").refused == 2)).await;
    File::options().write(true).open(path).unwrap().write_all(b"in").unwrap();
    soon(agent.until(|a| a.stdin().bytes == b"in")).await;
}
