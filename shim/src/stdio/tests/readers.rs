//! FIFOs and who reads them.

use super::*;

/// An exec: FIFOs without a log.
fn exec(place: &Place) -> StdioConfig {
    StdioConfig { exec_id: "e".into(), stdout: place.fifo("out"), ..place.config() }
}

fn with_fifo(place: &Place) -> StdioConfig {
    StdioConfig { stdout: place.fifo("out"), ..place.logged() }
}

fn with_fifo_and_log(place: &Place, segment_bytes: u64, segments: u32) -> StdioConfig {
    let config = with_fifo(place);
    StdioConfig { log: config.log.map(|log| LogConfig { segment_bytes, segments, ..log }), ..config }
}

fn written(agent: &FakeAgent, len: usize) {
    agent.write(Stream::STDOUT, &pattern(0, len));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
}

#[tokio::test]
async fn a_reader_gets_every_byte_and_then_the_end() {
    for log in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(5000);
        written(&agent, 1_000_000);
        let config = if log { with_fifo(&place) } else { exec(&place) };
        let mut reader = open_reader(&config.stdout);
        let io = started(config, &agent).await;
        assert_same(&soon(read_to_end(&mut reader)).await, &pattern(0, 1_000_000));
        assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
    }
}

#[tokio::test]
async fn a_fifo_that_nobody_reads_stalls_no_log() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    written(&agent, 1_000_000);
    let io = started(with_fifo(&place), &agent).await;
    soon(agent.until(|a| a.is_released(Stream::STDOUT))).await;
    assert_same(&place.log("stdout"), &pattern(0, 1_000_000));
    let begun = Instant::now();
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert!(begun.elapsed() < Duration::from_secs(2), "nobody is there to be waited for");
}

#[tokio::test]
async fn a_reader_that_comes_late_gets_everything_from_the_beginning() {
    for log in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(5000);
        written(&agent, 200_000);
        let config = if log { with_fifo(&place) } else { exec(&place) };
        let path = config.stdout.clone();
        let io = started(config, &agent).await;
        soon(until(|| output(&io, "stdout").received > 0)).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_same(&soon(read_to_end(&mut open_reader(&path))).await, &pattern(0, 200_000));
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_and_comes_back_misses_only_what_it_left_in_the_pipe() {
    for log in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(5000);
        let config = if log { with_fifo(&place) } else { exec(&place) };
        let path = config.stdout.clone();
        let mut reader = open_reader(&path);
        let io = started(config, &agent).await;
        for round in 0..20 {
            let bytes = pattern(round * 30_000, 30_000);
            agent.write(Stream::STDOUT, &bytes);
            // Whole rounds are read, so nothing is left in the pipe.
            assert_same(&soon(read_exactly(&mut reader, 30_000)).await, &bytes);
            drop(reader);
            if round % 2 == 0 {
                agent.write(Stream::STDERR, b"while nobody reads");
                tokio::task::yield_now().await;
            }
            reader = open_reader(&path);
        }
        agent.end(Stream::STDOUT, Flags::NONE);
        agent.end(Stream::STDERR, Flags::NONE);
        assert_eq!(soon(read_to_end(&mut reader)).await, b"");
        assert_eq!(output(&io, "stdout").lost, 0);
        assert!(soon(io.finish(LIMIT)).await.complete);
    }
}

#[tokio::test]
async fn bytes_that_a_reader_left_in_the_pipe_are_there_for_the_next() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    written(&agent, 300_000);
    let config = exec(&place);
    let path = config.stdout.clone();
    let mut reader = open_reader(&path);
    let _io = started(config, &agent).await;
    let mut got = Vec::new();
    while got.len() < 250_000 {
        got.extend(soon(read_some(&mut reader, 1000)).await);
        if got.len() % 7000 == 0 {
            drop(reader);
            reader = open_reader(&path);
        }
    }
    got.extend(soon(read_to_end(&mut reader)).await);
    assert_same(&got, &pattern(0, 300_000));
}

