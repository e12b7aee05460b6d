//! Accepting connections: vsock in a VM, a Unix socket on the `process` backend.
//!
//! Listeners live as long as the agent: whatever accept(2) answers is logged, and tried again.

use std::{io, sync::Arc, time::Duration};

use cube_protocol::{hybrid, ports};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use ttrpc::asynchronous::transport::Socket;

use super::{
    Refused,
    connection::{Connection, FIRST_BYTE_LIMIT},
};
use crate::stdio::Hub;

/// Cloud Hypervisor has at most 1,023 connections per VM. Control connections have a bound of their
/// own, so that no number of streams can shut the control port.
const CONTROL_MAX: usize = 16;
const STREAM_MAX: usize = 1_000;

/// A `CONNECT` on the `process` backend that is not finished.
const HANDSHAKE_MAX: usize = 64;

/// Pause after an accept that failed: EMFILE, for one, lasts until something is closed.
const RETRY: Duration = Duration::from_millis(100);

/// Where the host connects.
#[derive(Debug)]
pub enum Listener {
    /// Both ports on vsock, for the host only.
    Vsock,
    /// A Unix socket that speaks [`hybrid`]; non-blocking.
    Unix(std::os::unix::net::UnixListener),
}

/// Sorts connections by their port.
#[derive(Clone)]
struct Dispatcher {
    hub: Arc<Hub>,
    refused: Arc<Refused>,
    control: mpsc::Sender<Socket>,
    control_permits: Arc<Semaphore>,
    stream_permits: Arc<Semaphore>,
}

/// Accepts from now on. Gives the control connections; stream connections go to `hub`.
pub(super) fn start(
    listener: Listener,
    hub: Arc<Hub>,
    refused: Arc<Refused>,
) -> io::Result<mpsc::Receiver<Socket>> {
    let (control, connections) = mpsc::channel(CONTROL_MAX);
    let dispatcher = Dispatcher {
        hub,
        refused,
        control,
        control_permits: Arc::new(Semaphore::new(CONTROL_MAX)),
        stream_permits: Arc::new(Semaphore::new(STREAM_MAX)),
    };
    match listener {
        Listener::Vsock => {
            for port in [ports::CONTROL, ports::STREAM] {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
                tokio::spawn(serve_vsock(listener, port, dispatcher.clone()));
            }
        }
        Listener::Unix(listener) => {
            tokio::spawn(serve_unix(UnixListener::from_std(listener)?, dispatcher));
        }
    }
    Ok(connections)
}

async fn serve_vsock(listener: VsockListener, port: u32, dispatcher: Dispatcher) {
    loop {
        let (stream, peer) = accepted(|| listener.accept()).await;
        if peer.cid() == ports::HOST_CID {
            dispatcher.dispatch(stream, port);
        } else {
            // A process in the guest, through vsock loopback or its own context id.
            dispatcher.refuse(&format!("the peer has context id {}, it is not the host", peer.cid()));
        }
    }
}

async fn serve_unix(listener: UnixListener, dispatcher: Dispatcher) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKE_MAX));
    loop {
        let (stream, _) = accepted(|| listener.accept()).await;
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            dispatcher.refuse("too many unfinished handshakes");
            continue;
        };
        let dispatcher = dispatcher.clone();
        tokio::spawn(async move {
            match timeout(FIRST_BYTE_LIMIT, handshake(stream)).await {
                Ok(Ok((stream, port))) => dispatcher.dispatch(stream, port),
                Ok(Err(error)) => dispatcher.refuse(&crate::errors::chain(&error)),
                Err(_) => dispatcher.refuse("no CONNECT line came in time"),
            }
            drop(permit);
        });
    }
}

/// Accepts until it succeeds.
async fn accepted<T, F>(mut accept: impl FnMut() -> F) -> T
where
    F: Future<Output = io::Result<T>>,
{
    loop {
        match accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection, trying again: {error}");
                sleep(RETRY).await;
            }
        }
    }
}

/// A VMM closes a connection to a port on which the guest does not listen, without an `OK`.
async fn handshake(mut stream: UnixStream) -> Result<(UnixStream, u32), hybrid::HandshakeError> {
    let port = hybrid::requested_port(&mut stream).await?;
    if [ports::CONTROL, ports::STREAM].contains(&port) {
        hybrid::accept(&mut stream, port).await?;
    }
    Ok((stream, port))
}

impl Dispatcher {
    fn dispatch<S>(&self, stream: S, port: u32)
    where
        S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
    {
        let permits = match port {
            ports::CONTROL => &self.control_permits,
            ports::STREAM => &self.stream_permits,
            _ => return self.refuse(&format!("port {port} is neither control nor stream")),
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            return self.refuse(&format!("port {port} has as many connections as it may"));
        };
        let connection = Connection::new(stream, permit);
        if port == ports::STREAM {
            tokio::spawn(self.hub.clone().serve(connection));
        } else if self.control.try_send(Socket::new(connection)).is_err() {
            // Cannot be full: it has room for every permit.
            self.refuse("the control server has ended");
        }
    }

    /// A guest process can make as many connections as it likes: the log gets ever fewer lines.
    fn refuse(&self, reason: &str) {
        let count = self.refused.count();
        if count.is_power_of_two() {
            tracing::warn!(count, "refused a connection: {reason}");
        }
    }
}
