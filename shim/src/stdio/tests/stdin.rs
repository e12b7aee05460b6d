//! Input.

use super::*;
use crate::stdio::fake_agent::Fault;

fn config(place: &Place) -> StdioConfig {
    StdioConfig { stdin: place.fifo("in"), ..place.config() }
}

fn open_writer(path: &str) -> File {
    File::options().write(true).open(path).unwrap()
}

/// Writes on a thread, for a FIFO is smaller than what is written.
fn writing(path: &str, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    let mut writer = open_writer(path);
    std::thread::spawn(move || writer.write_all(&bytes).unwrap())
}

#[tokio::test]
async fn input_is_exact_across_connections_that_end_at_any_byte() {
    let place = Place::new();
    let cuts = (0..90).map(|n| match n % 3 {
        0 => Fault::CutAfterReceiving(40 + n * 997 % 40_000),
        1 => Fault::CutAfterSending(n * 7 % 60),
        _ => Fault::CutAfterReceiving(n),
    });
    let agent = FakeAgent::with_faults(1000, cuts);
    let config = config(&place);
    let path = config.stdin.clone();
    let io = started(config, &agent).await;
    assert_eq!(io.wanted(), Wanted { stdin: true, stdout: false, stderr: false });
    let writer = writing(&path, pattern(0, 1_000_000));
    soon(agent.until(|a| a.stdin().bytes.len() == 1_000_000)).await;
    writer.join().unwrap();
    io.close_stdin();
    soon(agent.until(|a| a.stdin().eof)).await;
    assert_same(&agent.stdin().bytes, &pattern(0, 1_000_000));
    soon(until(|| output(&io, "stdin").acknowledged == 1_000_000)).await;
    assert_eq!(output(&io, "stdin").refused, 0);
}

#[tokio::test]
async fn a_client_that_closes_and_reopens_does_not_end_it_and_close_io_does() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let config = config(&place);
    let path = config.stdin.clone();
    let io = started(config, &agent).await;
    for word in [b"one ", b"two "] {
        let before = agent.stdin().bytes.len();
        writing(&path, word.to_vec()).join().unwrap();
        soon(agent.until(|a| a.stdin().bytes.len() == before + word.len())).await;
    }
    assert!(!agent.stdin().eof);
    io.close_stdin();
    io.close_stdin();
    soon(agent.until(|a| a.stdin().eof)).await;
    assert_eq!(agent.stdin().bytes, b"one two ");
}

#[tokio::test]
async fn close_io_before_the_last_bytes_were_read_loses_none() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(1000, [Fault::NoDial, Fault::NoDial]);
    let config = config(&place);
    let path = config.stdin.clone();
    let mut io = ProcessIo::prepare(config).await.unwrap();
    writing(&path, pattern(0, 60_000)).join().unwrap();
    io.close_stdin();
    io.start(Arc::new(agent.clone()), &Flows::on(TIMELINE));
    soon(agent.until(|a| a.stdin().eof)).await;
    assert_same(&agent.stdin().bytes, &pattern(0, 60_000));
}

#[tokio::test]
async fn no_more_than_the_window_is_in_flight() {
    let place = Place::new();
    let agent = FakeAgent::with_faults(1000, std::iter::repeat_n(Fault::Silence, 1000));
    let config = config(&place);
    let path = config.stdin.clone();
    let io = started(config, &agent).await;
    let mut writer = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    let mut taken = 0;
    while let Ok(n) = writer.write(&[0; 4096]) {
        taken += n;
        tokio::task::yield_now().await;
    }
    assert!(taken <= (64 << 10) * 2, "window and pipe hold less than {taken}");
    assert!(output(&io, "stdin").received <= 64 << 10);
}

#[tokio::test]
async fn close_io_of_a_terminal_does_nothing() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let config = StdioConfig { terminal: true, ..config(&place) };
    let path = config.stdin.clone();
    let io = started(config, &agent).await;
    io.close_stdin();
    writing(&path, b"exit\n".to_vec()).join().unwrap();
    soon(agent.until(|a| a.stdin().bytes == b"exit\n")).await;
    assert!(!agent.stdin().eof);
}

#[tokio::test]
async fn a_plain_file_and_dev_null_are_read_to_their_end() {
    let place = Place::new();
    let file = place.path("file");
    std::fs::write(&file, pattern(0, 200_000)).unwrap();
    for (path, len) in [(file.to_str().unwrap(), 200_000), ("/dev/null", 0)] {
        let agent = FakeAgent::new(1000);
        let _io = started(StdioConfig { stdin: path.into(), ..place.config() }, &agent).await;
        soon(agent.until(|a| a.stdin().eof)).await;
        assert_same(&agent.stdin().bytes, &pattern(0, len));
    }
}

#[tokio::test]
async fn the_client_sees_that_the_process_has_gone() {
    let place = Place::new();
    let agent = FakeAgent::new(1000);
    let config = config(&place);
    let mut io = ProcessIo::prepare(config.clone()).await.unwrap();
    let mut writer = open_writer(&config.stdin);
    io.start(Arc::new(agent.clone()), &Flows::on(TIMELINE));
    writer.write_all(b"x").unwrap();
    soon(agent.until(|a| a.stdin().bytes == b"x")).await;
    io.process_exited();
    soon(until(|| writer.write(b"y").is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe))).await;
}

#[tokio::test]
async fn a_stdin_that_does_not_exist_is_an_error_with_its_path() {
    let place = Place::new();
    let config = StdioConfig { stdin: "/nonexistent/in".into(), ..place.config() };
    let error = ProcessIo::prepare(config).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/in"), "{error}");
}