#[tokio::test]
async fn a_slow_reader_holds_back_its_own_stream_alone() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    agent.write(Stream::STDOUT, &pattern(0, 4 << 20));
    agent.write(Stream::STDERR, &pattern(0, 1 << 20));
    let mut config = exec(&place);
    config.stderr = place.fifo("err");
    let mut stuck = open_reader(&config.stdout);
    let mut quick = open_reader(&config.stderr);
    let io = started(config, &agent).await;
    assert_same(&soon(read_exactly(&mut quick, 1 << 20)).await, &pattern(0, 1 << 20));
    soon(until(|| output(&io, "stdout").acknowledged > 0 || output(&io, "stdout").received > 0)).await;
    let status = output(&io, "stdout");
    assert!(status.received < 2 << 20, "what is held in memory is bounded: {status:?}");
    assert_same(&soon(read_exactly(&mut stuck, 4 << 20)).await, &pattern(0, 4 << 20));
}

#[tokio::test]
async fn a_slow_reader_of_a_logged_stream_holds_it_back_only_when_it_is_a_whole_log_behind() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    let total = 2 << 20;
    written(&agent, total);
    let config = with_fifo_and_log(&place, 128 << 10, 3);
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    let got = soon(read_exactly(&mut reader, 10)).await;
    soon(agent.until(|a| a.acked(Stream::STDOUT) >= 200 << 10)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let held = agent.acked(Stream::STDOUT) as usize;
    assert!(held < (128 << 10) * 3 + (64 << 10) + 10, "{held} is more than log and pipe can hold");
    let rest = soon(read_to_end(&mut reader)).await;
    assert_same(&[got, rest].concat(), &pattern(0, total));
    assert_eq!(output(&io, "stdout").lost, 0);
}

#[tokio::test]
async fn a_log_that_is_smaller_than_what_comes_at_once_goes_on_as_it_is_read() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    let total = 4 << 20;
    written(&agent, total);
    let config = with_fifo_and_log(&place, 64 << 10, 2);
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    assert_same(&soon(read_to_end(&mut reader)).await, &pattern(0, total));
    assert_eq!(output(&io, "stdout").lost, 0);
}

#[tokio::test]
async fn what_is_rotated_away_while_nobody_reads_is_lost_to_the_fifo_alone_and_counted() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    let total = 2 << 20;
    agent.write(Stream::STDOUT, &pattern(0, total));
    agent.end(Stream::STDERR, Flags::NONE);
    let config = with_fifo_and_log(&place, 128 << 10, 3);
    let path = config.stdout.clone();
    let io = started(config, &agent).await;
    soon(agent.until(|a| a.acked(Stream::STDOUT) == total as u64)).await;
    let unread = output(&io, "stdout");
    let usage = unread.log.unwrap().usage;
    assert_eq!((unread.lag, unread.written, usage.end()), (total as u64, 0, total as u64));
    assert!(usage.segments == 3 && usage.bytes > 128 << 10 && usage.bytes < 3 * (128 << 10), "{usage:?}");
    let mut reader = open_reader(&path);
    soon(until(|| output(&io, "stdout").lost > 0)).await;
    agent.end(Stream::STDOUT, Flags::NONE);
    let got = soon(read_to_end(&mut reader)).await;
    let status = output(&io, "stdout");
    let lost = status.lost as usize;
    assert_eq!(got.len() + lost, total);
    assert_eq!((status.written, status.dropped, status.lag), (got.len() as u64, 0, 0));
    // What was read from the log before anybody read, then the newest of the log.
    let head = got.iter().zip(pattern(0, 64 << 10)).take_while(|(got, written)| **got == *written).count();
    let tail = got.len() - head;
    assert!(head > 0);
    assert_same(&got[head..], &pattern(total - tail, tail));
}

