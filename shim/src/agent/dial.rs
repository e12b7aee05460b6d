//! Opening connections to the guest.

use std::{
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use cube_protocol::hybrid::{self, HandshakeError};
use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use tokio::{net::UnixStream, time::timeout};

/// How long a handshake goes on that nobody waits for any more.
const ABANDONED_LIMIT: Duration = Duration::from_secs(30);

/// Opens connections to the agent of one sandbox.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// One attempt to connect to `port` ([`cube_protocol::ports`]) of the guest, handshake included.
    ///
    /// Has no time limit of its own: the caller bounds every attempt and retries, for a guest that
    /// does not listen yet answers with an error, with an early end, or not at all.
    async fn dial(&self, port: u32) -> Result<UnixStream, DialError>;
}

/// Why a connection to the guest could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The VMM's socket does not accept.
    #[error("cannot connect to the vsock socket {path}")]
    Connect {
        /// The VMM's Unix socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The VMM accepted but did not connect us to the guest.
    #[error("cannot connect to port {port} of the guest")]
    Handshake {
        /// The vsock port.
        port: u32,
        /// Why.
        source: HandshakeError,
    },
}

/// [`Dial`] over a hybrid vsock socket: Cloud Hypervisor's, vhost-device-vsock's, or that of an
/// agent on the `process` backend.
#[derive(Debug, Clone)]
pub struct HybridVsock {
    path: PathBuf,
}

impl HybridVsock {
    /// Dials through the socket at `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        HybridVsock { path: path.into() }
    }
}

#[async_trait]
impl Dial for HybridVsock {
    async fn dial(&self, port: u32) -> Result<UnixStream, DialError> {
        // A task, which goes on when the caller gives up: vhost-device-vsock (0.3.0) does not survive a
        // socket that is closed before it has written `OK` there, and no byte ever gets through again.
        let dialing = tokio::spawn(timeout(ABANDONED_LIMIT, connect(self.path.clone(), port)));
        let ended = |kind| DialError::Handshake { port, source: HandshakeError::Io(io::Error::from(kind)) };
        match dialing.await {
            Ok(Ok(connected)) => connected,
            Ok(Err(_elapsed)) => Err(ended(io::ErrorKind::TimedOut)),
            // The runtime is shutting down.
            Err(_) => Err(ended(io::ErrorKind::Interrupted)),
        }
    }
}

async fn connect(path: PathBuf, port: u32) -> Result<UnixStream, DialError> {
    let connected = connect_to_itself(&path).await;
    let mut socket = connected.map_err(|source| DialError::Connect { path, source })?;
    hybrid::connect(&mut socket, port).await.map_err(|source| DialError::Handshake { port, source })?;
    Ok(socket)
}

/// Connects to the socket at `path`, and to no other that a link there leads to: the directory is the VMM's, and
/// this process is root.
async fn connect_to_itself(path: &Path) -> io::Result<UnixStream> {
    let socket = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_link_to_another_socket_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("vm.vsock"), dir.path().join("other"));
        let listener = UnixListener::bind(&other).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let refused = HybridVsock::new(&path).dial(1024).await;
        assert!(matches!(&refused, Err(DialError::Connect { .. })), "{refused:?}");
        let nobody = timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(nobody.is_err(), "somebody connected");
    }

    #[tokio::test]
    async fn the_connection_begins_right_behind_the_handshake() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let port = hybrid::requested_port(&mut socket).await.unwrap();
            socket.write_all(b"OK 1\nhello").await.unwrap();
            port
        });
        let mut connection = HybridVsock::new(&path).dial(1025).await.unwrap();
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).await.unwrap();
        assert_eq!((bytes.as_slice(), vmm.await.unwrap()), (&b"hello"[..], 1025));
    }

    #[tokio::test]
    async fn a_handshake_that_nobody_waits_for_is_not_broken_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let dial = HybridVsock::new(&path);
        let vmm = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            hybrid::requested_port(&mut socket).await.unwrap();
            socket
        };
        let mut socket = tokio::select! {
            socket = vmm => socket,
            _ = dial.dial(1025) => unreachable!("it is not answered"),
        };
        let mut byte = [0];
        let closed = timeout(Duration::from_millis(20), socket.read(&mut byte)).await;
        assert!(closed.is_err(), "before the answer");
        socket.write_all(b"OK 1\n").await.unwrap();
        assert_eq!(socket.read(&mut byte).await.unwrap(), 0, "after it");
    }

    #[tokio::test]
    async fn a_vmm_that_is_not_there_and_a_guest_that_does_not_listen_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vsock");
        let dial = HybridVsock::new(&path);
        assert!(
            matches!(dial.dial(1024).await, Err(DialError::Connect { path: named, .. }) if named == path)
        );
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move { drop(listener.accept().await) });
        assert!(matches!(dial.dial(1024).await, Err(DialError::Handshake { port: 1024, .. })));
    }
}
