use std::pin::pin;

use stream::Stream::{STDERR, STDOUT};
use tokio::io::AsyncReadExt;

use super::*;
use crate::stdio::ring::RING_MAX;

/// A host that loses its connection after any byte, keeps the whole frames that it got, and
/// acknowledges some of them.
async fn take_with_cuts(hub: &Arc<Hub>, expected: &[u8], random: &mut Random) -> u64 {
    let mut taken: Vec<u8> = Vec::new();
    let mut acked = 0;
    for attempt in 1.. {
        let mut host = Host::dial(hub, 1 + random.below(200_000));
        host.send_open(&open_message(STDOUT, attempt), taken.len() as u64).await;
        let mut budget = random.below(1_500_000);
        loop {
            // The connection is cut here or in mid-frame, where the agent still writes.
            if budget == 0 {
                break;
            }
            let mut head = [0; 16];
            soon(host.connection.read_exact(&mut head)).await.unwrap();
            let header = Header::decode(&head).unwrap();
            let part = budget.min(header.len as usize);
            budget -= part;
            let mut body = vec![0; part];
            soon(host.connection.read_exact(&mut body)).await.unwrap();
            match header.kind {
                Kind::Opened => assert_eq!(header.offset, taken.len() as u64),
                Kind::Data if part < header.len as usize => break,
                Kind::Data => {
                    assert_eq!(header.offset, taken.len() as u64);
                    assert_eq!(body, expected[taken.len()..taken.len() + body.len()]);
                    taken.extend_from_slice(&body);
                    if random.below(3) == 0 {
                        acked = taken.len() as u64;
                        host.ack(acked).await;
                    }
                }
                Kind::Eof => {
                    assert_eq!(header, Header::new(Kind::Eof, expected.len() as u64));
                    assert_eq!(taken.len(), expected.len());
                    assert!(acked <= header.offset);
                    return attempt;
                }
                kind => panic!("{kind:?}"),
            }
        }
    }
    unreachable!()
}

#[tokio::test]
async fn every_byte_arrives_once_over_connections_cut_anywhere() {
    for seed in 0..4 {
        let hub = hub();
        let child = spawn(&hub, &process(), Policy::Block, "seq 1 1000000");
        let connections = take_with_cuts(&hub, &seq(1_000_000), &mut Random(seed)).await;
        assert!(connections > 1);
        assert!(exit(child).await.success());
    }
}

#[tokio::test]
async fn stdout_and_stderr_are_never_mixed() {
    let hub = hub();
    let _child = spawn(&hub, &process(), Policy::Block, "echo out; echo err >&2; echo out");
    let (mut out, _) = Host::open(&hub, STDOUT, 1, 0).await;
    let (mut err, _) = Host::open(&hub, STDERR, 1, 0).await;
    assert_eq!(out.drain(0).await.0, b"out\nout\n");
    assert_eq!(err.drain(0).await.0, b"err\n");
}

#[tokio::test]
async fn a_writer_whose_output_nobody_takes_waits_and_loses_nothing() {
    let hub = hub();
    let mut child = spawn(&hub, &process(), Policy::Block, "seq 1 1000000");
    until(|| info(&hub, "stdout").end_offset == RING_MAX as u64).await;
    assert!(child.0.try_wait().unwrap().is_none(), "6.9 MB fit into no ring and pipe");
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    let (taken, eof) = host.drain(0).await;
    assert!(taken == seq(1_000_000));
    assert_eq!(eof, Header::new(Kind::Eof, taken.len() as u64));
    assert!(exit(child).await.success());
}

#[tokio::test]
async fn a_dropping_stream_never_stalls_its_writer_and_counts_what_it_lost() {
    let hub = hub();
    let written = seq(1_000_000);
    let child = spawn(&hub, &process(), Policy::DropOldest, "seq 1 1000000");
    assert!(exit(child).await.success());
    until(|| info(&hub, "stdout").end_offset == written.len() as u64).await;
    let (mut host, start) = Host::open(&hub, STDOUT, 1, 0).await;
    let (taken, eof) = host.drain(start).await;
    assert_eq!(eof.offset, written.len() as u64);
    assert!(taken == written[start as usize..]);
    assert!(taken.len() > RING_MAX - 64 * 1024, "the newest megabyte is kept");
    assert_eq!(info(&hub, "stdout").lost_bytes, start);
    assert_eq!(info(&hub, "stdout").lost_bytes + taken.len() as u64, written.len() as u64);
}