/// With a log and without; a terminal has the stream of the latter.
async fn exited(bytes: usize, log: bool) -> (Place, ProcessIo, String) {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    written(&agent, bytes);
    let config = if log { with_fifo(&place) } else { exec(&place) };
    let path = config.stdout.clone();
    let io = started(config, &agent).await;
    soon(until(|| output(&io, "stdout").received > 0)).await;
    io.process_exited();
    (place, io, path)
}

#[tokio::test]
async fn an_exit_waits_for_no_reader_that_has_never_been_there() {
    for log in [false, true] {
        let (_place, io, path) = exited(300_000, log).await;
        let begun = Instant::now();
        io.taken().await;
        assert!(begun.elapsed() < TAKEN_PATIENCE * 2, "nobody reads: {:?}", begun.elapsed());
        // One that comes then gets everything all the same.
        assert_same(&soon(read_to_end(&mut open_reader(&path))).await, &pattern(0, 300_000));
    }
}

#[tokio::test]
async fn an_exit_waits_for_a_reader_that_rests_for_as_long_as_it_does() {
    for log in [false, true] {
        let (_place, io, path) = exited(600_000, log).await;
        let mut reader = open_reader(&path);
        let mut got = soon(read_exactly(&mut reader, 10_000)).await;
        // Longer than whoever is not there is waited for, and a guest that is silent.
        let taken = io.taken();
        tokio::pin!(taken);
        let told = tokio::time::timeout(GUEST_PATIENCE + Duration::from_millis(500), &mut taken).await;
        assert!(told.is_err(), "told with {} bytes written", output(&io, "stdout").written);
        got.extend(soon(read_to_end(&mut reader)).await);
        assert_same(&got, &pattern(0, 600_000));
        soon(taken).await;
        assert!(soon(io.finish(LIMIT)).await.complete);
    }
}

#[tokio::test]
async fn an_exit_is_told_with_the_last_bytes_in_the_pipe() {
    for log in [false, true] {
        let (_place, io, path) = exited(50_000, log).await;
        let mut reader = open_reader(&path);
        soon(io.taken()).await;
        assert_same(&soon(read_to_end(&mut reader)).await, &pattern(0, 50_000));
    }
}

#[tokio::test]
async fn an_exit_is_told_at_once_when_its_reader_goes() {
    for log in [false, true] {
        let (_place, io, path) = exited(600_000, log).await;
        let mut reader = open_reader(&path);
        soon(read_exactly(&mut reader, 10_000)).await;
        let taken = io.taken();
        tokio::pin!(taken);
        assert!(tokio::time::timeout(TAKEN_PATIENCE * 2, &mut taken).await.is_err());
        let gone = Instant::now();
        drop(reader);
        soon(taken).await;
        assert!(gone.elapsed() < TAKEN_PATIENCE, "told {:?} later", gone.elapsed());
    }
}

#[tokio::test]
async fn whoever_wants_the_end_of_a_process_waits_2_s_for_its_reader() {
    for log in [false, true] {
        let (_place, io, path) = exited(600_000, log).await;
        let _reader = open_reader(&path);
        let taken = io.taken();
        tokio::pin!(taken);
        assert!(tokio::time::timeout(TAKEN_PATIENCE * 2, &mut taken).await.is_err());
        let begun = Instant::now();
        io.end_wanted();
        soon(taken).await;
        let told = begun.elapsed();
        assert!(told > TAKEN_LIMIT - TAKEN_PATIENCE && told < TAKEN_LIMIT * 2, "told after {told:?}");
        let report = soon(io.finish(LIMIT)).await;
        assert!(!report.complete && report.discarded_bytes > 0, "{report:?}");
    }
}

#[tokio::test]
async fn the_log_runs_ahead_of_a_reader_that_takes_nothing_only() {
    let place = Place::new();
    let agent = FakeAgent::new(60_000);
    written(&agent, 8 << 20);
    let config = with_fifo(&place);
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    let lead = |io: &ProcessIo| {
        let StreamStatus { acknowledged, written, .. } = output(io, "stdout");
        acknowledged - written
    };
    for read in 1..=16 {
        read_exactly(&mut reader, 64 << 10).await;
        assert!(lead(&io) <= 2 << 20, "{} bytes ahead after {read} reads", lead(&io));
    }
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 8 << 20)).await;
    assert_eq!(soon(read_to_end(&mut reader)).await.len(), (8 << 20) - (16 << 16));
}

