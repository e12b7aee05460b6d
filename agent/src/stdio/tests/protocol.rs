use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use stream::Stream::{STDERR, STDIN, STDOUT, STREAM_UNSPECIFIED, TERMINAL};
use tokio::io::AsyncWriteExt;

use super::*;
use crate::stdio::StdioError;

/// A hub with one process that has written "hello\n" to stdout and exited.
async fn hello() -> Arc<Hub> {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "echo hello");
    assert!(exit(child).await.success());
    until(|| info(&hub, "stdout").end_offset == 6).await;
    hub
}

async fn refused(hub: &Arc<Hub>, open: Open, offset: u64, code: ErrorCode) -> stream::Error {
    let mut host = Host::dial(hub, 4096);
    host.send_open(&open, offset).await;
    host.expect_refusal(code).await
}

#[tokio::test]
async fn a_stream_that_does_not_exist_is_not_found() {
    let hub = hello().await;
    for stream in [STDIN, STDOUT, STDERR] {
        let elsewhere = Open { container_id: "d".into(), ..open_message(stream, 1) };
        refused(&hub, elsewhere, 0, ErrorCode::NOT_FOUND).await;
        let exec = Open { exec_id: "e".into(), ..open_message(stream, 1) };
        refused(&hub, exec, 0, ErrorCode::NOT_FOUND).await;
        let epoch = Open { epoch: 1, ..open_message(stream, 1) };
        refused(&hub, epoch, 0, ErrorCode::NOT_FOUND).await;
    }
    refused(&hub, open_message(TERMINAL, 1), 0, ErrorCode::NOT_FOUND).await;
    assert_eq!(hub.totals().refused_connections, 0, "none of these breaks the protocol");
}

#[tokio::test]
async fn a_stream_without_a_name_breaks_the_protocol() {
    let hub = hello().await;
    refused(&hub, open_message(STREAM_UNSPECIFIED, 1), 0, ErrorCode::PROTOCOL).await;
    let unknown = Open { stream: protobuf::EnumOrUnknown::from_i32(99), ..open_message(STDOUT, 1) };
    refused(&hub, unknown, 0, ErrorCode::PROTOCOL).await;
    assert_eq!(hub.totals().refused_connections, 2);
}

#[tokio::test]
async fn another_timeline_is_refused() {
    let hub = hello().await;
    let open = Open { timeline: TIMELINE + 1, ..open_message(STDOUT, 1) };
    refused(&hub, open, 0, ErrorCode::OTHER_TIMELINE).await;
}

#[tokio::test]
async fn a_lower_or_equal_attempt_is_stale_and_disturbs_nobody() {
    for stream in [STDOUT, STDIN] {
        let hub = hello().await;
        let (mut served, _) = Host::open(&hub, stream, 5, 0).await;
        for attempt in [0, 4, 5] {
            refused(&hub, open_message(stream, attempt), 0, ErrorCode::STALE_ATTEMPT).await;
        }
        match stream {
            STDOUT => assert_eq!(served.drain(0).await.0, b"hello\n"),
            _ => {
                served.send_data(0, b"x").await;
                served.expect(Kind::Ack).await;
            }
        }
    }
}

#[tokio::test]
async fn the_epoch_that_opened_told_opens_the_stream_again() {
    let hub = hello().await;
    let mut host = Host::dial(&hub, 4096);
    host.send_open(&open_message(STDOUT, 1), 0).await;
    let epoch = host.expect(Kind::Opened).await.message::<stream::Opened>().unwrap().epoch;
    let mut host = Host::dial(&hub, 4096);
    host.send_open(&Open { epoch, ..open_message(STDOUT, 2) }, 3).await;
    assert_eq!(host.expect(Kind::Opened).await.header.offset, 3);
    assert_eq!(host.drain(3).await.0, b"lo\n");
}

#[tokio::test]
async fn a_higher_attempt_preempts() {
    for stream in [STDOUT, STDIN] {
        let hub = hello().await;
        let (old, _) = Host::open(&hub, stream, 1, 0).await;
        let (_new, _) = Host::open(&hub, stream, 2, 0).await;
        old.expect_refusal(ErrorCode::PREEMPTED).await;
    }
}

#[tokio::test]
async fn an_offset_that_is_gone_or_not_there_yet_is_refused_with_the_distance() {
    let hub = hello().await;
    let ahead = refused(&hub, open_message(STDOUT, 1), 10, ErrorCode::OFFSET_AHEAD).await;
    assert_eq!(ahead.bytes, 4);
    let (mut host, _) = Host::open(&hub, STDOUT, 2, 4).await;
    let lost = refused(&hub, open_message(STDOUT, 3), 1, ErrorCode::OFFSET_LOST).await;
    assert_eq!(lost.bytes, 3);
    assert_eq!(host.drain(4).await.0, b"o\n", "a refused OPEN changes nothing");
}

#[tokio::test]
async fn an_ack_beyond_what_was_sent_is_refused() {
    let hub = hello().await;
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(host.expect(Kind::Data).await.header.end(), 6);
    host.ack(7).await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
    assert_eq!(info(&hub, "stdout").acked_offset, 0);
}

