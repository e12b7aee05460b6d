//! Frames of the stream port: a 16-byte header, then at most 64 KiB.
//!
//! ```text
//!  0      1       2          4         8                16
//! +------+-------+----------+---------+----------------+----------- - -
//! | kind | flags | reserved |   len   |     offset     | len bytes
//! |  u8  |  u8   |  u16 = 0 |   u32   |      u64       |
//! +------+-------+----------+---------+----------------+----------- - -
//! ```
//!
//! Little-endian. `offset` is a position in the stream in bytes since its process started. Bytes
//! from the other side are never trusted: a header that [`Header::decode`] refuses means that the
//! connection must be closed and the refusal counted.

use bytes::{Bytes, BytesMut};
use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes in a header.
pub const HEADER_LEN: usize = 16;

/// Most bytes that may follow a header.
pub const BODY_MAX: usize = 64 * 1024;

/// Most bytes of stdin that the host may have in flight beyond the last ACK.
pub const STDIN_WINDOW: u64 = 64 * 1024;

/// What a frame means. The numbers are the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Host to guest, first on a connection: which stream, and from where. Body: `stream::Open`.
    Open = 1,
    /// Guest to host: the stream is yours and goes on at `offset`. Body: `stream::Opened`.
    Opened = 2,
    /// Either way: bytes at `offset`.
    Data = 3,
    /// Either way: everything below `offset` is safe. May carry [`Flags::LAST`].
    Ack = 4,
    /// Either way: no byte will follow `offset`. May carry [`Flags::TRUNCATED`].
    Eof = 5,
    /// Guest to host: output goes on at `offset`, bytes before it were dropped. Body: `stream::Gap`.
    Gap = 6,
    /// Host to guest: send no further DATA.
    Stop = 7,
    /// Guest to host: the next byte is `offset`, nothing more comes.
    Stopped = 8,
    /// Guest to host, last on a connection. Body: `stream::Error`.
    Error = 9,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Open,
        Kind::Opened,
        Kind::Data,
        Kind::Ack,
        Kind::Eof,
        Kind::Gap,
        Kind::Stop,
        Kind::Stopped,
        Kind::Error,
    ];

    fn from_wire(number: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Flags that a frame of this kind may carry.
    fn allowed_flags(self) -> Flags {
        match self {
            Kind::Ack => Flags::LAST,
            Kind::Eof => Flags::TRUNCATED,
            _ => Flags::NONE,
        }
    }

    /// Whether a frame of this kind may have a body.
    fn has_body(self) -> bool {
        matches!(self, Kind::Open | Kind::Opened | Kind::Data | Kind::Gap | Kind::Error)
    }
}

/// Flags of a frame, a bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(u8);

impl Flags {
    /// No flag.
    pub const NONE: Flags = Flags(0);
    /// On ACK: nothing more will be acknowledged on this connection.
    pub const LAST: Flags = Flags(1);
    /// On EOF: the writer lived on, its further output is discarded.
    pub const TRUNCATED: Flags = Flags(2);

    /// Whether every flag of `other` is set.
    pub fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The first 16 bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame means.
    pub kind: Kind,
    /// Zero or one flag that the kind allows.
    pub flags: Flags,
    /// Bytes that follow the header, at most [`BODY_MAX`].
    pub len: u32,
    /// Position in the stream in bytes.
    pub offset: u64,
}

/// A frame that the protocol does not allow. The connection it came on must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// An undefined kind.
    #[error("frame kind {0} is not defined")]
    Kind(u8),
    /// A flag that is undefined or not allowed for the kind.
    #[error("flags {flags:#04x} are not allowed on a frame of kind {kind:?}")]
    Flags {
        /// The frame's kind.
        kind: Kind,
        /// Its flags byte.
        flags: u8,
    },
    /// A reserved field that is not zero.
    #[error("the reserved field is {0:#06x}, not zero")]
    Reserved(u16),
    /// A body longer than [`BODY_MAX`], or a body where there is none.
    #[error("a frame of kind {kind:?} may not have {len} bytes of body")]
    Length {
        /// The frame's kind.
        kind: Kind,
        /// Its length field.
        len: u32,
    },
    /// `offset + len` does not fit into 64 bits.
    #[error("offset {offset} plus {len} bytes overflows")]
    Overflow {
        /// The frame's offset field.
        offset: u64,
        /// Its length field.
        len: u32,
    },
}

impl Header {
    /// A header for `kind` at `offset` with no flags and no body.
    pub fn new(kind: Kind, offset: u64) -> Header {
        Header { kind, flags: Flags::NONE, len: 0, offset }
    }

    /// The header with `flags` instead of its own.
    pub fn with_flags(self, flags: Flags) -> Header {
        Header { flags, ..self }
    }

