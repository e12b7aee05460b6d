//! One GET by HTTP/1.1, of whose answer only the status matters.

use std::{io, net::SocketAddr};

use httparse::{EMPTY_HEADER, Response, Status};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest path that is asked for, in bytes.
pub(super) const PATH_MAX: usize = 4096;

/// Longest head of an answer, with the interim ones before it, and the most headers in it.
const HEAD_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 100;

/// Asks the server behind `stream` for `path`, and gives the status of its answer. Takes as long as the
/// server likes, but not more than [`HEAD_MAX`] of memory.
pub(super) async fn status<S>(mut stream: S, address: SocketAddr, path: &str) -> io::Result<u16>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let version = env!("CARGO_PKG_VERSION");
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: cube-agent/{version}\r\n\
         Accept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let (mut head, mut taken) = (Vec::with_capacity(512), 0);
    loop {
        if let Some(status) = final_status(&mut head)? {
            return Ok(status);
        }
        let room = HEAD_MAX - taken;
        if room == 0 {
            return Err(io::Error::other("the head of the HTTP response is longer than 16 KiB"));
        }
        let length = (&mut stream).take(room as u64).read_buf(&mut head).await?;
        if length == 0 {
            return Err(io::Error::other("the connection ended before an HTTP response"));
        }
        taken += length;
    }
}

/// The status in `head`, once the head is complete. Interim answers (1xx) are taken out of it.
fn final_status(head: &mut Vec<u8>) -> io::Result<Option<u16>> {
    loop {
        let mut headers = [EMPTY_HEADER; HEADERS_MAX];
        let mut response = Response::new(&mut headers);
        let parsed = response.parse(head).map_err(|error| io::Error::other(format!("no HTTP: {error}")))?;
        let (Status::Complete(len), Some(code)) = (parsed, response.code) else { return Ok(None) };
        if !(100..200).contains(&code) || code == 101 {
            return Ok(Some(code));
        }
        head.drain(..len);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{io::duplex, time::timeout};

    use super::*;

    fn address() -> SocketAddr {
        "127.0.0.1:8080".parse().unwrap()
    }

    /// What comes of a server that answers with these pieces, and then closes.
    async fn answered(pieces: &[&str]) -> Result<u16, String> {
        let (near, mut far) = duplex(1 << 20);
        let pieces: Vec<String> = pieces.iter().map(|piece| (*piece).to_owned()).collect();
        let server = tokio::spawn(async move {
            let mut request = vec![0; 4096];
            let length = far.read(&mut request).await.unwrap();
            for piece in pieces {
                // Whoever has heard enough hangs up.
                if far.write_all(piece.as_bytes()).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            String::from_utf8(request[..length].to_vec()).unwrap()
        });
        let status = status(near, address(), "/ready").await;
        let request = server.await.unwrap();
        assert!(request.starts_with("GET /ready HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n"), "{request}");
        status.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn the_status_is_read_however_the_head_is_cut() {
        let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno";
        let letters: Vec<&str> = head.split_inclusive(|_| true).collect();
        assert_eq!(answered(&letters).await, Ok(503));
        assert_eq!(answered(&[head]).await, Ok(503));
        assert_eq!(answered(&["HTTP/1.0 200 OK\r\n\r\n"]).await, Ok(200));
    }

    #[tokio::test]
    async fn an_interim_answer_is_not_the_answer() {
        assert_eq!(
            answered(&["HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No\r\n\r\n"]).await,
            Ok(204)
        );
        assert_eq!(answered(&["HTTP/1.1 101 Switching\r\n\r\n"]).await, Ok(101));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_named() {
        assert!(answered(&[]).await.unwrap_err().contains("ended before"));
        assert!(answered(&["HTTP/1.1 200 OK\r\n"]).await.unwrap_err().contains("ended before"));
        assert!(answered(&["SSH-2.0-OpenSSH_9.2\r\n"]).await.unwrap_err().contains("no HTTP"));
    }

    #[tokio::test]
    async fn a_head_without_end_costs_16_kib_and_no_more() {
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(1 << 20));
        assert!(answered(&[&long]).await.unwrap_err().contains("longer than 16 KiB"));
        let many = format!("HTTP/1.1 200 OK\r\n{}", "X: y\r\n".repeat(1000));
        assert!(answered(&[&many]).await.unwrap_err().contains("no HTTP: too many headers"));
        let interim = "HTTP/1.1 100 Continue\r\n\r\n".repeat(1 << 14);
        assert!(answered(&[&interim]).await.unwrap_err().contains("longer than 16 KiB"));
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_waited_for() {
        let (near, _far) = duplex(1 << 20);
        assert!(timeout(Duration::from_millis(50), status(near, address(), "/")).await.is_err());
    }
}
