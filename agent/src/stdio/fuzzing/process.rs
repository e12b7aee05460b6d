//! The process whose streams they are, played by the fuzz target.

use std::{
    fs::File,
    io::{self, Read, Write},
    sync::Arc,
};

use cube_protocol::stream::Stream;

use super::byte_at;
use crate::stdio::{ChildStdio, Hub, Policy, ProcessId, Request, pipe};

pub(super) const STREAMS: [Stream; 3] = [Stream::STDIN, Stream::STDOUT, Stream::STDERR];

pub(super) fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::STDIN => "stdin",
        Stream::STDOUT => "stdout",
        _ => "stderr",
    }
}

pub(super) fn id() -> ProcessId {
    ProcessId { container: "c".into(), exec: String::new() }
}

/// Holds the child's ends; none of its calls waits.
pub(super) struct Process {
    pub(super) policy: Policy,
    /// In the order of [`STREAMS`]; `None` once closed.
    ends: [Option<File>; 3],
    /// Bytes read from stdin, or written.
    moved: [u64; 3],
}

impl Process {
    pub(super) fn spawn(hub: &Arc<Hub>, policy: Policy) -> Process {
        let request = Request { terminal: false, stdin: true, stdout: true, stderr: true, policy };
        let ChildStdio::Pipes(ends) = hub.open(&id(), request).unwrap() else {
            unreachable!("a process without terminal gets pipes");
        };
        ends.iter().for_each(|end| pipe::set_nonblocking(end).unwrap());
        Process { policy, ends: ends.map(|end| Some(end.into())), moved: [0; 3] }
    }

    /// Bytes written to `stream` so far.
    pub(super) fn written(&self, stream: Stream) -> u64 {
        self.moved[index(stream)]
    }

    /// Writes `len` bytes, or as many as the pipe takes.
    pub(super) fn write(&mut self, stream: Stream, len: u64) {
        let n = index(stream);
        let Some(pipe) = &mut self.ends[n] else { return };
        let from = self.moved[n];
        let bytes: Vec<u8> = (from..from + len).map(byte_at).collect();
        let mut left = &bytes[..];
        while !left.is_empty() {
            match pipe.write(left) {
                Ok(written) => left = &left[written..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => panic!("the agent has closed {stream:?}: {e}"),
            }
        }
        self.moved[n] += (bytes.len() - left.len()) as u64;
    }

    /// Reads what its stdin holds, and looks whether it is what was sent unless that is `garbage`.
    pub(super) fn read_stdin(&mut self, garbage: bool) {
        let Some(pipe) = &mut self.ends[0] else { return };
        let mut bytes = vec![0; 64 << 10];
        loop {
            match pipe.read(&mut bytes) {
                Ok(0) => return,
                Ok(read) => {
                    let expected = (self.moved[0]..).map(byte_at);
                    assert!(garbage || bytes[..read].iter().copied().eq(expected.take(read)));
                    self.moved[0] += read as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => panic!("{e}"),
            }
        }
    }

    pub(super) fn close(&mut self, stream: Stream) {
        self.ends[index(stream)] = None;
    }
}

fn index(stream: Stream) -> usize {
    STREAMS.iter().position(|known| *known == stream).unwrap()
}