#[tokio::test]
async fn a_loss_that_was_told_on_a_connection_that_is_gone_is_counted_once() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::DropOldest, "seq 1 1000000");
    assert!(exit(child).await.success());
    until(|| info(&hub, "stdout").end_offset == seq(1_000_000).len() as u64).await;
    let lost = info(&hub, "stdout").lost_bytes;
    for attempt in 1..3 {
        let (host, start) = Host::open(&hub, STDOUT, attempt, 0).await;
        assert_eq!((start, info(&hub, "stdout").lost_bytes), (lost, lost));
        drop(host);
        until(|| hub.connections.load(std::sync::atomic::Ordering::Relaxed) == 0).await;
        assert_eq!(info(&hub, "stdout").lost_bytes, lost, "nothing more was lost by the end of a connection");
    }
}

#[tokio::test]
async fn a_dropping_stream_drops_nothing_before_more_comes() {
    let hub = hub();
    let script = format!("head -c {RING_MAX} /dev/zero; read wait; echo more");
    let _child = spawn(&hub, &process(), Policy::DropOldest, &script);
    until(|| info(&hub, "stdout").end_offset == RING_MAX as u64).await;
    let (_host, start) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!((start, info(&hub, "stdout").lost_bytes), (0, 0));
    let (mut stdin, _) = Host::open(&hub, stream::Stream::STDIN, 1, 0).await;
    stdin.send_data(0, b"\n").await;
    until(|| info(&hub, "stdout").end_offset == RING_MAX as u64 + 5).await;
    let (_host, start) = Host::open(&hub, STDOUT, 2, 0).await;
    assert!(start > 0 && start < 64 * 1024);
}

#[tokio::test]
async fn a_slow_connection_of_a_dropping_stream_gets_whole_frames_and_gaps() {
    let hub = hub();
    let written = seq(1_000_000);
    let mut host = Host::dial(&hub, 1000);
    let child = spawn(&hub, &process(), Policy::DropOldest, "seq 1 1000; read go; seq 1001 1000000");
    host.send_open(&open_message(STDOUT, 1), 0).await;
    host.expect(Kind::Opened).await;
    until(|| info(&hub, "stdout").end_offset > 3000).await;
    let (mut stdin, _) = Host::open(&hub, stream::Stream::STDIN, 1, 0).await;
    stdin.send_data(0, b"go\n").await;
    // The first frame has begun and waits for its reader while the ring turns over many times.
    assert!(exit(child).await.success());
    let (mut expected, mut taken, mut lost) = (0, 0, 0);
    loop {
        let frame = host.receive().await.unwrap();
        match frame.header.kind {
            Kind::Data => {
                assert_eq!(frame.header.offset, expected);
                expected = frame.header.end();
                assert!(frame.body == written[frame.header.offset as usize..expected as usize]);
                taken += frame.body.len() as u64;
                host.ack(expected).await;
            }
            Kind::Gap => {
                let gap: stream::Gap = frame.message().unwrap();
                assert_eq!(frame.header.offset, expected + gap.lost_bytes);
                lost += gap.lost_bytes;
                expected = frame.header.offset;
            }
            Kind::Eof => break,
            kind => panic!("{kind:?}"),
        }
    }
    assert!(taken > 0 && lost > 0);
    assert_eq!(taken + lost, written.len() as u64);
    assert_eq!(info(&hub, "stdout").lost_bytes, lost);
}

#[tokio::test]
async fn dropping_with_cuts_delivers_or_counts_every_byte() {
    let hub = hub();
    let written = seq(1_000_000);
    let _child = spawn(&hub, &process(), Policy::DropOldest, "seq 1 1000000");
    let mut random = Random(9);
    let (mut expected, mut taken, mut lost) = (0u64, 0, 0);
    let mut attempt = 0;
    'connections: loop {
        attempt += 1;
        let (mut host, start) = Host::open(&hub, STDOUT, attempt, expected).await;
        lost += start - expected;
        expected = start;
        for _ in 0..random.below(12) {
            let frame = host.receive().await.unwrap();
            match frame.header.kind {
                Kind::Data => {
                    assert_eq!(frame.header.offset, expected);
                    expected = frame.header.end();
                    assert!(frame.body == written[frame.header.offset as usize..expected as usize]);
                    taken += frame.body.len() as u64;
                }
                Kind::Gap => {
                    lost += frame.header.offset - expected;
                    expected = frame.header.offset;
                }
                Kind::Eof => break 'connections,
                kind => panic!("{kind:?}"),
            }
            tokio::time::sleep(Duration::from_millis(random.below(3) as u64)).await;
        }
    }
    assert_eq!(taken + lost, written.len() as u64);
    assert_eq!(info(&hub, "stdout").lost_bytes, lost);
}

