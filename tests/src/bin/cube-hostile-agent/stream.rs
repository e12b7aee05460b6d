//! What the stand-in does on port 1025. The first argument of a process is `attack`, the second what
//! its stdout (or stdin) does; every other stream is honest and empty.

use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
    thread,
    time::Duration,
};

use cube_protocol::{
    frame::{BODY_MAX, HEADER_LEN, Header, Kind},
    stream::{Open, Stream},
};
use cube_test_writer::fill;
use nix::sys::socket::{MsgFlags, recv};
use protobuf::Message;

use crate::{
    frames::{self, Random, frame, gap, opened},
    world::{Id, World},
};

/// The epoch of every stream.
const EPOCH: u64 = 1;

/// The host must close a connection on which a forbidden frame came within this time.
const CLOSE_LIMIT: Duration = Duration::from_secs(20);

/// A connection whose OPEN has been read.
struct Connection<'a> {
    world: &'a World,
    socket: UnixStream,
    id: Id,
    /// Where the host wants output to go on.
    offset: u64,
    /// Connections of this stream before this one.
    before: u64,
}

pub(crate) fn serve(world: &Arc<World>, mut socket: UnixStream) {
    let Some((header, open)) = read_open(&mut socket) else { return };
    let id = (open.container_id.clone(), open.exec_id.clone());
    let stream = open.stream.enum_value_or_default();
    let args = world.args(&id);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // The host opens the streams before it starts the process.
    if args.first() == Some(&"attack") {
        world.wait_start(&id);
        if has_ended(&socket) {
            return;
        }
    }
    let before = world.opened(&id, stream as i32);
    let connection = Connection { world, socket, id, offset: header.offset, before };
    match (stream, args.as_slice()) {
        (Stream::STDOUT, ["attack", "stdin", ..]) => connection.honest(),
        (Stream::STDOUT, ["attack", attack @ ..]) => connection.attack(attack),
        (Stream::STDIN, ["attack", "stdin", attack, bytes]) => connection.attack_stdin(attack, number(bytes)),
        (Stream::STDIN, _) => connection.take_stdin(),
        _ => connection.honest(),
    }
}

/// Whether the host has given up on a connection that was not answered in time.
fn has_ended(socket: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [0], flags) == Ok(0)
}

fn read_open(socket: &mut UnixStream) -> Option<(Header, Open)> {
    let mut wire = [0; HEADER_LEN];
    socket.read_exact(&mut wire).ok()?;
    let header = Header::decode(&wire).unwrap();
    assert_eq!(header.kind, Kind::Open);
    let mut body = vec![0; header.len as usize];
    socket.read_exact(&mut body).ok()?;
    Some((header, Open::parse_from_bytes(&body).unwrap()))
}

