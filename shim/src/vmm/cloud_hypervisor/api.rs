//! Cloud Hypervisor's REST API: HTTP/1.1 on a Unix socket.
//!
//! A client of our own, for it is smaller than the glue that hyper would need: the server sends
//! every body with its length, never in chunks, and one request at a time is all that is asked.

use std::{io, path::PathBuf, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};

use super::super::VmmError;

/// Most bytes of a reply's head, and of its body. The longest that is read is an error's text.
const HEAD_MAX: u64 = 16 << 10;
const BODY_MAX: u64 = 1 << 20;

/// The API behind one socket.
#[derive(Debug, Clone)]
pub(super) struct Api {
    socket: PathBuf,
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    status: u16,
    body: String,
}

impl Api {
    pub(super) fn new(socket: PathBuf) -> Api {
        Api { socket }
    }

    /// `PUT /api/v1/<path>`, each on a connection of its own. Any status but 2xx is an error.
    pub(super) async fn put(
        &self,
        path: &'static str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<(), VmmError> {
        self.request("PUT", path, body, limit).await.map(drop)
    }

    /// `GET /api/v1/<path>`, and what it answers.
    pub(super) async fn get(&self, path: &'static str, limit: Duration) -> Result<Value, VmmError> {
        let body = self.request("GET", path, None, limit).await?;
        serde_json::from_str(&body).map_err(|e| self.no_answer(e.into()))
    }

    async fn request(
        &self,
        method: &str,
        path: &'static str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<String, VmmError> {
        let reply = match timeout(limit, self.exchange(method, path, body)).await {
            Ok(reply) => reply.map_err(|e| self.no_answer(e))?,
            Err(_) => return Err(VmmError::Timeout { what: path, limit }),
        };
        match reply.status {
            200..300 => Ok(reply.body),
            status => Err(VmmError::Refused {
                program: "Cloud Hypervisor",
                request: path.into(),
                reply: format!("{status}: {}", error_text(&reply.body)),
            }),
        }
    }

    fn no_answer(&self, source: io::Error) -> VmmError {
        VmmError::Io { action: "no answer from Cloud Hypervisor on", path: self.socket.clone(), source }
    }

    async fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> io::Result<Reply> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).await?;
        read_reply(BufReader::new(stream)).await
    }
}

async fn read_reply(mut stream: BufReader<UnixStream>) -> io::Result<Reply> {
    let malformed =
        |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("malformed reply: {what}"));
    let mut head = (&mut stream).take(HEAD_MAX);
    let mut line = String::new();
    head.read_line(&mut line).await?;
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    let status = status.ok_or_else(|| malformed(&line))?;
    let mut length = 0;
    loop {
        line.clear();
        head.read_line(&mut line).await?;
        if !line.ends_with('\n') {
            return Err(malformed("the head does not end"));
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(|_| malformed(&line))?;
        }
    }
    if length > BODY_MAX {
        return Err(malformed("the body is too long"));
    }
    let mut body = Vec::new();
    stream.take(length).read_to_end(&mut body).await?;
    match body.len() as u64 == length {
        true => Ok(Reply { status, body: String::from_utf8_lossy(&body).into_owned() }),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Errors come as a JSON list, the outermost first.
fn error_text(body: &str) -> String {
    match serde_json::from_str::<Vec<String>>(body) {
        Ok(chain) => chain.join(": "),
        Err(_) => body.trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Answers one request with `reply`, and gives what was asked and the result.
    async fn put(reply: &'static str, body: Option<Value>) -> (String, Result<(), VmmError>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let count = stream.read(&mut request).await.unwrap();
            stream.write_all(reply.as_bytes()).await.unwrap();
            String::from_utf8(request[..count].to_vec()).unwrap()
        });
        let result = Api::new(path).put("vm.create", body.as_ref(), LIMIT).await;
        (server.await.unwrap(), result)
    }

    #[tokio::test]
    async fn a_request_carries_its_json_and_204_is_success() {
        let reply = "HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n";
        let (request, result) = put(reply, Some(serde_json::json!({"a": 1}))).await;
        result.unwrap();
        assert!(request.starts_with("PUT /api/v1/vm.create HTTP/1.1\r\n"), "{request}");
        assert!(
            request.contains("Content-Length: 7\r\n") && request.ends_with("\r\n\r\n{\"a\":1}"),
            "{request}"
        );
    }

    #[tokio::test]
    async fn a_refusal_carries_the_request_and_the_whole_chain() {
        let reply = "HTTP/1.1 500 \r\ncontent-length: 32\r\n\r\n[\"cannot create\",\"no such file\"]";
        let error = put(reply, None).await.1.unwrap_err().to_string();
        assert_eq!(error, "Cloud Hypervisor refused vm.create: 500: cannot create: no such file");
    }

    #[tokio::test]
    async fn nonsense_and_a_cut_reply_are_errors() {
        for reply in
            ["", "hello\r\n\r\n", "HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nabc", "HTTP/1.1 200 \r\nX: y"]
        {
            let result = put(reply, None).await.1;
            assert!(matches!(result, Err(VmmError::Io { .. })), "{reply:?}: {result:?}");
        }
    }

    #[tokio::test]
    async fn a_body_beyond_all_measure_is_not_read() {
        let result = put("HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n", None).await.1;
        assert!(matches!(result, Err(VmmError::Io { .. })), "{result:?}");
    }
}