#[tokio::test]
async fn eof_comes_when_the_last_writer_is_gone_and_again_after_a_reconnect() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "exec 3<&0; (read wait <&3; echo late) & echo early");
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(host.expect(Kind::Data).await.body, &b"early\n"[..]);
    assert!(exit(child).await.success());
    let (mut stdin, _) = Host::open(&hub, stream::Stream::STDIN, 1, 0).await;
    stdin.send_data(0, b"\n").await;
    assert_eq!(host.drain(6).await.0, b"late\n");

    let (mut again, _) = Host::open(&hub, STDOUT, 2, 11).await;
    assert_eq!(again.drain(11).await, (Vec::new(), Header::new(Kind::Eof, 11)));

    hub.close(&process());
    again.expect_refusal(ErrorCode::NOT_FOUND).await;
    assert!(hub.streams().is_empty());
    assert_eq!(hub.totals().ring_bytes, 0);
}

#[tokio::test]
async fn a_process_that_keeps_the_pipe_gets_2_s_and_no_sigpipe() {
    let hub = hub();
    let marker = tempfile::NamedTempFile::new().unwrap();
    let script =
        format!("exec 3<&0; (read wait <&3; echo late; echo alive >{}) & echo main", marker.path().display());
    let child = spawn(&hub, &process(), Policy::Block, &script);
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(host.expect(Kind::Data).await.body, &b"main\n"[..]);
    assert!(exit(child).await.success());
    let exited = std::time::Instant::now();
    hub.exited(&process());
    let eof = host.expect(Kind::Eof).await;
    assert_eq!(eof.header, Header::new(Kind::Eof, 5).with_flags(Flags::TRUNCATED));
    assert!(exited.elapsed() >= Duration::from_secs(2));

    // Even after Delete the survivor writes to somebody.
    hub.close(&process());
    until(|| std::fs::read(marker.path()).unwrap() == b"alive\n").await;
}

#[tokio::test]
async fn what_was_written_within_the_2_s_is_delivered_however_late_it_is_taken() {
    let hub = hub();
    let written = seq(250_000);
    assert!(written.len() > RING_MAX + 300_000 && written.len() < 2 * RING_MAX);
    let child = spawn(&hub, &process(), Policy::Block, "sleep 1000 & echo $! >&2; seq 1 250000");
    let (mut stderr, _) = Host::open(&hub, STDERR, 1, 0).await;
    let pid = stderr.expect(Kind::Data).await.body;
    assert!(exit(child).await.success());
    hub.exited(&process());
    assert!(stderr.expect(Kind::Eof).await.header.flags.contains(Flags::TRUNCATED));
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    let (taken, eof) = host.drain(0).await;
    assert!(taken == written);
    assert_eq!(eof, Header::new(Kind::Eof, written.len() as u64).with_flags(Flags::TRUNCATED));
    let pid = String::from_utf8(pid.to_vec()).unwrap();
    assert!(Command::new("kill").arg(pid.trim()).status().unwrap().success());
}

#[tokio::test]
async fn a_survivor_that_never_stops_writing_is_discarded_without_holding_memory() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "while :; do echo y; done & echo $! >&2");
    let (mut stderr, _) = Host::open(&hub, STDERR, 1, 0).await;
    let pid = stderr.expect(Kind::Data).await.body;
    stderr.ack(pid.len() as u64).await;
    assert!(exit(child).await.success());
    hub.exited(&process());
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    let (taken, eof) = host.drain(0).await;
    assert_eq!(eof.flags, Flags::TRUNCATED);
    assert_eq!(eof.offset, taken.len() as u64);
    assert!(taken == b"y\n".repeat(taken.len() / 2));
    until(|| hub.totals().ring_bytes == 0).await;
    let pid = String::from_utf8(pid.to_vec()).unwrap();
    assert!(Command::new("kill").arg(pid.trim()).status().unwrap().success(), "it was alive");
}

#[tokio::test]
async fn time_in_which_a_survivor_waits_for_the_reader_is_none_of_its_2_s() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "seq 1 1000000 &");
    assert!(exit(child).await.success());
    hub.exited(&process());
    until(|| info(&hub, "stdout").end_offset == RING_MAX as u64).await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    let (taken, eof) = host.drain(0).await;
    assert_eq!((taken.len(), eof.flags), (seq(1_000_000).len(), Flags::NONE));
    assert!(taken == seq(1_000_000));
}

#[tokio::test]
async fn output_left_in_a_pipe_without_writers_is_never_truncated() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "seq 1 250000");
    assert!(exit(child).await.success());
    hub.exited(&process());
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    let (taken, eof) = host.drain(0).await;
    assert!(taken == seq(250_000));
    assert_eq!(eof.flags, Flags::NONE);
}

