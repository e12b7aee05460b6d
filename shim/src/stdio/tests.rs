//! The contract of [`ProcessIo`], against a guest that fails in every way.

mod files;
mod histories;
mod log;
mod misbehaviour;
mod readers;
mod rest;
mod rewind;
mod stdin;

use std::{
    fs::File,
    future::Future,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cube_protocol::{frame::Flags, stream::Stream};
use tempfile::TempDir;

use super::{
    fake_agent::{FakeAgent, TIMELINE},
    *,
};

const LIMIT: Duration = Duration::from_secs(30);

/// Fails the test instead of hanging it.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("took longer than any healthy machine needs")
}

/// Bytes that tell where they belong.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|n| ((n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// A place for the FIFOs and the log of one process.
struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Place {
        Place { root: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().into()
    }

    /// No stdio and no log.
    fn config(&self) -> StdioConfig {
        StdioConfig {
            namespace: "ns".into(),
            container_id: "id".into(),
            guest_container_id: "id".into(),
            exec_id: String::new(),
            terminal: false,
            stdin: String::new(),
            stdout: String::new(),
            stderr: String::new(),
            log: None,
            begin: Begin::default(),
        }
    }

    fn logged(&self) -> StdioConfig {
        let log =
            LogConfig { dir: self.path("log/ns/id"), exclusive: false, segment_bytes: 16 << 20, segments: 4 };
        StdioConfig { log: Some(log), ..self.config() }
    }

    fn log(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path("log/ns/id").join(name)).unwrap()
    }
}

async fn started(config: StdioConfig, agent: &Arc<FakeAgent>) -> ProcessIo {
    started_in(&Flows::on(TIMELINE), config, agent).await
}

async fn started_in(flows: &Flows, config: StdioConfig, agent: &Arc<FakeAgent>) -> ProcessIo {
    let mut io = ProcessIo::prepare(config).await.unwrap();
    io.start(Arc::new(agent.clone()), flows);
    io
}

/// Opens the reading end of a FIFO as containerd's client does.
fn open_reader(path: &str) -> File {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

/// What comes next from a FIFO, at most `limit` bytes; nothing at its end.
async fn read_some(reader: &mut File, limit: usize) -> Vec<u8> {
    let mut bytes = vec![0; limit];
    loop {
        match reader.read(&mut bytes) {
            Ok(n) => {
                bytes.truncate(n);
                return bytes;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(e) => panic!("{e}"),
        }
    }
}

async fn read_exactly(reader: &mut File, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let some = read_some(reader, len - all.len()).await;
        assert!(!some.is_empty(), "the FIFO ended after {} of {len} bytes", all.len());
        all.extend(some);
    }
    all
}

async fn read_to_end(reader: &mut File) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let some = read_some(reader, 1 << 16).await;
        if some.is_empty() {
            return all;
        }
        all.extend(some);
    }
}

/// Compares without printing megabytes.
fn assert_same(got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!((differs, got.len()), (None, expected.len()), "(first difference, length)");
}

fn output(io: &ProcessIo, name: &str) -> StreamStatus {
    io.status().into_iter().find(|status| status.name == name).unwrap()
}

async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
