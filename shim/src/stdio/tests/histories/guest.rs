//! The real agent's streams, and the process that they belong to, played by the test.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

use cube_agent::stdio::{ChildStdio, Hub, Limits, Policy, ProcessId, Request};
use cube_protocol::{guest::StreamInfo, stream::Stream};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::byte_at;

/// Rings have their floor of 64 KiB, and no budget beyond.
const LIMITS: Limits = Limits { ring_budget: 0, processes: 1 };

/// What the pipes hold: of outputs a part of a ring, of stdin next to nothing, so that input waits in the agent.
const OUTPUT_PIPE: i32 = 16 << 10;
const STDIN_PIPE: i32 = 4 << 10;

pub(super) const OUTPUTS: [Stream; 2] = [Stream::STDOUT, Stream::STDERR];

pub(super) struct Guest {
    pub(super) hub: Arc<Hub>,
    pub(super) policy: Policy,
    stdin: File,
    /// Bytes read from stdin.
    pub(super) got: u64,
    /// What of the client's bytes the next one is, beyond `got`. Another number after each change of the client,
    /// or of what of it was read.
    pub(super) shift: u64,
    /// First byte that was not as sent.
    pub(super) got_wrong: Option<u64>,
    pub(super) got_eof: bool,
    outputs: [Option<File>; 2],
    pub(super) written: [u64; 2],
}

impl Guest {
    pub(super) fn start(timeline: u64, policy: Policy) -> Guest {
        let hub = Hub::new(LIMITS, timeline);
        let request = Request { terminal: false, stdin: true, stdout: true, stderr: true, policy };
        let child = hub.open(&id(), request).unwrap();
        Guest::with(hub, policy, child)
    }

    fn with(hub: Arc<Hub>, policy: Policy, child: ChildStdio) -> Guest {
        let ChildStdio::Pipes([stdin, stdout, stderr]) = child else {
            unreachable!("a process without terminal gets pipes");
        };
        let small = |end: OwnedFd, size| {
            fcntl(&end, FcntlArg::F_SETPIPE_SZ(size)).unwrap();
            nonblocking(end)
        };
        Guest {
            hub,
            policy,
            stdin: small(stdin, STDIN_PIPE),
            got: 0,
            shift: 0,
            got_wrong: None,
            got_eof: false,
            outputs: [stdout, stderr].map(|end| Some(small(end, OUTPUT_PIPE))),
            written: [0; 2],
        }
    }

    /// The guest that wakes up from a snapshot of this one, which is at rest.
    pub(super) fn fork(&self) -> Guest {
        let (hub, mut children) = self.hub.fork().unwrap();
        let mut fork = Guest::with(hub, self.policy, children.remove(&id()).unwrap());
        let infos = [0, 1].map(|output| fork.info(OUTPUTS[output]));
        for (output, info) in infos.iter().enumerate() {
            // What was in the pipe.
            fork.written[output] = info.end_offset;
            fork.write(output, self.written[output] - info.end_offset);
            if self.outputs[output].is_none() {
                assert_eq!(fork.written[output], self.written[output], "it fitted before");
                fork.outputs[output] = None;
            }
        }
        // What was in its stdin the process gets at once.
        fork.got = fork.info(Stream::STDIN).acked_offset;
        (fork.shift, fork.got_wrong, fork.got_eof) = (self.shift, self.got_wrong, self.got_eof);
        fork
    }

    pub(super) fn info(&self, stream: Stream) -> StreamInfo {
        let name = match stream {
            Stream::STDIN => "stdin",
            Stream::STDOUT => "stdout",
            _ => "stderr",
        };
        self.hub.streams().into_iter().find(|info| info.stream == name).unwrap()
    }

    /// Writes `len` bytes, or as many as the pipe takes.
    pub(super) fn write(&mut self, output: usize, len: u64) {
        let Some(pipe) = &mut self.outputs[output] else { return };
        let from = self.written[output];
        let bytes: Vec<u8> = (from..from + len).map(|offset| byte_at(OUTPUTS[output], offset)).collect();
        let mut left = &bytes[..];
        while !left.is_empty() {
            match pipe.write(left) {
                Ok(written) => left = &left[written..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => panic!("the agent has closed an output pipe: {e}"),
            }
        }
        self.written[output] += len - left.len() as u64;
    }

    /// Reads at most `most` bytes of stdin.
    pub(super) fn read(&mut self, most: usize) {
        let mut bytes = vec![0; most];
        match self.stdin.read(&mut bytes) {
            Ok(0) => self.got_eof = most > 0,
            Ok(read) => {
                for byte in &bytes[..read] {
                    if *byte != byte_at(Stream::STDIN, self.given()) {
                        self.got_wrong.get_or_insert(self.got);
                    }
                    self.got += 1;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => panic!("{e}"),
        }
    }

    /// Reads what was given before the guest woke up. Whether that was all: it has no stdin any more.
    pub(super) async fn is_deaf(&mut self) -> bool {
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
        // Its pipe, and the end of it.
        (0..2).for_each(|_| self.read(1 << 20));
        self.got_eof
    }

    /// Number of the client's byte that the process gets next.
    pub(super) fn given(&self) -> u64 {
        self.got.wrapping_add(self.shift)
    }

    /// The next byte that the process gets is number `given` of the client's.
    pub(super) fn goes_on_with(&mut self, given: u64) {
        self.shift = given.wrapping_sub(self.got);
    }

    /// The process has exited, and nobody else has its output.
    pub(super) fn exit(&mut self) {
        self.outputs = [None, None];
        self.hub.exited(&id());
    }
}

fn id() -> ProcessId {
    ProcessId { container: "c".into(), exec: String::new() }
}

pub(super) fn nonblocking(end: OwnedFd) -> File {
    let flags = OFlag::from_bits_retain(fcntl(&end, FcntlArg::F_GETFL).unwrap());
    fcntl(&end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    end.into()
}
