//! The handshake of hybrid vsock: `CONNECT <port>\n` from the host, `OK <n>\n` from the VMM.
//!
//! Defined by Firecracker, spoken by Cloud Hypervisor and by vhost-device-vsock on the Unix socket
//! of a VM. The bytes after the newline belong to the connection, so both sides read the line byte
//! by byte: a buffered reader would swallow what follows.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest line either side may send, without the newline. The longest that is valid,
/// `CONNECT 4294967295`, has 18 bytes.
const LINE_MAX: usize = 32;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer closed first. With Cloud Hypervisor: the guest does not listen on the port yet.
    #[error("the peer closed the connection during the vsock handshake")]
    Closed,
    /// The peer sent something else.
    #[error("expected a line \"{expected}\" in the vsock handshake, got {got:?}")]
    Unexpected {
        /// What should have come.
        expected: &'static str,
        /// What came, cut after [`LINE_MAX`] bytes.
        got: String,
    },
    /// Reading or writing failed.
    #[error("vsock handshake")]
    Io(#[from] io::Error),
}

/// Asks the VMM behind `socket` for the guest's `port`. On success `socket` is the connection.
///
/// Has no time limit of its own: before the guest listens, Cloud Hypervisor may not answer at all.
pub async fn connect<S>(socket: &mut S, port: u32) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    const EXPECTED: &str = "OK <number>";
    socket.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let line = read_line(socket, EXPECTED).await?;
    match line.strip_prefix("OK ").map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(()),
        _ => Err(HandshakeError::Unexpected { expected: EXPECTED, got: line }),
    }
}

/// The other end of [`connect`], for the `process` backend: reads the port that the host wants.
/// The caller answers with [`accept`] or closes.
pub async fn requested_port<S>(socket: &mut S) -> Result<u32, HandshakeError>
where
    S: AsyncRead + Unpin,
{
    const EXPECTED: &str = "CONNECT <port>";
    let line = read_line(socket, EXPECTED).await?;
    match line.strip_prefix("CONNECT ").map(str::parse::<u32>) {
        Some(Ok(port)) => Ok(port),
        _ => Err(HandshakeError::Unexpected { expected: EXPECTED, got: line }),
    }
}

/// Tells the host that it is connected; `number` only has to be a number.
pub async fn accept<S>(socket: &mut S, number: u32) -> Result<(), HandshakeError>
where
    S: AsyncWrite + Unpin,
{
    Ok(socket.write_all(format!("OK {number}\n").as_bytes()).await?)
}

async fn read_line<S>(socket: &mut S, expected: &'static str) -> Result<String, HandshakeError>
where
    S: AsyncRead + Unpin,
{
    let mut line = Vec::with_capacity(LINE_MAX);
    let text = |line: &[u8]| String::from_utf8_lossy(line).into_owned();
    loop {
        let mut byte = [0];
        if socket.read(&mut byte).await? == 0 {
            return Err(HandshakeError::Closed);
        }
        if byte[0] == b'\n' {
            return Ok(text(&line));
        }
        if line.len() == LINE_MAX {
            return Err(HandshakeError::Unexpected { expected, got: text(&line) });
        }
        line.push(byte[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_after_the_handshake_are_left_on_the_socket() {
        let (mut host, mut vmm) = tokio::io::duplex(256);
        vmm.write_all(b"OK 1073741824\nfirst bytes").await.unwrap();
        connect(&mut host, 1024).await.unwrap();
        let mut rest = [0; 11];
        host.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"first bytes");
        assert_eq!(requested_port(&mut vmm).await.unwrap(), 1024);
    }

    #[tokio::test]
    async fn a_vmm_that_closes_is_told_apart_from_one_that_talks_nonsense() {
        let (mut host, vmm) = tokio::io::duplex(256);
        drop(vmm);
        let closed = connect(&mut host, 1024).await;
        assert!(matches!(closed, Err(HandshakeError::Closed | HandshakeError::Io(_))), "{closed:?}");

        for nonsense in ["OK\n", "OK x\n", "HTTP/1.1 400 Bad Request\n", &"O".repeat(1000)] {
            let (mut host, mut vmm) = tokio::io::duplex(2048);
            vmm.write_all(nonsense.as_bytes()).await.unwrap();
            let result = connect(&mut host, 1024).await;
            assert!(matches!(result, Err(HandshakeError::Unexpected { .. })), "{nonsense:?}: {result:?}");
        }
    }

    #[tokio::test]
    async fn a_port_beyond_32_bits_is_refused() {
        let (mut vmm, mut host) = tokio::io::duplex(256);
        host.write_all(b"CONNECT 4294967296\n").await.unwrap();
        assert!(matches!(requested_port(&mut vmm).await, Err(HandshakeError::Unexpected { .. })));
    }
}
