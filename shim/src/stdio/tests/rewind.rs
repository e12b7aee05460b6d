//! Streams of a sandbox that is put back to a snapshot.

use super::*;
use crate::stdio::fake_agent::{Fault, Snapshot};

/// The first timeline after `TIMELINE`.
const NEXT: u64 = TIMELINE + 1;

async fn rest(flows: &Flows, agent: &FakeAgent) {
    soon(flows.rest()).await;
    soon(agent.until(|agent| agent.connections() == 0)).await;
}

/// A snapshot of a sandbox that runs on.
async fn snapshot(flows: &Flows, agent: &FakeAgent) -> Snapshot {
    let timeline = flows.timeline().unwrap();
    rest(flows, agent).await;
    let snapshot = agent.snapshot();
    flows.flow(timeline);
    snapshot
}

/// As the sandbox does it.
async fn roll_back(flows: &Flows, agent: &FakeAgent, io: &mut ProcessIo, to: &Snapshot, timeline: u64) {
    rest(flows, agent).await;
    let begin = agent.roll_back(to, timeline);
    soon(io.rewind(begin, timeline)).await.unwrap();
    flows.flow(timeline);
}

fn end(agent: &FakeAgent) {
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
}

async fn acked(agent: &FakeAgent, offset: usize) {
    soon(agent.until(|agent| agent.acked(Stream::STDOUT) == offset as u64)).await;
}

/// The log, oldest segment first.
fn whole_log(place: &Place, name: &str) -> Vec<u8> {
    let closed = (1..100).map(|number| place.path(&format!("log/ns/id/{name}.{number}")));
    let mut all: Vec<u8> = closed.filter_map(|path| std::fs::read(path).ok()).flatten().collect();
    all.extend(place.log(name));
    all
}

#[tokio::test]
async fn log_and_reader_get_the_old_timeline_and_then_the_new_one_from_the_snapshot_on() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let mut config = place.logged();
    config.stdout = place.fifo("out");
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, config, &agent).await;
    agent.write(Stream::STDOUT, &pattern(0, 30_000));
    acked(&agent, 30_000).await;
    let kept = snapshot(&flows, &agent).await;
    let mut expected = pattern(0, 30_000);
    for (round, timeline) in (NEXT..NEXT + 3).enumerate() {
        let old = pattern(1000 + round, 20_000 + round);
        agent.write(Stream::STDOUT, &old);
        acked(&agent, 30_000 + old.len()).await;
        expected.extend(old);
        roll_back(&flows, &agent, &mut io, &kept, timeline).await;
        assert_eq!(output(&io, "stdout").acknowledged, 30_000);
    }
    agent.write(Stream::STDOUT, b"the last timeline");
    expected.extend(b"the last timeline");
    end(&agent);
    assert_same(&soon(read_to_end(&mut reader)).await, &expected);
    let status = output(&io, "stdout");
    assert_eq!((status.lost, status.received, status.refused), (0, expected.len() as u64, 0));
    assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
    assert_same(&whole_log(&place, "stdout"), &expected);
}

#[tokio::test]
async fn a_reader_of_a_terminal_gets_both_timelines() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let config = StdioConfig { terminal: true, stdout: place.fifo("out"), ..place.config() };
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, config, &agent).await;
    agent.write(Stream::TERMINAL, b"prompt> ");
    assert_eq!(soon(read_exactly(&mut reader, 8)).await, b"prompt> ");
    let kept = snapshot(&flows, &agent).await;
    agent.write(Stream::TERMINAL, b"old");
    assert_eq!(soon(read_exactly(&mut reader, 3)).await, b"old");
    roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
    agent.write(Stream::TERMINAL, b"new");
    agent.end(Stream::TERMINAL, Flags::NONE);
    assert_eq!(soon(read_to_end(&mut reader)).await, b"new");
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn what_a_stuck_reader_did_not_take_of_the_old_timeline_is_no_loss_and_the_new_one_follows() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    let config = StdioConfig { exec_id: "e".into(), stdout: place.fifo("out"), ..place.config() };
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, config, &agent).await;
    let kept = snapshot(&flows, &agent).await;
    agent.write(Stream::STDOUT, &pattern(0, 500_000));
    soon(until(|| output(&io, "stdout").lag > 0)).await;
    roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
    let taken = output(&io, "stdout").written as usize;
    assert!(taken > 0 && taken < 500_000);
    agent.write(Stream::STDOUT, &pattern(7, 500_000));
    end(&agent);
    let read = soon(read_to_end(&mut reader)).await;
    assert_same(&read[..taken], &pattern(0, taken));
    assert_same(&read[taken..], &pattern(7, 500_000));
    let status = output(&io, "stdout");
    assert_eq!((status.lost, status.discarded, status.lag), (0, 0, 0));
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn a_stream_that_has_ended_since_the_snapshot_goes_on() {
    for log in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(1000);
        let base = if log { place.logged() } else { place.config() };
        let config = StdioConfig { stdout: place.fifo("out"), ..base };
        let path = config.stdout.clone();
        let mut reader = open_reader(&path);
        let flows = Flows::on(TIMELINE);
        let mut io = started_in(&flows, config, &agent).await;
        agent.write(Stream::STDOUT, b"both ");
        acked(&agent, 5).await;
        let kept = snapshot(&flows, &agent).await;
        agent.write(Stream::STDOUT, b"old");
        end(&agent);
        assert_eq!(soon(read_to_end(&mut reader)).await, b"both old");
        soon(until(|| output(&io, "stdout").complete)).await;
        roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
        assert!(!output(&io, "stdout").complete);
        let mut reader = open_reader(&path);
        agent.write(Stream::STDOUT, b"new");
        soon(until(|| output(&io, "stdout").written == 11)).await;
        assert_eq!(soon(read_exactly(&mut reader, 3)).await, b"new");
        end(&agent);
        assert_eq!(soon(read_to_end(&mut reader)).await, b"");
        assert!(soon(io.finish(LIMIT)).await.complete);
        assert!(!log || whole_log(&place, "stdout") == b"both oldnew");
    }
}

