//! The contract of the stream port, with real pipes and real processes.

mod input;
mod output;
mod protocol;
mod quiesce;
mod terminal;

use std::{
    future::Future,
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use cube_protocol::{
    frame::{Flags, Frame, Header, Kind, read_frame, write_frame},
    guest::StreamInfo,
    stream::{self, ErrorCode, Open},
};
use tokio::io::DuplexStream;

use super::{ChildStdio, Hub, Limits, Policy, ProcessId, Request};

const TIMELINE: u64 = 0x7157;

/// Far more than anything here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(LIMIT, what).await.expect("this happens within a minute")
}

/// Waits for a condition that has no event of its own, such as the state of another process.
async fn until(mut condition: impl FnMut() -> bool) {
    soon(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

fn hub() -> Arc<Hub> {
    Hub::new(Limits { ring_budget: 8 << 20, processes: 300 }, TIMELINE)
}

fn process() -> ProcessId {
    ProcessId { container: "c".into(), exec: String::new() }
}

fn request(policy: Policy) -> Request {
    Request { terminal: false, stdin: true, stdout: true, stderr: true, policy }
}

/// Runs `script` with the stdio that `hub` makes for `process`.
fn spawn(hub: &Arc<Hub>, process: &ProcessId, policy: Policy, script: &str) -> Running {
    let ChildStdio::Pipes([stdin, stdout, stderr]) = hub.open(process, request(policy)).unwrap() else {
        panic!("a process without terminal gets pipes");
    };
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(stdin).stdout(stdout).stderr(stderr);
    Running(command.spawn().unwrap())
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn exit(mut child: Running) -> ExitStatus {
    soon(tokio::task::spawn_blocking(move || child.0.wait().unwrap())).await.unwrap()
}

/// What `seq 1 n` prints.
fn seq(n: usize) -> Vec<u8> {
    (1..=n).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

fn info(hub: &Hub, stream: &str) -> StreamInfo {
    hub.streams().into_iter().find(|info| info.stream == stream).unwrap()
}

/// Not random enough for anything but test data.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

/// The host's end of one connection.
struct Host {
    connection: DuplexStream,
}

fn open_message(stream: stream::Stream, attempt: u64) -> Open {
    Open {
        container_id: "c".into(),
        stream: stream.into(),
        timeline: TIMELINE,
        attempt,
        ..Default::default()
    }
}

impl Host {
    fn dial(hub: &Arc<Hub>, capacity: usize) -> Host {
        let (near, far) = tokio::io::duplex(capacity);
        tokio::spawn(Arc::clone(hub).serve(far));
        Host { connection: near }
    }

    /// Dials and opens; the stream must be given.
    async fn open(hub: &Arc<Hub>, stream: stream::Stream, attempt: u64, offset: u64) -> (Host, u64) {
        let mut host = Host::dial(hub, 64 * 1024);
        host.send_open(&open_message(stream, attempt), offset).await;
        let opened = host.expect(Kind::Opened).await;
        assert_ne!(opened.message::<stream::Opened>().unwrap().epoch, 0);
        (host, opened.header.offset)
    }

    async fn send_open(&mut self, open: &Open, offset: u64) {
        self.send(&Frame::with_message(Kind::Open, offset, open).unwrap()).await;
    }

    async fn send(&mut self, frame: &Frame) {
        soon(write_frame(&mut self.connection, frame)).await.unwrap();
    }

    async fn send_header(&mut self, header: Header) {
        self.send(&Frame { header, body: Default::default() }).await;
    }

    async fn send_data(&mut self, offset: u64, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..Header::new(Kind::Data, offset) };
        self.send(&Frame { header, body: data.to_vec().into() }).await;
    }

    async fn ack(&mut self, offset: u64) {
        self.send_header(Header::new(Kind::Ack, offset)).await;
    }

    /// The next frame, or `None` once the agent has closed.
    async fn receive(&mut self) -> Option<Frame> {
        soon(read_frame(&mut self.connection, &mut BytesMut::new())).await.unwrap()
    }

    async fn expect(&mut self, kind: Kind) -> Frame {
        let frame = self.receive().await.expect("the agent has closed");
        assert_eq!(frame.header.kind, kind, "{:?}", frame.message::<stream::Error>());
        frame
    }

    /// The agent must refuse with ERROR, then close.
    async fn expect_refusal(mut self, code: ErrorCode) -> stream::Error {
        let error: stream::Error = loop {
            let frame = self.receive().await.expect("ERROR comes before the end");
            if frame.header.kind == Kind::Error {
                break frame.message().unwrap();
            }
        };
        assert_eq!(error.code, code.into(), "{error}");
        assert!(!error.message.is_empty());
        assert_eq!(self.receive().await, None);
        error
    }

    /// Takes and acknowledges everything from `offset` to EOF.
    async fn drain(&mut self, mut offset: u64) -> (Vec<u8>, Header) {
        let mut taken = Vec::new();
        loop {
            let frame = self.receive().await.expect("EOF comes before the end");
            match frame.header.kind {
                Kind::Data => {
                    assert_eq!(frame.header.offset, offset);
                    offset = frame.header.end();
                    taken.extend_from_slice(&frame.body);
                    self.ack(offset).await;
                }
                Kind::Eof => {
                    assert_eq!(frame.header.offset, offset);
                    return (taken, frame.header);
                }
                kind => panic!("{kind:?} {:?}", frame.message::<stream::Error>()),
            }
        }
    }
}
