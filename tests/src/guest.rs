//! The agent of a running sandbox, dialled past its shim.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use cube_protocol::{
    frame::{HEADER_LEN, Header, Kind},
    guest::{
        HelloRequest, HelloResponse, InfoRequest, InfoResponse, QuiesceRequest, QuiesceResponse, ThawRequest,
        Version,
    },
    guest_ttrpc::GuestClient,
    ports, stream, version,
};
use cube_shim::agent::dial::{Dial, HybridVsock};
use protobuf::Message;
use tokio::runtime::Runtime;
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};

use crate::lab::Lab;

/// The agent of a sandbox of a lab.
#[derive(Debug)]
pub struct Guest {
    socket: PathBuf,
    runtime: Runtime,
}

fn deadline() -> Context {
    context::with_timeout(Duration::from_secs(20).as_nanos() as i64)
}

impl Guest {
    /// The agent of the sandbox of container `id`.
    pub fn of(lab: &Lab, id: &str) -> Guest {
        Guest::at(socket(lab, id))
    }

    /// The agent behind a hybrid vsock socket.
    pub fn at(socket: PathBuf) -> Guest {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Guest { socket, runtime }
    }

    async fn control(&self) -> GuestClient {
        let connection = HybridVsock::new(&self.socket).dial(ports::CONTROL).await.unwrap();
        GuestClient::new(Client::new(Socket::new(connection)))
    }

    /// Says Hello as a peer of `protocol`.
    pub fn hello(&self, protocol: Version) -> ttrpc::Result<HelloResponse> {
        let request = HelloRequest { protocol: Some(protocol).into(), ..Default::default() };
        self.runtime.block_on(async { self.control().await.hello(deadline(), &request).await })
    }

    /// `Guest.Quiesce`, with the streams as the shim has them.
    pub fn quiesce(&self, sync: bool) -> QuiesceResponse {
        let request = QuiesceRequest { sync, timeout_ms: 15_000, ..Default::default() };
        self.runtime.block_on(async { self.control().await.quiesce(deadline(), &request).await.unwrap() })
    }

    /// `Guest.Thaw`.
    pub fn thaw(&self, request: &ThawRequest) {
        self.runtime.block_on(async { self.control().await.thaw(deadline(), request).await.unwrap() });
    }

    /// `Guest.Info`.
    pub fn info(&self) -> InfoResponse {
        self.try_info().expect("the agent does not answer")
    }

    /// `Guest.Info`, unless the agent is not there yet or any more.
    pub fn try_info(&self) -> Option<InfoResponse> {
        let protocol = Some(version::CURRENT.into()).into();
        self.runtime.block_on(async {
            let connection = HybridVsock::new(&self.socket).dial(ports::CONTROL).await.ok()?;
            let guest = GuestClient::new(Client::new(Socket::new(connection)));
            guest.hello(deadline(), &HelloRequest { protocol, ..Default::default() }).await.ok()?;
            guest.info(deadline(), &InfoRequest::default()).await.ok()
        })
    }

    /// Connects to the stream port, sends `bytes`, and gives what comes until the agent closes.
    pub fn exchange(&self, bytes: &[u8]) -> Vec<u8> {
        let mut socket = UnixStream::connect(&self.socket).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        writeln!(socket, "CONNECT {}", ports::STREAM).unwrap();
        let mut byte = [0];
        while byte[0] != b'\n' {
            socket.read_exact(&mut byte).unwrap();
        }
        socket.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        match socket.read_to_end(&mut answer) {
            Ok(_) => answer,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => answer,
            Err(e) => panic!("the agent does not close the connection: {e}; it sent {answer:?}"),
        }
    }

    /// Opens a stream and gives the error that the agent must answer with.
    pub fn open_fails(&self, open: &stream::Open, offset: u64) -> stream::Error {
        let body = open.write_to_bytes().unwrap();
        let header = Header { len: body.len() as u32, ..Header::new(Kind::Open, offset) };
        let answer = self.exchange(&[&header.encode()[..], &body].concat());
        assert!(answer.len() >= HEADER_LEN, "no ERROR frame but {answer:?}");
        let header = Header::decode(answer[..HEADER_LEN].try_into().unwrap()).unwrap();
        assert_eq!(header.kind, Kind::Error, "{header:?}");
        stream::Error::parse_from_bytes(&answer[HEADER_LEN..]).unwrap()
    }
}

/// The hybrid vsock socket of the sandbox of container `id`.
pub fn socket(lab: &Lab, id: &str) -> PathBuf {
    lab.run_dir().join(lab.key(id)).join("vsock/vm.vsock")
}