#[tokio::test]
async fn a_stream_that_had_ended_in_the_snapshot_stays_ended() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let mut config = place.logged();
    config.stdout = place.fifo("out");
    let path = config.stdout.clone();
    let mut reader = open_reader(&path);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, config, &agent).await;
    agent.write(Stream::STDOUT, b"all");
    end(&agent);
    assert_eq!(soon(read_to_end(&mut reader)).await, b"all");
    soon(until(|| output(&io, "stdout").complete)).await;
    let kept = snapshot(&flows, &agent).await;
    roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
    soon(until(|| output(&io, "stdout").complete)).await;
    assert_eq!(output(&io, "stdout").acknowledged, 3);
    // Nobody has opened it again: a reader would wait for its end.
    let opened = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
    drop(reader);
    assert!(opened.is_ok());
    let alone = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
    assert_eq!(alone.unwrap_err().raw_os_error(), Some(libc::ENXIO));
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_eq!(whole_log(&place, "stdout"), b"all");
}

#[tokio::test]
async fn input_that_no_process_has_got_is_kept_and_what_one_has_got_is_not_repeated() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let config = StdioConfig { stdin: place.fifo("in"), ..place.config() };
    let mut stdin = File::options().read(true).write(true).open(&config.stdin).unwrap();
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, config, &agent).await;
    stdin.write_all(b"both ").unwrap();
    soon(agent.until(|agent| agent.stdin().bytes == b"both ")).await;
    let kept = snapshot(&flows, &agent).await;
    stdin.write_all(b"old ").unwrap();
    soon(agent.until(|agent| agent.stdin().bytes == b"both old ")).await;
    rest(&flows, &agent).await;
    stdin.write_all(b"kept").unwrap();
    flows.flow(TIMELINE + 100);
    // Read by the relay, and refused with its timeline.
    let begin = {
        rest(&flows, &agent).await;
        agent.roll_back(&kept, NEXT)
    };
    soon(io.rewind(begin, NEXT)).await.unwrap();
    flows.flow(NEXT);
    soon(agent.until(|agent| agent.stdin().bytes == b"both kept")).await;
    io.close_stdin();
    drop(stdin);
    soon(agent.until(|agent| agent.stdin().eof)).await;
    let status = output(&io, "stdin");
    assert_eq!((status.acknowledged, status.received, status.lag, status.lost), (9, 13, 0, 0));
}

#[tokio::test]
async fn a_stdin_that_was_closed_ends_again_and_one_that_the_process_closed_is_open_again() {
    for by_process in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(1000);
        let config = StdioConfig { stdin: place.fifo("in"), ..place.config() };
        let path = config.stdin.clone();
        let flows = Flows::on(TIMELINE);
        let mut io = started_in(&flows, config, &agent).await;
        let kept = snapshot(&flows, &agent).await;
        let mut stdin = File::options().write(true).open(&path).unwrap();
        stdin.write_all(b"old").unwrap();
        soon(agent.until(|agent| agent.stdin().bytes == b"old")).await;
        if by_process {
            agent.close_stdin();
            soon(until(|| stdin.write_all(b"x").is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe))).await;
            // What is in a FIFO goes with the last who has it open.
            drop(stdin);
        } else {
            drop(stdin);
            io.close_stdin();
            soon(agent.until(|agent| agent.stdin().eof)).await;
        }
        roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
        if by_process {
            let mut stdin = File::options().write(true).open(&path).unwrap();
            stdin.write_all(b"new").unwrap();
            soon(agent.until(|agent| agent.stdin().bytes == b"new")).await;
        } else {
            soon(agent.until(|agent| agent.stdin().eof)).await;
            assert_eq!(agent.stdin().bytes, b"");
        }
    }
}

