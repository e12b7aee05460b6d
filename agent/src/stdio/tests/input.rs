use cube_protocol::frame::STDIN_WINDOW;
use stream::Stream::{STDIN, STDOUT};

use super::*;

/// Sends `input` from `offset` as the protocol allows, until it is acknowledged up to `until`.
async fn feed(host: &mut Host, input: &[u8], offset: u64, until: u64, random: &mut Random) -> u64 {
    let (mut sent, mut acked) = (offset, offset);
    while acked < until {
        let room = (STDIN_WINDOW - (sent - acked)).min(input.len() as u64 - sent);
        if room > 0 && random.below(4) > 0 {
            let len = 1 + random.below(room as usize);
            host.send_data(sent, &input[sent as usize..sent as usize + len]).await;
            sent += len as u64;
        } else if sent > acked {
            let ack = host.expect(Kind::Ack).await;
            assert!(ack.header.offset > acked && ack.header.offset <= sent);
            acked = ack.header.offset;
        }
    }
    acked
}

async fn send_eof(host: &mut Host, offset: u64) {
    host.send_header(Header::new(Kind::Eof, offset)).await;
    let last = Header::new(Kind::Ack, offset).with_flags(Flags::LAST);
    assert_eq!(host.expect(Kind::Ack).await.header, last);
}

#[tokio::test]
async fn every_byte_reaches_the_process_once_over_connections_cut_anywhere_and_then_eof() {
    let hub = hub();
    let mut random = Random(3);
    let input = random.bytes(2_000_000);
    let child = spawn(&hub, &process(), Policy::Block, "cat");
    let collector = {
        let hub = Arc::clone(&hub);
        tokio::spawn(async move { Host::open(&hub, STDOUT, 1, 0).await.0.drain(0).await.0 })
    };
    let (mut attempt, mut acked) = (0, 0);
    while acked < input.len() as u64 {
        attempt += 1;
        let (mut host, start) = Host::open(&hub, STDIN, attempt, 0).await;
        assert!(start >= acked, "what was acknowledged stays so");
        let until = (start + random.below(300_000) as u64).min(input.len() as u64);
        acked = feed(&mut host, &input, start, until, &mut random).await;
        // Some that no ACK has come for are on their way when the connection dies.
        let rest = &input[acked as usize..];
        let len = random.below(5000).min(rest.len());
        if len > 0 {
            let header = Header { len: rest.len().min(5000) as u32, ..Header::new(Kind::Data, acked) };
            let mut wire = header.encode().to_vec();
            wire.extend_from_slice(&rest[..len]);
            let _ = tokio::io::AsyncWriteExt::write_all(&mut host.connection, &wire).await;
        }
    }
    assert!(attempt > 5);
    for attempt in attempt + 1..attempt + 3 {
        let (mut host, start) = Host::open(&hub, STDIN, attempt, input.len() as u64).await;
        assert_eq!(start, input.len() as u64);
        send_eof(&mut host, start).await;
    }
    assert!(soon(collector).await.unwrap() == input);
    assert!(exit(child).await.success());
}

#[tokio::test]
async fn input_that_nobody_reads_any_more_is_taken_so_that_the_host_never_hangs() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "exit 0");
    assert!(exit(child).await.success());
    let (mut host, _) = Host::open(&hub, STDIN, 1, 0).await;
    let input = vec![7; 1_000_000];
    feed(&mut host, &input, 0, input.len() as u64, &mut Random(1)).await;
    send_eof(&mut host, input.len() as u64).await;
}

#[tokio::test]
async fn a_process_that_does_not_read_holds_the_host_at_the_window_and_stop_is_still_seen() {
    let hub = hub();
    let _child = spawn(&hub, &process(), Policy::Block, "exec sleep 1000");
    let (mut host, _) = Host::open(&hub, STDIN, 1, 0).await;
    let input = vec![7; 1_000_000];
    let window = STDIN_WINDOW as usize;
    host.send_data(0, &input[..window]).await;
    let pipe = host.expect(Kind::Ack).await.header.offset;
    assert_eq!(pipe, STDIN_WINDOW, "a pipe holds 64 KiB unless told otherwise");
    host.send_data(pipe, &input[..window]).await;
    host.send_header(Header::new(Kind::Stop, 0)).await;
    assert_eq!(host.expect(Kind::Stopped).await.header.offset, pipe);
    host.send_header(Header::new(Kind::Ack, 0).with_flags(Flags::LAST)).await;
    assert_eq!(host.receive().await, None);

    let (mut host, start) = Host::open(&hub, STDIN, 2, 0).await;
    assert_eq!(start, pipe);
    host.send_data(pipe, &input[..window]).await;
    host.send_data(pipe + STDIN_WINDOW, &input[..1]).await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
}

#[tokio::test]
async fn data_that_is_not_the_next_is_refused() {
    let hub = hub();
    hub.open(&process(), request(Policy::Block)).unwrap();
    let (mut host, _) = Host::open(&hub, STDIN, 1, 0).await;
    host.send_data(1, b"x").await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
    let (mut host, _) = Host::open(&hub, STDIN, 2, 0).await;
    host.send_header(Header::new(Kind::Eof, 5)).await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
    assert_eq!(hub.totals().refused_connections, 2);
}

#[tokio::test]
async fn data_after_eof_is_refused() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "cat >/dev/null");
    let (mut host, _) = Host::open(&hub, STDIN, 1, 0).await;
    send_eof(&mut host, 0).await;
    host.send_data(0, b"x").await;
    host.expect_refusal(ErrorCode::PROTOCOL).await;
    assert!(exit(child).await.success());
}

/// As in a clone, whose host has an input of its own, or after a rollback.
#[tokio::test]
async fn a_host_that_does_not_know_of_the_eof_may_send_on_and_is_not_refused() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "cat >/dev/null; exec sleep 1000");
    let (mut host, _) = Host::open(&hub, STDIN, 1, 0).await;
    host.send_data(0, b"abc").await;
    assert_eq!(host.expect(Kind::Ack).await.header.offset, 3);
    send_eof(&mut host, 3).await;
    let (mut host, start) = Host::open(&hub, STDIN, 2, 0).await;
    assert_eq!(start, 3);
    let input = [7; 200_000];
    feed(&mut host, &input, start, input.len() as u64, &mut Random(1)).await;
    send_eof(&mut host, input.len() as u64).await;
    drop(child);
}
