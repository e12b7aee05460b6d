//! Streams with a log.

use super::*;
use crate::stdio::fake_agent::Fault;

#[tokio::test]
async fn both_streams_are_in_their_log_and_the_guest_may_forget_them() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    agent.write(Stream::STDOUT, &pattern(0, 100_000));
    agent.write(Stream::STDERR, &pattern(7, 5_000));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::TRUNCATED);
    let io = started(place.logged(), &agent).await;
    assert_eq!(io.wanted(), Wanted { stdin: false, stdout: true, stderr: true });
    soon(agent.until(|a| a.is_released(Stream::STDOUT) && a.is_released(Stream::STDERR))).await;
    assert!(output(&io, "stderr").truncated && !output(&io, "stdout").truncated);
    assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
    assert_same(&place.log("stdout"), &pattern(0, 100_000));
    assert_same(&place.log("stderr"), &pattern(7, 5_000));
}

#[tokio::test]
async fn a_stream_without_a_byte_ends_like_any_other() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    let io = started(place.logged(), &agent).await;
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_eq!(place.log("stdout"), b"");
}

#[tokio::test]
async fn log_files_exist_before_the_process_starts() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    let _io = ProcessIo::prepare(place.logged()).await.unwrap();
    for name in ["stdout", "stdout.idx", "stderr", "stderr.idx"] {
        let metadata = std::fs::metadata(place.path("log/ns/id").join(name)).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o600, "{name}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn connections_that_end_at_any_byte_cost_and_double_none() {
    let place = Place::new();
    // 97 and 16 are coprime: cuts in every place of header and body, also before OPENED has come.
    let cuts = (0..200).map(|n| Fault::CutAfterSending(n * 97 % 4001));
    let agent = FakeAgent::with_faults(700, cuts);
    agent.write(Stream::STDOUT, &pattern(0, 300_000));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    let mut config = place.logged();
    config.stdout = place.fifo("out");
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    assert_same(&soon(read_to_end(&mut reader)).await, &pattern(0, 300_000));
    let status = output(&io, "stdout");
    assert_eq!((status.received, status.refused, status.lost), (300_000, 0, 0));
    assert!(status.reconnects > 50, "{status:?}");
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_same(&place.log("stdout"), &pattern(0, 300_000));
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_dialled_again() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(700, [Fault::Silence, Fault::NoDial, Fault::NoDial, Fault::Silence]);
    agent.write(Stream::STDOUT, b"late");
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    let io = started(place.logged(), &agent).await;
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_eq!(place.log("stdout"), b"late");
}

#[tokio::test]
async fn what_the_guest_dropped_is_counted_and_in_the_index() {
    let place = Place::new();
    let agent = FakeAgent::new(100);
    agent.write(Stream::STDOUT, &pattern(0, 1000));
    agent.lose(Stream::STDOUT, 500);
    agent.write(Stream::STDOUT, &pattern(1500, 1000));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    let io = started(place.logged(), &agent).await;
    soon(agent.until(|a| a.is_released(Stream::STDOUT))).await;
    let status = output(&io, "stdout");
    assert_eq!((status.received, status.lost, status.acknowledged), (2000, 500, 2500));
    assert_eq!((status.dropped, status.discarded, status.lag), (500, 0, 0));
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_same(&place.log("stdout"), &[pattern(0, 1000), pattern(1500, 1000)].concat());
    let recovered = ProcessIo::recover(place.logged(), TIMELINE).await.unwrap();
    assert_eq!(output(&recovered, "stdout").acknowledged, 2500);
}

#[tokio::test]
async fn a_jump_at_the_beginning_of_a_connection_is_a_loss_of_drop_mode() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(100, [Fault::OpenedAt(123), Fault::OpenedAt(123)]);
    let io = started(place.logged(), &agent).await;
    soon(until(|| output(&io, "stdout").acknowledged == 123)).await;
    assert_eq!(output(&io, "stdout").lost, 123);
}

#[tokio::test]
async fn a_successor_goes_on_exactly_where_the_shim_died() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    agent.write(Stream::STDOUT, &pattern(0, 50_000));
    let io = started(place.logged(), &agent).await;
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 50_000)).await;
    drop(io);
    // Its threads end a little later.
    soon(agent.until(|a| a.connections() == 0)).await;
    agent.write(Stream::STDOUT, &pattern(50_000, 50_000));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);

    let mut io = ProcessIo::recover(place.logged(), TIMELINE).await.unwrap();
    io.start(Arc::new(agent.clone()), &Flows::on(TIMELINE));
    assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
    assert_same(&place.log("stdout"), &pattern(0, 100_000));
    let opens = agent.opens();
    let (offset, open) = opens.iter().rfind(|(_, o)| o.stream == Stream::STDOUT.into()).unwrap();
    assert_eq!((*offset, open.epoch), (50_000, crate::stdio::fake_agent::EPOCH));
}

#[tokio::test]
async fn a_new_container_of_the_same_name_begins_a_new_log() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    agent.write(Stream::STDOUT, b"first");
    let io = started(place.logged(), &agent).await;
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 5)).await;
    drop(io);
    let _io = ProcessIo::prepare(place.logged()).await.unwrap();
    assert_eq!(place.log("stdout"), b"");
    let kept = std::fs::read_dir(place.path("log/ns"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("id."));
    assert_eq!(std::fs::read(kept.unwrap().join("stdout")).unwrap(), b"first");
}

