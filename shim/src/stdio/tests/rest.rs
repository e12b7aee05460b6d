//! Streams that come to rest, and flow again.

use super::*;
use crate::stdio::fake_agent::Fault;

/// Time in which a stream comes to rest with a guest that does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns when the guest has seen it, too: it may find the end of an attempt to connect a little later.
async fn rest(flows: &Flows, agent: &FakeAgent) {
    tokio::time::timeout(PATIENCE, flows.rest()).await.expect("the streams do not come to rest");
    soon(agent.until(|agent| agent.connections() == 0)).await;
}

fn finished(agent: &FakeAgent) {
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
}

#[tokio::test]
async fn a_stream_at_rest_has_no_connection_and_has_acknowledged_what_its_log_has() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, place.logged(), &agent).await;
    let mut written = 0;
    for round in 0..40 {
        agent.write(Stream::STDOUT, &pattern(written, 50_000 + round));
        written += 50_000 + round;
        rest(&flows, &agent).await;
        assert_eq!(agent.acked(Stream::STDOUT), place.log("stdout").len() as u64);
        let (opens, logged) = (agent.opens().len(), place.log("stdout").len());
        agent.write(Stream::STDOUT, &pattern(written, 1));
        written += 1;
        tokio::task::yield_now().await;
        assert_eq!((agent.opens().len(), place.log("stdout").len()), (opens, logged));
        flows.flow(TIMELINE);
    }
    finished(&agent);
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_same(&place.log("stdout"), &pattern(0, written));
}

#[tokio::test]
async fn rest_in_full_flow_costs_and_doubles_no_byte() {
    let place = Place::new();
    // Cuts, too, so that it also comes while there is no connection.
    let cuts = (0..20).map(|n| Fault::CutAfterSending(n * 9973));
    let agent = FakeAgent::with_faults(3000, cuts);
    let mut config = place.logged();
    (config.stdout, config.stdin) = (place.fifo("out"), place.fifo("in"));
    let mut reader = open_reader(&config.stdout);
    let mut stdin = File::options().read(true).write(true).open(&config.stdin).unwrap();
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, config, &agent).await;
    let (all, input) = (pattern(0, 4_000_000), pattern(99, 40_000));
    let flows = async {
        for round in 0..40 {
            agent.write(Stream::STDOUT, &all[round * 100_000..][..100_000]);
            stdin.write_all(&input[round * 1000..][..1000]).unwrap();
            // From none of it to all of it may be under way.
            for _ in 0..round % 7 * 5 {
                tokio::task::yield_now().await;
            }
            rest(&flows, &agent).await;
            flows.flow(TIMELINE);
        }
        agent.until(|agent| agent.stdin().bytes.len() == input.len()).await;
        finished(&agent);
    };
    let (read, ()) = soon(async { tokio::join!(read_to_end(&mut reader), flows) }).await;
    assert_same(&read, &all);
    assert_same(&agent.stdin().bytes, &input);
    let status = output(&io, "stdout");
    assert_eq!((status.received, status.refused, status.lost), (4_000_000, 0, 0));
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_same(&place.log("stdout"), &all);
}

#[tokio::test]
async fn a_reader_that_takes_nothing_does_not_keep_its_stream_from_resting() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    let config = StdioConfig { exec_id: "e".into(), stdout: place.fifo("out"), ..place.config() };
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, config, &agent).await;
    agent.write(Stream::STDOUT, &pattern(0, 2_000_000));
    let mut read = Vec::new();
    for round in 0..10 {
        // The pipe is full, and more is with the shim.
        soon(until(|| output(&io, "stdout").lag > 0)).await;
        rest(&flows, &agent).await;
        let status = output(&io, "stdout");
        assert_eq!((status.lag, agent.acked(Stream::STDOUT)), (0, status.written));
        flows.flow(TIMELINE);
        read.extend(soon(read_exactly(&mut reader, 10_000 * round + 1)).await);
    }
    finished(&agent);
    read.extend(soon(read_to_end(&mut reader)).await);
    assert_same(&read, &pattern(0, 2_000_000));
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn a_log_that_waits_for_its_reader_comes_to_rest() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    let mut config = place.logged();
    config.stdout = place.fifo("out");
    config.log.as_mut().unwrap().segment_bytes = 100_000;
    let mut reader = open_reader(&config.stdout);
    agent.write(Stream::STDOUT, &pattern(0, 2_000_000));
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, config, &agent).await;
    let log = |io: &ProcessIo| output(io, "stdout").log.unwrap();
    soon(until(|| log(&io).waits_for == Some(Obstacle::Reader))).await;
    rest(&flows, &agent).await;
    assert_eq!(agent.acked(Stream::STDOUT), log(&io).usage.end());
    // What it reads meanwhile comes from the log.
    let mut read = soon(read_exactly(&mut reader, 300_000)).await;
    flows.flow(TIMELINE);
    finished(&agent);
    read.extend(soon(read_to_end(&mut reader)).await);
    assert_same(&read, &pattern(0, 2_000_000));
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn what_the_guest_dropped_is_counted_once_whatever_rests() {
    let place = Place::new();
    let agent = FakeAgent::new(100);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, place.logged(), &agent).await;
    for _ in 0..20 {
        agent.write(Stream::STDOUT, &pattern(0, 500));
        agent.lose(Stream::STDOUT, 300);
        rest(&flows, &agent).await;
        flows.flow(TIMELINE);
    }
    finished(&agent);
    soon(agent.until(|agent| agent.is_released(Stream::STDOUT))).await;
    let status = output(&io, "stdout");
    assert_eq!((status.received, status.lost, status.dropped), (10_000, 6_000, 6_000));
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_same(&place.log("stdout"), &pattern(0, 500).repeat(20));
}

#[tokio::test]
async fn a_stream_that_has_ended_is_not_waited_for() {
    let place = Place::new();
    let agent = FakeAgent::new(100);
    finished(&agent);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, place.logged(), &agent).await;
    soon(until(|| output(&io, "stdout").complete && output(&io, "stderr").complete)).await;
    rest(&flows, &agent).await;
    flows.flow(TIMELINE);
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test(start_paused = true)]
async fn a_process_that_has_exited_before_does_not_lose_its_output_to_a_long_rest() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let config = StdioConfig { exec_id: "e".into(), stdout: place.fifo("out"), ..place.config() };
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, config, &agent).await;
    io.process_exited();
    rest(&flows, &agent).await;
    agent.write(Stream::STDOUT, b"late");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    flows.flow(TIMELINE);
    finished(&agent);
    assert_eq!(soon(read_to_end(&mut reader)).await, b"late");
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_answer_stop_is_left_alone_after_a_while() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    agent.ignore_stop(true);
    agent.write(Stream::STDOUT, &pattern(0, 5000));
    let config = StdioConfig { exec_id: "e".into(), stdout: place.fifo("out"), ..place.config() };
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, config, &agent).await;
    let mut read = soon(read_exactly(&mut reader, 1000)).await;
    rest(&flows, &agent).await;
    agent.ignore_stop(false);
    flows.flow(TIMELINE);
    finished(&agent);
    read.extend(soon(read_to_end(&mut reader)).await);
    assert_same(&read, &pattern(0, 5000));
    assert!(soon(io.finish(LIMIT)).await.complete);
}
