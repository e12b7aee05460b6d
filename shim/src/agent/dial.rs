//! Opening connections to the guest.

use std::path::PathBuf;

use async_trait::async_trait;
use cube_protocol::hybrid::{self, HandshakeError};
use tokio::net::UnixStream;

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
        let mut socket = UnixStream::connect(&self.path)
            .await
            .map_err(|source| DialError::Connect { path: self.path.clone(), source })?;
        hybrid::connect(&mut socket, port).await.map_err(|source| DialError::Handshake { port, source })?;
        Ok(socket)
    }
}