#[tokio::test]
async fn delete_does_not_wait_longer_than_its_limit_for_a_guest_that_hangs() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    agent.write(Stream::STDOUT, b"no end");
    let io = started(place.logged(), &agent).await;
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 6)).await;
    let begun = Instant::now();
    let report = soon(io.finish(Duration::from_millis(300))).await;
    assert_eq!(report, FinishReport { complete: false, discarded_bytes: 0 });
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(place.log("stdout"), b"no end");
}

/// A log of which the first rotation fails until the path is removed.
fn obstructed(place: &Place) -> (StdioConfig, PathBuf) {
    let mut config = place.logged();
    config.log = config.log.map(|log| LogConfig { segment_bytes: 64 << 10, segments: 10, ..log });
    // rename(2) does not put a file in the place of a directory.
    (config, place.path("log/ns/id/stdout.1.idx"))
}

#[tokio::test]
async fn a_log_that_cannot_be_written_stops_the_acknowledgements_until_it_can() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    let (config, obstacle) = obstructed(&place);
    let mut io = ProcessIo::prepare(config).await.unwrap();
    std::fs::create_dir(&obstacle).unwrap();
    io.start(Arc::new(agent.clone()), &Flows::on(TIMELINE));
    agent.write(Stream::STDERR, &pattern(0, 100_000));
    agent.write(Stream::STDOUT, &pattern(0, 200_000));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    soon(agent.until(|a| a.is_released(Stream::STDERR))).await;
    assert!(agent.acked(Stream::STDOUT) < 64 << 10, "only what is in the log is acknowledged");
    std::fs::remove_dir(&obstacle).unwrap();
    soon(agent.until(|a| a.is_released(Stream::STDOUT))).await;
    assert!(soon(io.finish(LIMIT)).await.complete);
    let names = ["stdout.1", "stdout.2", "stdout.3", "stdout"];
    let all: Vec<u8> = names.iter().flat_map(|name| place.log(name)).collect();
    assert_same(&all, &pattern(0, 200_000));
}

#[tokio::test]
async fn delete_does_not_wait_longer_than_its_limit_for_a_log_that_cannot_be_written() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    let (config, obstacle) = obstructed(&place);
    let mut io = ProcessIo::prepare(config).await.unwrap();
    std::fs::create_dir(obstacle).unwrap();
    io.start(Arc::new(agent.clone()), &Flows::on(TIMELINE));
    agent.write(Stream::STDOUT, &pattern(0, 200_000));
    soon(until(|| output(&io, "stdout").received > 64 << 10)).await;
    let begun = Instant::now();
    let report = soon(io.finish(Duration::from_millis(300))).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(!report.complete && report.discarded_bytes > 0, "{report:?}");
    let log = place.log("stdout");
    assert_same(&log, &pattern(0, log.len()));
}

#[tokio::test]
async fn a_log_directory_that_is_removed_comes_back_and_a_reader_misses_nothing() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    let mut config = place.logged();
    config.stdout = place.fifo("out");
    let mut reader = open_reader(&config.stdout);
    let io = started(config, &agent).await;
    agent.write(Stream::STDOUT, &pattern(0, 30_000));
    agent.write(Stream::STDERR, &pattern(0, 1000));
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 30_000 && a.acked(Stream::STDERR) == 1000)).await;
    std::fs::remove_dir_all(place.path("log")).unwrap();
    // A pause to disk does not ask for what nobody has any more.
    Flows::on(TIMELINE).sync_logs(LIMIT).await.unwrap();
    agent.write(Stream::STDOUT, &pattern(30_000, 30_000));
    agent.write(Stream::STDERR, &pattern(1000, 1000));
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    assert_same(&soon(read_to_end(&mut reader)).await, &pattern(0, 60_000));
    assert_same(&place.log("stdout"), &pattern(30_000, 30_000));
    let log = output(&io, "stdout").log.unwrap();
    assert_eq!((log.usage.lost, log.waits_for), (30_000, None));
    assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
    assert_same(&place.log("stderr"), &pattern(1000, 1000));
}

#[tokio::test]
async fn a_process_waits_for_a_log_without_a_place_and_not_for_ever() {
    let place = Place::new();
    let agent = FakeAgent::new(700);
    let io = started(place.logged(), &agent).await;
    agent.write(Stream::STDOUT, &pattern(0, 100));
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 100)).await;
    let (dir, victim) = (place.path("log/ns/id"), place.path("victim"));
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::create_dir(&victim).unwrap();
    std::os::unix::fs::symlink(&victim, &dir).unwrap();
    agent.write(Stream::STDOUT, &pattern(100, 900_000));
    soon(until(|| output(&io, "stdout").log.unwrap().waits_for == Some(Obstacle::Directory))).await;
    assert_eq!(agent.acked(Stream::STDOUT), 100);
    soon(agent.until(|a| a.acked(Stream::STDOUT) == 900_100)).await;
    assert_eq!(output(&io, "stdout").log.unwrap().waits_for, Some(Obstacle::Directory));
    std::fs::remove_file(&dir).unwrap();
    let mut written = 900_100;
    while !dir.join("stdout").exists() {
        agent.write(Stream::STDOUT, &pattern(written, 1));
        written += 1;
        soon(agent.until(|a| a.acked(Stream::STDOUT) == written as u64)).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_same(&place.log("stdout"), &pattern(written - 1, 1));
    let log = output(&io, "stdout").log.unwrap();
    assert_eq!((log.usage.lost, log.waits_for), (written as u64 - 1, None));
    assert_eq!(std::fs::read_dir(victim).unwrap().count(), 0);
}
