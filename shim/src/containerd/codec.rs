//! Messages of the protobuf crate, which containerd-shim-protos and all of Cubebox use, for tonic.

use std::{io, marker::PhantomData};

use bytes::{Buf, BufMut};
use protobuf::Message;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// Requests of the one type, answers of the other.
#[derive(Debug)]
pub struct Messages<Request, Answer>(PhantomData<(Request, Answer)>);

impl<Request, Answer> Default for Messages<Request, Answer> {
    fn default() -> Self {
        Messages(PhantomData)
    }
}

impl<Request: Message, Answer: Message> Codec for Messages<Request, Answer> {
    type Encode = Request;
    type Decode = Answer;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl<Request: Message, Answer> Encoder for Messages<Request, Answer> {
    type Item = Request;
    type Error = Status;

    fn encode(&mut self, message: Request, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message.write_to_writer(&mut buffer.writer()).map_err(|e| Status::from(io::Error::from(e)))
    }
}

impl<Request, Answer: Message> Decoder for Messages<Request, Answer> {
    type Item = Answer;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Answer>, Status> {
        let message = Answer::parse_from_reader(&mut buffer.reader());
        message.map(Some).map_err(|e| Status::from(io::Error::from(e)))
    }
}