impl Connection<'_> {
    fn send(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    /// The stream ends with the process, without a byte.
    fn honest(mut self) {
        self.send(&opened(EPOCH, self.offset));
        self.world.wait_exit(&self.id);
        self.end();
    }

    /// The stream ends here, whatever was on it.
    fn end(&mut self) {
        self.send(&frame(Kind::Eof, self.offset, b""));
        self.until_closed();
    }

    /// Reads until the host closes; that it does not is told.
    fn until_closed(&mut self) {
        self.socket.set_read_timeout(Some(CLOSE_LIMIT)).ok();
        let mut buffer = [0; 4096];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let (container, exec) = &self.id;
                    let text = format!("connection {} of {container}/{exec} is still open", self.before);
                    return self.world.complain(&text);
                }
                Err(_) => return,
            }
        }
    }

    fn stay_silent(self) {
        loop {
            thread::park();
        }
    }

    fn exit(&self) {
        self.world.exit(&self.id, 0);
    }

    /// A byte of what `fill` makes of seed 1.
    fn good_byte(&mut self) {
        let mut byte = [0];
        fill(1, self.offset, &mut byte);
        self.send(&frame(Kind::Data, self.offset, &byte));
        self.offset += 1;
    }

    fn attack(mut self, attack: &[&str]) {
        match attack {
            // One forbidden frame on each connection, behind a good byte.
            ["frames", from, to] => {
                let (from, to) = (number(from), number(to));
                self.with_each(to - from, |connection, n| {
                    let frames = frames::forbidden(connection.offset);
                    frames[(from + n) as usize].clone()
                });
            }
            ["random", seed, count] => {
                let (seed, count) = (number(seed), number(count));
                self.with_each(count, |connection, n| {
                    frames::random(&mut Random::new(seed.wrapping_add(n)), connection.offset)
                });
            }
            ["first"] => {
                let frames = frames::forbidden_first(self.offset);
                match frames.get(self.before as usize) {
                    Some(bad) => self.send(bad),
                    None => return self.finish(),
                };
                self.until_closed();
            }
            ["epoch"] if self.before > 0 && self.before < 5 => {
                self.send(&opened(EPOCH + self.before, self.offset));
                self.until_closed();
            }
            ["epoch"] if self.before == 0 => {
                self.send(&opened(EPOCH, self.offset));
                self.good_byte();
            }
            ["epoch"] => self.finish(),
            ["error", code] => {
                self.send(&frames::error(number(code) as i32));
                self.exit();
                self.until_closed();
            }
            ["late-error", code] => {
                self.send(&opened(EPOCH, self.offset));
                self.good_byte();
                self.send(&frames::error(number(code) as i32));
                self.exit();
                self.until_closed();
            }
            ["half", bytes] => {
                self.send(&opened(EPOCH, self.offset));
                self.good_byte();
                let whole = frame(Kind::Data, self.offset, &[0; 100]);
                self.send(&whole[..number(bytes) as usize]);
                self.exit();
                self.stay_silent();
            }
            ["mute"] => {
                self.exit();
                self.stay_silent();
            }
            ["eof-then-data"] => {
                self.send(&opened(EPOCH, self.offset));
                self.good_byte();
                self.send(&frame(Kind::Eof, self.offset, b""));
                self.send(&frame(Kind::Data, self.offset, b"more"));
                self.exit();
                self.until_closed();
            }
            ["storm", kind] => self.storm(kind),
            ["flood"] => self.flood(BODY_MAX, u64::MAX),
            ["tiny", bytes] => self.flood(1, number(bytes)),
            ["gaps", count] => self.gaps(number(count)),
            ["jump"] => {
                self.send(&opened(EPOCH, self.offset));
                self.good_byte();
                let to = u64::MAX - 4;
                self.send(&gap(to - self.offset, to));
                self.send(&frame(Kind::Data, to, b"tail"));
                self.offset = u64::MAX;
                self.exit();
                self.end();
            }
            other => panic!("unknown attack {other:?}"),
        }
    }

    /// Ends a stream honestly where the attack is over.
    fn finish(&mut self) {
        self.send(&opened(EPOCH, self.offset));
        self.exit();
        self.end();
    }

    fn with_each(&mut self, count: u64, bad: impl Fn(&Self, u64) -> Vec<u8>) {
        if self.before >= count {
            return self.finish();
        }
        self.send(&opened(EPOCH, self.offset));
        self.good_byte();
        let bad = bad(self, self.before);
        // The host may close before all of it is written.
        self.send(&bad);
        self.until_closed();
    }

    /// Closes every connection after this much.
    fn storm(&mut self, kind: &str) {
        if kind != "at-once" {
            self.send(&opened(EPOCH, self.offset));
        }
        if kind == "after-a-byte" {
            self.good_byte();
        }
    }

    /// Output without a pause, and without regard to what is acknowledged.
    fn flood(&mut self, size: usize, bytes: u64) {
        self.send(&opened(EPOCH, self.offset));
        let frames_at_once = (64 << 10) / size.min(64 << 10);
        while self.offset < bytes {
            let mut wire = Vec::new();
            for _ in 0..frames_at_once {
                let mut body = vec![0; size];
                fill(1, self.offset, &mut body);
                wire.extend(frame(Kind::Data, self.offset, &body));
                self.offset += size as u64;
                if self.offset == bytes {
                    break;
                }
            }
            if !self.send(&wire) {
                return;
            }
        }
        self.exit();
        self.end();
    }

    /// One lost byte after the other.
    fn gaps(&mut self, count: u64) {
        self.send(&opened(EPOCH, self.offset));
        while self.offset < count {
            let mut wire = Vec::new();
            while self.offset < count && wire.len() < 64 << 10 {
                self.offset += 1;
                wire.extend(gap(1, self.offset));
            }
            if !self.send(&wire) {
                return;
            }
        }
        self.exit();
        self.end();
    }

    /// Takes and acknowledges what comes, until the process has exited.
    fn take_stdin(mut self) {
        self.send(&opened(EPOCH, 0));
        while let Some((header, _)) = self.frame() {
            match header.kind {
                Kind::Data => self.send(&frame(Kind::Ack, header.end(), b"")),
                Kind::Eof => self.send(&frame(Kind::Ack, header.offset, b"")),
                _ => return,
            };
        }
    }

    fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut wire = [0; HEADER_LEN];
        self.socket.read_exact(&mut wire).ok()?;
        let header = Header::decode(&wire).unwrap();
        let mut body = vec![0; header.len as usize];
        self.socket.read_exact(&mut body).ok()?;
        Some((header, body))
    }

    /// One forbidden answer on each of the first connections, then all of stdin is taken, and after
    /// so many bytes the process exits with their number.
    fn attack_stdin(mut self, attack: &str, bytes: u64) {
        self.send(&opened(EPOCH, if attack == "opened-ahead" && self.before < 3 { 1 << 40 } else { 0 }));
        if self.before < 3 {
            let Some((header, _)) = self.frame() else { return };
            let bad = match attack {
                "ahead" => frame(Kind::Ack, header.end() + 1, b""),
                "far-ahead" => frame(Kind::Ack, u64::MAX, b""),
                "data" => frame(Kind::Data, 0, b"x"),
                "opened" => opened(EPOCH, 0),
                "stopped" => frame(Kind::Stopped, 0, b""),
                "gap" => gap(1, 1),
                "opened-ahead" => Vec::new(),
                other => panic!("unknown attack {other:?} on stdin"),
            };
            self.send(&bad);
            return self.until_closed();
        }
        while let Some((header, _)) = self.frame() {
            match header.kind {
                Kind::Data => {
                    let taken = header.end();
                    self.send(&frame(Kind::Ack, taken, b""));
                    if taken >= bytes {
                        self.world.exit(&self.id, taken as u32);
                    }
                }
                Kind::Eof => drop(self.send(&frame(Kind::Ack, header.offset, b""))),
                _ => return,
            }
        }
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|e| panic!("{text:?}: {e}"))
}