    /// The offset after the last byte of the body. Cannot overflow for a decoded header.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.len))
    }

    /// The header as it goes over the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut wire = [0; HEADER_LEN];
        wire[0] = self.kind as u8;
        wire[1] = self.flags.0;
        wire[4..8].copy_from_slice(&self.len.to_le_bytes());
        wire[8..16].copy_from_slice(&self.offset.to_le_bytes());
        wire
    }

    /// Reads a header that came over the wire.
    ///
    /// # Errors
    ///
    /// [`Malformed`], with the value that the protocol does not allow.
    pub fn decode(wire: &[u8; HEADER_LEN]) -> Result<Header, Malformed> {
        let [kind, flags, r0, r1, l0, l1, l2, l3, offset @ ..] = *wire;
        let (reserved, len) = (u16::from_le_bytes([r0, r1]), u32::from_le_bytes([l0, l1, l2, l3]));
        let offset = u64::from_le_bytes(offset);
        let kind = Kind::from_wire(kind).ok_or(Malformed::Kind(kind))?;
        if flags & !kind.allowed_flags().0 != 0 {
            return Err(Malformed::Flags { kind, flags });
        }
        if reserved != 0 {
            return Err(Malformed::Reserved(reserved));
        }
        if len as usize > BODY_MAX || (len > 0 && !kind.has_body()) {
            return Err(Malformed::Length { kind, len });
        }
        if offset.checked_add(u64::from(len)).is_none() {
            return Err(Malformed::Overflow { offset, len });
        }
        Ok(Header { kind, flags: Flags(flags), len, offset })
    }
}

/// A header with its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// `header.len` is the length of `body`.
    pub header: Header,
    /// At most [`BODY_MAX`] bytes.
    pub body: Bytes,
}

/// Why no frame could be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer broke the protocol.
    #[error("malformed frame")]
    Malformed(#[from] Malformed),
    /// A body that is not the message that the kind requires.
    #[error("the body of a frame of kind {kind:?} cannot be decoded")]
    Body {
        /// The frame's kind.
        kind: Kind,
        /// What the decoder says.
        source: protobuf::Error,
    },
    /// The connection failed, or ended inside a frame (`UnexpectedEof`).
    #[error("stream connection")]
    Io(#[from] std::io::Error),
}

impl Frame {
    /// A frame whose body is the message `body`.
    ///
    /// # Errors
    ///
    /// [`Malformed::Length`] if the encoded message is longer than [`BODY_MAX`];
    /// [`FrameError::Body`] if it cannot be encoded.
    pub fn with_message(kind: Kind, offset: u64, body: &impl Message) -> Result<Frame, FrameError> {
        let body = body.write_to_bytes().map_err(|source| FrameError::Body { kind, source })?;
        if body.len() > BODY_MAX {
            let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
            return Err(Malformed::Length { kind, len }.into());
        }
        let header = Header { len: body.len() as u32, ..Header::new(kind, offset) };
        Ok(Frame { header, body: body.into() })
    }

    /// The body as the message that the frame's kind requires.
    pub fn message<M: Message>(&self) -> Result<M, FrameError> {
        M::parse_from_bytes(&self.body).map_err(|source| FrameError::Body { kind: self.header.kind, source })
    }
}

/// Reads the next header. `None` if the peer closed between two frames.
///
/// Not cancel safe: a header that is read in part is lost. Read in a task of its own.
pub async fn read_header<R>(reader: &mut R) -> Result<Option<Header>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let mut wire = [0; HEADER_LEN];
    let first = reader.read(&mut wire).await?;
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut wire[first..]).await?;
    Ok(Some(Header::decode(&wire)?))
}

/// Reads the next frame, its body into memory of `buffer`. `None` if the peer closed between two frames.
///
/// Not cancel safe, like [`read_header`].
pub async fn read_frame<R>(reader: &mut R, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let Some(header) = read_header(reader).await? else { return Ok(None) };
    buffer.resize(header.len as usize, 0);
    reader.read_exact(buffer).await?;
    Ok(Some(Frame { header, body: buffer.split().freeze() }))
}

/// Writes a frame. Not cancel safe: a frame that is written in part breaks the connection.
pub async fn write_frame<W>(writer: &mut W, frame: &Frame) -> Result<(), FrameError>
where
    W: AsyncWrite + Unpin,
{
    debug_assert_eq!(frame.header.len as usize, frame.body.len());
    let head = frame.header.encode();
    let mut wire = bytes::Buf::chain(&head[..], &frame.body[..]);
    Ok(writer.write_all_buf(&mut wire).await?)
}