#[tokio::test]
async fn stop_is_answered_with_the_exact_offset_and_last_closes() {
    let hub = hub();
    let _child = spawn(&hub, &process(), Policy::Block, "seq 1 1000000");
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    host.expect(Kind::Data).await;
    host.send_header(Header::new(Kind::Stop, 0)).await;
    let mut sent = 0;
    let stopped = loop {
        let frame = host.receive().await.unwrap();
        match frame.header.kind {
            Kind::Data => sent = frame.header.end(),
            Kind::Stopped => break frame.header.offset,
            kind => panic!("{kind:?}"),
        }
    };
    assert!(stopped >= sent);
    host.send_header(Header::new(Kind::Ack, 100).with_flags(Flags::LAST)).await;
    assert_eq!(host.receive().await, None);

    let (mut host, start) = Host::open(&hub, STDOUT, 2, 100).await;
    assert_eq!(start, 100);
    assert!(host.drain(100).await.0 == seq(1_000_000)[100..]);
}

#[tokio::test]
async fn a_connection_that_is_replaced_in_mid_frame_gets_the_frame_and_then_preempted() {
    let hub = hub();
    let written = seq(1_000_000);
    let _child = spawn(&hub, &process(), Policy::Block, "seq 1 1000000");
    until(|| info(&hub, "stdout").end_offset == RING_MAX as u64).await;
    let mut old = Host::dial(&hub, 100);
    old.send_open(&open_message(STDOUT, 1), 0).await;
    old.expect(Kind::Opened).await;
    let (mut new, _) = Host::open(&hub, STDOUT, 2, 0).await;
    assert!(new.drain(0).await.0 == written);
    let frame = old.expect(Kind::Data).await;
    assert!(frame.body == written[..frame.body.len()]);
    old.expect_refusal(ErrorCode::PREEMPTED).await;
    assert_eq!(info(&hub, "stdout").connections, 2);
}

#[tokio::test]
async fn a_connection_that_takes_nothing_stalls_no_other_stream() {
    let hub = hub();
    let _child = spawn(&hub, &process(), Policy::Block, "seq 1 300000; seq 1 300000 >&2");
    let mut stuck = Host::dial(&hub, 10);
    stuck.send_open(&open_message(STDERR, 1), 0).await;
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    until(|| info(&hub, "stdout").end_offset > 0).await;
    let mut drained = pin!(host.drain(0));
    tokio::select! {
        (taken, _) = &mut drained => assert!(taken == seq(300_000)),
        () = until(|| info(&hub, "stderr").end_offset == RING_MAX as u64) => {
            // Both at once: the writer stays stuck on stderr, stdout is complete.
            let other = Host::open(&hub, STDERR, 2, 0).await.0.drain(0).await.0;
            assert!(other == seq(300_000));
            assert!(drained.await.0 == seq(300_000));
        }
    }
}

#[tokio::test]
async fn all_rings_together_stay_within_the_budget_and_give_everything_back() {
    const PROCESSES: usize = 20;
    const BUDGET: usize = 1 << 20;
    const FLOOR: usize = 64 * 1024;
    let hub = Hub::new(Limits { ring_budget: BUDGET, processes: PROCESSES }, TIMELINE);
    let ids: Vec<_> = (0..PROCESSES)
        .map(|n| ProcessId {
            container: "c".into(),
            exec: if n == 0 { String::new() } else { n.to_string() },
        })
        .collect();
    let children: Vec<_> = ids.iter().map(|id| spawn(&hub, id, Policy::Block, "seq 1 1000000")).collect();
    let full = || hub.streams().iter().filter(|info| info.end_offset >= FLOOR as u64).count() == PROCESSES;
    until(|| full() && hub.totals().ring_bytes == BUDGET + PROCESSES * FLOOR).await;

    // One that is drained goes on at its floor at least, with the budget in others' hands.
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert!(host.drain(0).await.0 == seq(1_000_000));
    until(|| hub.totals().ring_bytes == BUDGET + (PROCESSES - 1) * FLOOR).await;

    for id in &ids {
        hub.close(id);
    }
    assert_eq!(hub.totals().ring_bytes, 0);
    for child in children {
        assert!(exit(child).await.success());
    }
}

#[tokio::test]
async fn quiet_streams_cost_no_ring_memory() {
    let hub = hub();
    let child = spawn(&hub, &process(), Policy::Block, "read wait; exit 3");
    let (_host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(hub.totals().ring_bytes, 0);
    hub.close(&process());
    assert_eq!(exit(child).await.code(), Some(3), "the end of its input lets it go on");
}
