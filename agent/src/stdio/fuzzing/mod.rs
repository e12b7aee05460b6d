//! The stream server against a host that does anything, as a fuzz target runs it.
//!
//! The input is a program, so that what changes one byte of it is still one: see [`Script::step`]. Bytes
//! of the process are [`byte_at`] their offset, so that whoever gets some can tell where they belong.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a fuzz target tells by panicking")]

mod host;
mod process;

use std::{sync::Arc, time::Duration};

use cube_protocol::{
    frame::{BODY_MAX, HEADER_LEN, Kind, STDIN_WINDOW},
    guest::StreamInfo,
    stream::Stream,
};

use self::{host::Host, process::Process};
use super::{Hub, Limits, Policy};

/// Beyond its floor of 64 KiB no ring gets more than this.
const RING_BUDGET: usize = 64 << 10;

/// What the rings may hold: the budget, and a floor for stdout and stderr each.
const RINGS_MAX: usize = RING_BUDGET + 2 * (64 << 10);

/// Steps of one program, so that none takes long.
const STEPS_MAX: usize = 200;

/// More than everything that is ready to happen takes, on a clock that runs only while all wait.
const MOMENT: Duration = Duration::from_millis(1);

/// [`Flags::LAST`](cube_protocol::frame::Flags::LAST) on the wire.
const LAST: u8 = 1;

/// Longer than any time limit of the agent.
const PATIENCE: Duration = Duration::from_secs(11);

fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Runs the program `input`, then an honest host.
///
/// # Panics
///
/// If the agent sends what the protocol forbids or bytes that are not the process's, gives the process
/// bytes that nobody sent, holds more than it may, or owes the honest host a byte.
pub fn stream_server(input: &[u8]) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut script = Script(input);
        let mut world = World::new(script.byte().unwrap_or(0));
        for _ in 0..STEPS_MAX {
            let Some(()) = script.step(&mut world).await else { break };
            world.check();
        }
        world.finish().await;
    });
}

/// A guest with one process, and its hosts.
struct World {
    hub: Arc<Hub>,
    process: Process,
    hosts: Vec<Host>,
    timeline: u64,
    /// Whether a host may have sent input that is not [`byte_at`] its offset.
    input_is_garbage: bool,
}

impl World {
    fn new(kind: u8) -> World {
        let timeline = 1;
        let hub = Hub::new(Limits { ring_budget: RING_BUDGET, processes: 1 }, timeline);
        let policy = if kind & 1 == 0 { Policy::Block } else { Policy::DropOldest };
        let process = Process::spawn(&hub, policy);
        World { hub, process, hosts: Vec::new(), timeline, input_is_garbage: false }
    }

    fn info(&self, stream: Stream) -> StreamInfo {
        let name = process::name(stream);
        self.hub.streams().into_iter().find(|info| info.stream == name).unwrap()
    }

    fn check(&self) {
        assert!(self.hub.totals().ring_bytes <= RINGS_MAX, "{:?}", self.hub.totals());
        let stdin = self.info(Stream::STDIN);
        assert!(stdin.end_offset - stdin.acked_offset <= STDIN_WINDOW, "{stdin}");
        for stream in [Stream::STDOUT, Stream::STDERR] {
            let info = self.info(stream);
            assert!(info.acked_offset <= info.end_offset, "{info}");
            assert!(info.end_offset <= self.process.written(stream), "{info}");
        }
    }

    /// The hosts leave, and one that keeps to the protocol takes what is left.
    async fn finish(mut self) {
        self.hub.release();
        for host in &mut self.hosts {
            host.leave().await;
        }
        tokio::time::sleep(MOMENT).await;
        self.check();
        self.process.read_stdin(self.input_is_garbage);
        for stream in [Stream::STDOUT, Stream::STDERR] {
            let info = self.info(stream);
            let Some(attempt) = info.attempt.checked_add(1) else { continue };
            self.process.close(stream);
            let mut host = Host::dial(&self.hub);
            host.open(self.timeline, stream, attempt, info.acked_offset).await;
            let lost = host.take_everything(info.acked_offset).await;
            let (end, is_whole) = host.end();
            let written = self.process.written(stream);
            assert!(end == written || (!is_whole && end <= written), "{stream:?} ends at {end} of {written}");
            assert!(lost == 0 || self.process.policy == Policy::DropOldest);
        }
        tokio::time::sleep(MOMENT).await;
        assert_eq!(self.hub.totals().ring_bytes, 0, "what is acknowledged is not kept");
    }
}