#[tokio::test]
async fn the_fifo_of_a_process_whose_end_is_wanted_is_closed_though_a_reader_takes_nothing() {
    for log in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(5000);
        written(&agent, 1_000_000);
        let config = if log { with_fifo(&place) } else { exec(&place) };
        let mut reader = open_reader(&config.stdout);
        let io = started(config, &agent).await;
        soon(until(|| output(&io, "stdout").written > 0)).await;
        io.process_exited();
        io.end_wanted();
        tokio::time::sleep(phase::READER_PATIENCE + Duration::from_millis(500)).await;
        let got = soon(read_to_end(&mut reader)).await;
        assert!(got.len() < 1_000_000);
        assert_same(&got, &pattern(0, got.len()));
        let report = soon(io.finish(LIMIT)).await;
        assert!(!report.complete && report.discarded_bytes > 0, "{report:?}");
    }
}

#[tokio::test]
async fn the_fifo_of_an_exited_process_is_closed_though_the_guest_hangs() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    agent.write(Stream::STDOUT, b"last words");
    let config = with_fifo(&place);
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    io.process_exited();
    assert_eq!(soon(read_to_end(&mut reader)).await, b"last words");
}

#[tokio::test]
async fn a_reader_that_is_slow_but_steady_is_waited_for_by_delete() {
    for log in [false, true] {
        let place = Place::new();
        let agent = FakeAgent::new(5000);
        written(&agent, 1_000_000);
        let config = if log { with_fifo(&place) } else { exec(&place) };
        let mut reader = open_reader(&config.stdout);
        let io = started(config, &agent).await;
        io.process_exited();
        let reading = tokio::spawn(async move {
            let mut got = Vec::new();
            // Longer than a reader that takes nothing is waited for.
            for _ in 0..15 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                got.extend(read_exactly(&mut reader, 64 << 10).await);
            }
            got.extend(read_to_end(&mut reader).await);
            got
        });
        assert!(soon(io.finish(LIMIT)).await.complete);
        assert_same(&soon(reading).await.unwrap(), &pattern(0, 1_000_000));
    }
}

#[tokio::test]
async fn a_guest_that_says_nothing_does_not_hold_delete_up_to_its_limit() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    agent.write(Stream::STDOUT, b"last words");
    let io = started(StdioConfig { stdout: String::new(), ..with_fifo(&place) }, &agent).await;
    soon(until(|| output(&io, "stdout").acknowledged == 10)).await;
    io.process_exited();
    let begun = Instant::now();
    assert!(!soon(io.finish(LIMIT)).await.complete);
    assert!(begun.elapsed() < LIMIT / 2);
}

#[tokio::test]
async fn an_exec_that_nobody_ever_read_is_deleted_at_once() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    written(&agent, 1000);
    let io = started(exec(&place), &agent).await;
    soon(until(|| output(&io, "stdout").received == 1000)).await;
    io.process_exited();
    let begun = Instant::now();
    let report = soon(io.finish(LIMIT)).await;
    assert_eq!(report, FinishReport { complete: false, discarded_bytes: 1000 });
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_terminal_is_one_stream() {
    let place = Place::new();
    let agent = FakeAgent::new(5000);
    agent.write(Stream::TERMINAL, b"$ ");
    agent.end(Stream::TERMINAL, Flags::NONE);
    let mut config = exec(&place);
    config.terminal = true;
    config.stderr = "/nonexistent/ignored".into();
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    assert_eq!(io.wanted(), Wanted { stdin: false, stdout: true, stderr: false });
    assert_eq!(soon(read_to_end(&mut reader)).await, b"$ ");
}