#[tokio::test]
async fn what_the_guest_drops_is_counted_in_each_timeline_and_going_back_is_no_loss() {
    let place = Place::new();
    let agent = FakeAgent::new(100);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, place.logged(), &agent).await;
    agent.write(Stream::STDOUT, &pattern(0, 500));
    agent.lose(Stream::STDOUT, 300);
    acked(&agent, 800).await;
    let kept = snapshot(&flows, &agent).await;
    agent.lose(Stream::STDOUT, 50);
    agent.write(Stream::STDOUT, b"old");
    acked(&agent, 853).await;
    roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
    agent.lose(Stream::STDOUT, 7);
    agent.write(Stream::STDOUT, b"new");
    end(&agent);
    soon(agent.until(|agent| agent.is_released(Stream::STDOUT))).await;
    let status = output(&io, "stdout");
    assert_eq!((status.received, status.lost, status.dropped), (506, 357, 357));
    assert_eq!(status.acknowledged, 810);
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn a_stream_that_the_guest_refuses_can_be_had_again_from_a_snapshot() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, place.logged(), &agent).await;
    agent.write(Stream::STDOUT, b"both ");
    acked(&agent, 5).await;
    let kept = snapshot(&flows, &agent).await;
    // Another timeline than the guest's: it refuses every stream for good.
    rest(&flows, &agent).await;
    flows.flow(TIMELINE + 100);
    let refused = agent.opens().len() + 2;
    soon(agent.until(|agent| agent.opens().len() >= refused)).await;
    roll_back(&flows, &agent, &mut io, &kept, NEXT).await;
    agent.write(Stream::STDOUT, b"new");
    end(&agent);
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_eq!(whole_log(&place, "stdout"), b"both new");
}

#[tokio::test]
async fn a_stream_that_slept_through_it_all_goes_on_where_it_was_told() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(1000, [Fault::Silence]);
    let config = StdioConfig { exec_id: "e".into(), stdout: place.fifo("out"), ..place.config() };
    let mut reader = open_reader(&config.stdout);
    let flows = Flows::on(TIMELINE);
    let kept = agent.snapshot();
    let mut io = started_in(&flows, config, &agent).await;
    soon(agent.until(|agent| agent.opens().len() == 1)).await;
    // It waits for the answer to its OPEN for a while longer, and nobody waits for it.
    let late = tokio::time::timeout(Duration::from_millis(1), flows.rest()).await;
    assert!(late.is_err());
    let begin = agent.take_over(&kept, NEXT);
    let rewound = tokio::time::timeout(Duration::from_millis(1), io.rewind(begin, NEXT)).await;
    assert!(rewound.is_err());
    flows.flow(NEXT);
    agent.write(Stream::STDOUT, b"new");
    end(&agent);
    assert_eq!(soon(read_to_end(&mut reader)).await, b"new");
    assert!(soon(io.finish(LIMIT)).await.complete);
}

#[tokio::test]
async fn a_log_that_ends_in_another_timeline_than_the_guest_gets_nothing_more() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let flows = Flows::on(TIMELINE);
    let mut io = started_in(&flows, place.logged(), &agent).await;
    agent.write(Stream::STDOUT, b"both old");
    agent.write(Stream::STDERR, b"x");
    acked(&agent, 8).await;
    // Its log has been connected, too, and knows its timeline.
    soon(agent.until(|agent| agent.acked(Stream::STDERR) == 1)).await;
    // The guest has gone back, and the shim dies before the log has: what follows 8 is another "old".
    rest(&flows, &agent).await;
    drop(io);
    let recovered = ProcessIo::recover(place.logged(), NEXT).await.unwrap();
    assert_eq!(recovered.wanted(), Wanted { stdin: false, stdout: false, stderr: false });
    drop(recovered);
    // One that dies after the log has gone back leaves what its successor goes on with.
    io = ProcessIo::recover(place.logged(), TIMELINE).await.unwrap();
    io.start(Arc::new(agent.clone()), &flows);
    let begin = Begin { stdout: 5, stderr: 1, ..Begin::default() };
    soon(io.rewind(begin, NEXT)).await.unwrap();
    drop(io);
    soon(agent.until(|agent| agent.connections() == 0)).await;
    let mut before = agent.snapshot();
    before.acknowledge(Stream::STDOUT, 5);
    agent.roll_back(&before, NEXT);
    end(&agent);
    let mut io = ProcessIo::recover(place.logged(), NEXT).await.unwrap();
    io.start(Arc::new(agent.clone()), &Flows::on(NEXT));
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_eq!(whole_log(&place, "stdout"), b"both oldold");
}

#[tokio::test]
async fn logs_are_written_out_for_as_long_as_somebody_has_them() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let flows = Flows::on(TIMELINE);
    let io = started_in(&flows, place.logged(), &agent).await;
    agent.write(Stream::STDOUT, b"safe");
    acked(&agent, 4).await;
    rest(&flows, &agent).await;
    soon(flows.sync_logs(LIMIT)).await.unwrap();
    std::fs::create_dir(place.path("log/ns/id/stderr.9")).unwrap();
    let error = error_chain(&soon(flows.sync_logs(LIMIT)).await.unwrap_err());
    assert!(error.contains("log/ns/id/stderr.9"), "{error}");
    drop(io);
    soon(flows.sync_logs(LIMIT)).await.unwrap();
}