/// What of the input is left.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }

    /// An offset: one that means something to `stream` and a little more or less, or any.
    fn offset(&mut self, world: &World, stream: Stream) -> Option<u64> {
        let info = world.info(stream);
        let base = match self.byte()? % 5 {
            0 => 0,
            1 => info.acked_offset,
            2 => info.end_offset,
            3 => u64::MAX,
            _ => u64::from(self.number()?) << 4,
        };
        Some(base.wrapping_add_signed(i64::from(self.byte()?.cast_signed())))
    }

    /// Does what comes next; `None` at the end.
    async fn step(&mut self, world: &mut World) -> Option<()> {
        match self.byte()? % 16 {
            // The host dials, and opens a stream as it should or nearly so.
            0 | 1 => {
                let stream = process::STREAMS[usize::from(self.byte()? % 3)];
                let attempt = world.info(stream).attempt.wrapping_add(u64::from(self.byte()?));
                let offset = self.offset(world, stream)?;
                let mut host = Host::dial(&world.hub);
                host.send_open(world.timeline, stream, attempt, offset).await;
                world.hosts.push(host);
            }
            // The host dials and says nothing yet.
            2 => world.hosts.push(Host::dial(&world.hub)),
            // A connection ends.
            3 => {
                if let Some(host) = self.host(world)? {
                    host.hang_up();
                }
            }
            // A frame; DATA is what the process should get at that offset.
            4..=7 => {
                let (kind, flags) = (self.byte()?, self.byte()?);
                let stream = process::STREAMS[usize::from(self.byte()? % 3)];
                let offset = self.offset(world, stream)?;
                let len = usize::from(self.number()?);
                let has_body = kind == Kind::Data as u8;
                let body: Vec<u8> = match has_body {
                    true => (0..len as u64).map(|n| byte_at(offset.wrapping_add(n))).collect(),
                    false => self.take(len % 64),
                };
                if let Some(host) = self.host(world)? {
                    if kind == Kind::Ack as u8 && flags == LAST {
                        host.give_up();
                    }
                    let mut wire = vec![kind, flags, 0, 0];
                    wire.extend((body.len() as u32).to_le_bytes());
                    wire.extend(offset.to_le_bytes());
                    wire.extend(body);
                    host.send(&wire).await;
                }
            }
            // Any bytes.
            8 => {
                let len = usize::from(self.byte()?);
                let bytes = self.take(len);
                world.input_is_garbage = true;
                if let Some(host) = self.host(world)? {
                    host.give_up();
                    host.send(&bytes).await;
                }
            }
            // The process writes, at most what its pipe takes.
            9 | 10 => {
                let (to_stderr, len) = (self.byte()? & 1 == 1, u64::from(self.number()?) * 4);
                world.process.write(if to_stderr { Stream::STDERR } else { Stream::STDOUT }, len);
                tokio::time::sleep(MOMENT).await;
            }
            // A host reads, at most so much.
            11 => {
                let most = usize::from(self.number()?) * 4;
                if let Some(host) = self.host(world)? {
                    host.receive(most.min(4 * (HEADER_LEN + BODY_MAX))).await;
                }
            }
            12 => world.process.read_stdin(world.input_is_garbage),
            13 => match self.byte()? % 8 {
                0 => world.hub.hold(),
                1 => world.hub.release(),
                2 => {
                    world.timeline += 1;
                    world.hub.begin_timeline(world.timeline);
                }
                3 => world.process.close(Stream::STDOUT),
                4 => world.process.close(Stream::STDERR),
                5 => world.process.close(Stream::STDIN),
                6 => world.hub.exited(&process::id()),
                _ => {
                    tokio::time::sleep(PATIENCE).await;
                    world.hosts.iter_mut().for_each(Host::give_up);
                }
            },
            // What is ready to happen happens.
            _ => tokio::time::sleep(MOMENT).await,
        }
        Some(())
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }

    /// One of the hosts, if there is any; the latest for 0.
    fn host<'a>(&mut self, world: &'a mut World) -> Option<Option<&'a mut Host>> {
        let back = usize::from(self.byte()?) % world.hosts.len().max(1);
        Some(world.hosts.iter_mut().rev().nth(back))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_of_the_stream_server_holds() {
        cube_protocol::fuzzing::replay("stream_server", super::stream_server);
    }
}
