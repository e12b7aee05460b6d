//! The host's end of a stream.

use bytes::BytesMut;
use cube_protocol::{
    frame::{Flags, Frame, Header, Kind, read_frame, write_frame, write_header},
    stream::{self, ErrorCode, Open, Stream},
};
use tokio::{net::UnixStream, time::timeout};

use crate::agent::{Agent, LIMIT};

/// A connection that has opened a stream.
pub(crate) struct Host {
    connection: UnixStream,
    buffer: BytesMut,
}

impl Host {
    /// Opens a stream of an init process.
    pub(crate) async fn open(agent: &Agent, id: &str, stream: Stream, attempt: u64, offset: u64) -> Host {
        Host::open_exec(agent, id, "", stream, attempt, offset).await
    }

    /// Opens a stream on the timeline that the agent had when it started.
    pub(crate) async fn open_exec(
        agent: &Agent,
        id: &str,
        exec_id: &str,
        stream: Stream,
        attempt: u64,
        offset: u64,
    ) -> Host {
        let open = Open {
            container_id: id.into(),
            exec_id: exec_id.into(),
            stream: stream.into(),
            timeline: agent.timeline,
            attempt,
            ..Default::default()
        };
        let mut host = Host { connection: agent.stream().await, buffer: BytesMut::new() };
        let open = Frame::with_message(Kind::Open, offset, &open).unwrap();
        write_frame(&mut host.connection, &open).await.unwrap();
        let opened = host.receive().await.unwrap().header;
        assert_eq!((opened.kind, opened.offset), (Kind::Opened, offset));
        host
    }

    pub(crate) async fn send(&mut self, header: Header) {
        write_header(&mut self.connection, header).await.unwrap();
    }

    pub(crate) async fn acknowledge(&mut self, offset: u64, flags: Flags) {
        self.send(Header::new(Kind::Ack, offset).with_flags(flags)).await;
    }

    /// The next frame, or `None` once the agent has closed.
    pub(crate) async fn receive(&mut self) -> Option<Frame> {
        timeout(LIMIT, read_frame(&mut self.connection, &mut self.buffer)).await.unwrap().unwrap()
    }

    /// Everything up to EOF.
    pub(crate) async fn drain(&mut self) -> Vec<u8> {
        let mut output = Vec::new();
        loop {
            let frame = self.receive().await.expect("EOF comes before the end");
            match frame.header.kind {
                Kind::Data => {
                    output.extend_from_slice(&frame.body);
                    self.acknowledge(frame.header.end(), Flags::NONE).await;
                }
                Kind::Eof => return output,
                kind => panic!("{kind:?}"),
            }
        }
    }

    /// The code of the ERROR that comes next.
    pub(crate) async fn error(&mut self) -> ErrorCode {
        let frame = self.receive().await.expect("ERROR comes before the end");
        frame.message::<stream::Error>().unwrap().code.unwrap()
    }
}
