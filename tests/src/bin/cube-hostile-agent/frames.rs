//! Frames that the protocol forbids.

use cube_protocol::{
    frame::{BODY_MAX, HEADER_LEN, Header, Kind},
    stream::{self, Gap, Opened},
};
use cube_test_writer::fill;
use protobuf::Message;

/// A frame with these header fields.
pub(crate) fn raw(kind: u8, flags: u8, reserved: u16, len: u32, offset: u64, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind, flags];
    frame.extend(reserved.to_le_bytes());
    frame.extend(len.to_le_bytes());
    frame.extend(offset.to_le_bytes());
    frame.extend(body);
    frame
}

/// A well-formed frame.
pub(crate) fn frame(kind: Kind, offset: u64, body: &[u8]) -> Vec<u8> {
    let header = Header { len: body.len() as u32, ..Header::new(kind, offset) };
    [&header.encode()[..], body].concat()
}

pub(crate) fn message(kind: Kind, offset: u64, body: &impl Message) -> Vec<u8> {
    frame(kind, offset, &body.write_to_bytes().unwrap())
}

pub(crate) fn opened(epoch: u64, offset: u64) -> Vec<u8> {
    message(Kind::Opened, offset, &Opened { epoch, ..Default::default() })
}

pub(crate) fn gap(lost_bytes: u64, offset: u64) -> Vec<u8> {
    message(Kind::Gap, offset, &Gap { lost_bytes, ..Default::default() })
}

/// An ERROR with as much text as a frame takes, full of control characters.
pub(crate) fn error(code: i32) -> Vec<u8> {
    let message = "\x1b[2J\r\n\0".repeat((BODY_MAX - 32) / 7);
    let code = protobuf::EnumOrUnknown::from_i32(code);
    self::message(Kind::Error, 0, &stream::Error { code, message, bytes: u64::MAX, ..Default::default() })
}

/// Each of them is forbidden on an output stream that is open and is at `offset`, at least 1.
pub(crate) fn forbidden(offset: u64) -> Vec<Vec<u8>> {
    let data = Kind::Data as u8;
    vec![
        raw(data, 0, 0, u32::MAX, offset, b""),
        raw(data, 0, 0, BODY_MAX as u32 + 1, offset, &[0; BODY_MAX + 1]),
        raw(data, 0, 1, 1, offset, b"x"),
        raw(data, 1, 0, 1, offset, b"x"),
        raw(Kind::Eof as u8, 0x80, 0, 0, offset, b""),
        raw(Kind::Eof as u8, 0, 0, 1, offset, b"x"),
        raw(0, 0, 0, 0, offset, b""),
        raw(10, 0, 0, 0, offset, b""),
        raw(255, 255, 0xffff, u32::MAX, u64::MAX, &[0xff; 64]),
        raw(data, 0, 0, 2, u64::MAX - 1, b"xx"),
        frame(Kind::Data, offset + 1, b"ahead"),
        frame(Kind::Data, offset - 1, b"back"),
        frame(Kind::Data, offset, b""),
        frame(Kind::Eof, offset + 1, b""),
        frame(Kind::Eof, offset - 1, b""),
        gap(u64::MAX, u64::MAX),
        gap(0, offset),
        gap(5, offset + 4),
        gap(1, offset - 1),
        frame(Kind::Gap, offset + 1, &[0xff; 8]),
        opened(1, offset),
        frame(Kind::Ack, offset, b""),
        raw(Kind::Ack as u8, 1, 0, 0, u64::MAX, b""),
        frame(Kind::Stop, 0, b""),
        frame(Kind::Stopped, offset, b""),
        message(Kind::Open, 0, &stream::Open::default()),
        frame(Kind::Error, 0, &[0xff; 8]),
        error(stream::ErrorCode::PROTOCOL as i32),
        error(0),
        error(99),
    ]
}

/// Forbidden in place of OPENED.
pub(crate) fn forbidden_first(offset: u64) -> Vec<Vec<u8>> {
    vec![
        frame(Kind::Data, offset, b"early"),
        frame(Kind::Eof, offset, b""),
        frame(Kind::Ack, offset, b""),
        frame(Kind::Stopped, offset, b""),
        gap(1, offset + 1),
        frame(Kind::Opened, offset, &[0xff; 8]),
        // No epoch is 0: it could be another with every connection.
        opened(0, offset),
        raw(Kind::Opened as u8, 0, 0, u32::MAX, offset, b""),
        message(Kind::Open, offset, &stream::Open::default()),
    ]
}

/// Numbers from a seed.
pub(crate) struct Random {
    seed: u64,
    position: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random { seed, position: 0 }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        fill(self.seed, self.position, &mut bytes);
        self.position += len as u64;
        bytes
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        let bytes = self.bytes(8);
        u64::from_le_bytes(bytes.try_into().unwrap()) % end
    }
}

/// Random bytes, or a random header with a random body that cannot be right at `offset`.
pub(crate) fn random(random: &mut Random, offset: u64) -> Vec<u8> {
    if random.below(2) == 0 {
        let len = HEADER_LEN + random.below(4096) as usize;
        let mut bytes = random.bytes(len);
        // Else it may be a frame with a long body, whose end the host rightly waits for.
        bytes[2] |= 1;
        return bytes;
    }
    let kinds = [Kind::Opened, Kind::Data, Kind::Ack, Kind::Eof, Kind::Gap, Kind::Stop, Kind::Stopped];
    let kind = kinds[random.below(kinds.len() as u64) as usize];
    let len = if random.below(4) == 0 { BODY_MAX as u64 } else { 1 + random.below(64) };
    let at = [0, 1, offset - 1, offset + 1, offset + len, u64::MAX - len, u64::MAX][random.below(7) as usize];
    let at = if at == offset { offset + 1 } else { at };
    let (flags, reserved) = ((random.below(8) == 0).into(), u16::from(random.below(8) == 0));
    let body = random.bytes(len as usize);
    raw(kind as u8, flags, reserved, len as u32, at, &body)
}