#[tokio::test]
async fn a_frame_that_may_not_come_is_refused_and_counted() {
    let hub = hello().await;
    let kinds = [Kind::Open, Kind::Opened, Kind::Data, Kind::Eof, Kind::Gap, Kind::Stopped, Kind::Error];
    for (attempt, kind) in (1..).zip(kinds) {
        let (mut host, _) = Host::open(&hub, STDOUT, attempt, 0).await;
        host.send_header(Header::new(kind, 0)).await;
        host.expect_refusal(ErrorCode::PROTOCOL).await;
    }
    assert_eq!(hub.totals().refused_connections, kinds.len() as u64);

    let mut host = Host::dial(&hub, 4096);
    host.ack(0).await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
    let mut host = Host::dial(&hub, 4096);
    let header = Header { len: 3, ..Header::new(Kind::Open, 0) };
    host.send(&Frame { header, body: vec![0xff; 3].into() }).await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
    assert_eq!(hub.totals().refused_connections, kinds.len() as u64 + 2);
}

#[tokio::test]
async fn a_malformed_frame_closes_the_connection_and_is_counted() {
    let hub = hello().await;
    let whole = Header { len: 10, ..Header::new(Kind::Data, 0) }.encode();
    let mut expected = 0;
    for (byte, value) in [(0, 77), (1, 1), (2, 1), (6, 0xff), (7, 0xff)] {
        for opened in [false, true] {
            let mut host = match opened {
                true => Host::open(&hub, STDOUT, expected + 1, 0).await.0,
                false => Host::dial(&hub, 4096),
            };
            let mut wire = whole;
            wire[byte] = value;
            soon(host.connection.write_all(&wire)).await.unwrap();
            host.expect_refusal(ErrorCode::PROTOCOL).await;
            expected += 1;
            assert_eq!(hub.totals().refused_connections, expected);
        }
    }
}

#[tokio::test]
async fn a_connection_that_ends_at_any_byte_leaves_the_stream_usable() {
    let hub = hello().await;
    let mut wire = Vec::new();
    let open = Frame::with_message(Kind::Open, 0, &open_message(STDOUT, 1)).unwrap();
    write_frame(&mut wire, &open).await.unwrap();
    for cut in 0..wire.len() {
        let mut host = Host::dial(&hub, 4096);
        soon(host.connection.write_all(&wire[..cut])).await.unwrap();
    }
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(host.drain(0).await.0, b"hello\n");
    assert_eq!(hub.totals().refused_connections, 0);
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_open_is_closed_after_10_s_and_counted() {
    let hub = hub();
    for part in [0, 5] {
        let begun = tokio::time::Instant::now();
        let mut host = Host::dial(&hub, 4096);
        let open = Header { len: 20, ..Header::new(Kind::Open, 0) }.encode();
        host.connection.write_all(&open[..part]).await.unwrap();
        assert_eq!(host.receive().await, None);
        assert_eq!(begun.elapsed().as_secs(), 10);
    }
    assert_eq!(hub.totals().refused_connections, 2);
}

#[tokio::test]
async fn connections_are_limited_and_a_place_is_free_again_when_one_ends() {
    let hub = hello().await;
    let mut held: Vec<_> = (0..1023).map(|_| Host::dial(&hub, 64)).collect();
    tokio::task::yield_now().await;
    until(|| hub.connections.load(std::sync::atomic::Ordering::Relaxed) == 1023).await;
    Host::dial(&hub, 4096).expect_refusal(ErrorCode::EXHAUSTED).await;
    held.pop();
    until(|| hub.connections.load(std::sync::atomic::Ordering::Relaxed) == 1022).await;
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(host.drain(0).await.0, b"hello\n");
}

#[tokio::test]
async fn processes_are_limited_and_ids_are_unique() {
    let hub = Hub::new(Limits { ring_budget: 0, processes: 2 }, TIMELINE);
    let exec = |n: u32| ProcessId { container: "c".into(), exec: n.to_string() };
    hub.open(&exec(1), request(Policy::Block)).unwrap();
    assert!(matches!(hub.open(&exec(1), request(Policy::Block)), Err(StdioError::AlreadyExists(_))));
    hub.open(&exec(2), request(Policy::Block)).unwrap();
    assert!(matches!(hub.open(&exec(3), request(Policy::Block)), Err(StdioError::Exhausted(2))));
    hub.close(&exec(1));
    hub.open(&exec(3), request(Policy::Block)).unwrap();
    assert!(matches!(hub.resize(&exec(3), 80, 24), Err(StdioError::NoTerminal(_))));
    assert!(matches!(hub.resize(&exec(1), 80, 24), Err(StdioError::NotFound(_))));
}

#[tokio::test]
async fn the_child_s_ends_block_and_unwanted_streams_are_dev_null() {
    let hub = hub();
    let ChildStdio::Pipes(ends) = hub.open(&process(), request(Policy::Block)).unwrap() else { panic!() };
    for end in &ends {
        let flags = OFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
    }
    hub.close(&process());
    let none = Request { terminal: false, stdin: false, stdout: false, stderr: false, policy: Policy::Block };
    let ChildStdio::Pipes(ends) = hub.open(&process(), none).unwrap() else { panic!() };
    let null = nix::sys::stat::stat("/dev/null").unwrap();
    for end in &ends {
        assert_eq!(nix::sys::stat::fstat(end.as_fd()).unwrap().st_rdev, null.st_rdev);
    }
    assert!(hub.streams().is_empty());
    refused(&hub, open_message(STDOUT, 1), 0, ErrorCode::NOT_FOUND).await;
}