/// Writes a frame that has no body. Not cancel safe, like [`write_frame`].
pub async fn write_header<W>(writer: &mut W, header: Header) -> Result<(), FrameError>
where
    W: AsyncWrite + Unpin,
{
    debug_assert_eq!(header.len, 0);
    Ok(writer.write_all(&header.encode()).await?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stream;

    fn any_header() -> impl Strategy<Value = Header> {
        (0..Kind::ALL.len(), any::<bool>(), 0..=BODY_MAX as u32, any::<u64>()).prop_map(
            |(kind, flagged, len, offset)| {
                let kind = Kind::ALL[kind];
                let len = if kind.has_body() { len } else { 0 };
                let flags = if flagged { kind.allowed_flags() } else { Flags::NONE };
                Header { kind, flags, len, offset: offset.min(u64::MAX - u64::from(len)) }
            },
        )
    }

    proptest! {
        #[test]
        fn a_header_survives_the_wire(header in any_header()) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn any_16_bytes_either_decode_to_themselves_or_are_refused(wire in any::<[u8; HEADER_LEN]>()) {
            if let Ok(header) = Header::decode(&wire) {
                prop_assert_eq!(header.encode(), wire);
                prop_assert!(header.len as usize <= BODY_MAX);
                prop_assert_eq!(header.end() - header.offset, u64::from(header.len));
            }
        }

        #[test]
        fn frames_survive_a_connection_that_splits_them_anywhere(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..8),
            capacity in 1usize..64,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let frames: Vec<Frame> = bodies
                    .into_iter()
                    .map(|body| Frame {
                        header: Header { len: body.len() as u32, ..Header::new(Kind::Data, 5) },
                        body: body.into(),
                    })
                    .collect();
                let (mut near, mut far) = tokio::io::duplex(capacity);
                let sender = async {
                    for frame in &frames {
                        write_frame(&mut near, frame).await.unwrap();
                    }
                    drop(near);
                };
                let receiver = async {
                    let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
                    while let Some(frame) = read_frame(&mut far, &mut buffer).await.unwrap() {
                        got.push(frame);
                    }
                    got
                };
                let ((), got) = tokio::join!(sender, receiver);
                assert_eq!(got, frames);
            });
        }
    }

    fn wire(kind: u8, flags: u8, reserved: u16, len: u32, offset: u64) -> [u8; HEADER_LEN] {
        let mut wire = [0; HEADER_LEN];
        wire[0] = kind;
        wire[1] = flags;
        wire[2..4].copy_from_slice(&reserved.to_le_bytes());
        wire[4..8].copy_from_slice(&len.to_le_bytes());
        wire[8..].copy_from_slice(&offset.to_le_bytes());
        wire
    }

    #[test]
    fn what_the_protocol_does_not_define_is_refused_with_the_value() {
        assert_eq!(Header::decode(&wire(0, 0, 0, 0, 0)), Err(Malformed::Kind(0)));
        assert_eq!(Header::decode(&wire(10, 0, 0, 0, 0)), Err(Malformed::Kind(10)));
        assert_eq!(
            Header::decode(&wire(3, 1, 0, 0, 0)),
            Err(Malformed::Flags { kind: Kind::Data, flags: 1 })
        );
        assert_eq!(Header::decode(&wire(3, 0, 9, 0, 0)), Err(Malformed::Reserved(9)));
        assert_eq!(
            Header::decode(&wire(3, 0, 0, u32::MAX, 0)),
            Err(Malformed::Length { kind: Kind::Data, len: u32::MAX })
        );
        assert_eq!(Header::decode(&wire(4, 0, 0, 1, 0)), Err(Malformed::Length { kind: Kind::Ack, len: 1 }));
        assert_eq!(
            Header::decode(&wire(3, 0, 0, 2, u64::MAX - 1)),
            Err(Malformed::Overflow { offset: u64::MAX - 1, len: 2 })
        );
    }

    #[tokio::test]
    async fn a_connection_that_ends_inside_a_frame_is_an_error_and_between_two_is_not() {
        let header = Header { len: 3, ..Header::new(Kind::Data, 0) };
        let mut whole = header.encode().to_vec();
        whole.extend_from_slice(b"abc");
        for cut in 1..whole.len() {
            let result = read_frame(&mut &whole[..cut], &mut BytesMut::new()).await;
            assert!(
                matches!(&result, Err(FrameError::Io(e)) if e.kind() == std::io::ErrorKind::UnexpectedEof)
            );
        }
        assert!(read_frame(&mut &[][..], &mut BytesMut::new()).await.unwrap().is_none());
    }

    #[test]
    fn a_message_body_survives_and_garbage_in_its_place_is_refused() {
        let open = stream::Open { container_id: "c".into(), attempt: 3, ..Default::default() };
        let frame = Frame::with_message(Kind::Open, 7, &open).unwrap();
        assert_eq!(frame.message::<stream::Open>().unwrap(), open);
        let garbage = Frame { body: Bytes::from_static(&[0xff; 5]), ..frame };
        assert!(matches!(garbage.message::<stream::Open>(), Err(FrameError::Body { kind: Kind::Open, .. })));
    }
}
