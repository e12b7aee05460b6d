//! One connection, from its `CONNECT` to its end.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use super::{
    frames::Frames,
    plan::{Fault, Point, Side},
};

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// How often a stalled direction looks whether the connection has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Both ends of a connection whose handshake is over.
#[derive(Debug)]
pub(super) struct Connection {
    near: UnixStream,
    far: UnixStream,
    fault: Option<Fault>,
    ended: AtomicBool,
    cut: AtomicBool,
    frozen: AtomicBool,
}

impl Connection {
    pub(super) fn new(near: UnixStream, far: UnixStream, fault: Option<Fault>) -> io::Result<Connection> {
        if fault == Some(Fault::Narrow) {
            for socket in [&near, &far] {
                // The kernel raises it to what it needs for one write.
                setsockopt(socket, sockopt::SndBuf, &1)?;
            }
        }
        let no = || AtomicBool::new(false);
        Ok(Connection { near, far, fault, ended: no(), cut: no(), frozen: no() })
    }

    /// Lets nothing pass from now on.
    pub(super) fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    /// Copies both directions until one of them ends; `head` came from the shim already. Whether the
    /// connection was cut.
    pub(super) fn run(&self, head: &[u8]) -> bool {
        thread::scope(|scope| {
            scope.spawn(|| Pump::new(self, Side::ToGuest).run(head));
            Pump::new(self, Side::ToHost).run(&[]);
        });
        self.cut.load(Ordering::Relaxed)
    }

    /// Nothing on a connection is ever half closed: what ends one direction ends both.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        for socket in [&self.near, &self.far] {
            socket.shutdown(Shutdown::Both).ok();
        }
    }
}

/// One direction of a connection.
struct Pump<'a> {
    connection: &'a Connection,
    side: Side,
    from: &'a UnixStream,
    to: &'a UnixStream,
    /// Bytes that have passed.
    bytes: u64,
    frames: Frames,
    stalled: bool,
}

/// Whether a direction goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    Over,
}

impl<'a> Pump<'a> {
    fn new(connection: &'a Connection, side: Side) -> Pump<'a> {
        let (from, to) = match side {
            Side::ToGuest => (&connection.near, &connection.far),
            Side::ToHost => (&connection.far, &connection.near),
        };
        Pump { connection, side, from, to, bytes: 0, frames: Frames::default(), stalled: false }
    }

    fn run(mut self, head: &[u8]) {
        // An error is the end of the connection by one of its sides.
        self.copy(head).ok();
        self.connection.end();
    }

    fn copy(&mut self, head: &[u8]) -> io::Result<()> {
        if !head.is_empty() && self.pass(head)? == Flow::Over {
            return Ok(());
        }
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = match self.from.read(&mut buffer) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            };
            if n == 0 || self.pass(&buffer[..n])? == Flow::Over {
                return Ok(());
            }
        }
    }

    fn pass(&mut self, bytes: &[u8]) -> io::Result<Flow> {
        match &self.connection.fault {
            None | Some(Fault::Narrow) => self.write(bytes)?,
            Some(Fault::Cut(points)) => return self.pass_up_to(points, bytes),
            Some(Fault::SingleBytes) => bytes.chunks(1).try_for_each(|byte| self.write(byte))?,
            Some(Fault::Bursts(pause)) => {
                thread::sleep(*pause);
                let mut burst = bytes.to_vec();
                self.gather(&mut burst);
                self.write(&burst)?;
            }
            Some(Fault::Stall(side, after, hold)) => {
                let before = usize::try_from(after.saturating_sub(self.bytes)).unwrap_or(usize::MAX);
                if *side != self.side || self.stalled || before > bytes.len() {
                    self.write(bytes)?;
                } else {
                    self.write(&bytes[..before])?;
                    self.stalled = true;
                    self.hold(*hold);
                    self.write(&bytes[before..])?;
                }
            }
        }
        Ok(Flow::On)
    }

    fn pass_up_to(&mut self, points: &[Point], bytes: &[u8]) -> io::Result<Flow> {
        let mut end = None;
        for point in points {
            let at = match *point {
                Point::Bytes(side, limit) if side == self.side => {
                    usize::try_from(limit - self.bytes).ok().filter(|left| *left <= bytes.len())
                }
                Point::Frames(side, limit) if side == self.side => self.frames.scan(bytes, limit),
                _ => None,
            };
            end = [end, at].into_iter().flatten().min();
        }
        self.write(&bytes[..end.unwrap_or(bytes.len())])?;
        if end.is_none() {
            return Ok(Flow::On);
        }
        self.connection.cut.store(true, Ordering::Relaxed);
        Ok(Flow::Over)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.connection.frozen.load(Ordering::Relaxed) {
            self.hold(None);
        }
        self.to.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Appends what has come meanwhile.
    fn gather(&self, burst: &mut Vec<u8>) {
        let mut buffer = [0; 16 << 10];
        while let Ok(n @ 1..) = recv(self.from.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            burst.extend_from_slice(&buffer[..n]);
        }
    }

    fn hold(&self, time: Option<Duration>) {
        let since = Instant::now();
        while !self.connection.ended.load(Ordering::Relaxed) && time.is_none_or(|time| since.elapsed() < time)
        {
            thread::sleep(LOOK);
        }
    }
}
