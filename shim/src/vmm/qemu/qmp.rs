//! QMP, QEMU's control protocol: JSON objects, one a line. See QEMU's `docs/interop/qmp-spec.rst`.

use std::{io, path::PathBuf, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, mpsc},
    task::JoinHandle,
    time::timeout,
};

use super::super::{
    VmmError,
    machine::{CONTROL_LIMIT, EndReason},
};

/// The longest line that is read; QEMU's answers to what we ask have less than a kilobyte.
const LINE_MAX: u64 = 1 << 20;

/// Answers that may wait for whoever asked; one is asked at a time.
const ANSWERS: usize = 8;

/// A connection on which QEMU takes commands.
pub(super) struct Qmp {
    path: PathBuf,
    exchange: Mutex<Exchange>,
}

/// Who holds it asks.
struct Exchange {
    writer: OwnedWriteHalf,
    /// What QEMU says that is no event.
    answers: mpsc::Receiver<Value>,
    /// Tells the answer to this command from a late one to a command that was given up.
    id: u64,
}

impl Qmp {
    /// Does the handshake on a connection that QEMU has opened. The task follows QEMU's events until
    /// it ends; why it ends goes to `reason`.
    pub(super) async fn negotiate(
        stream: UnixStream,
        path: PathBuf,
        reason: EndReason,
    ) -> Result<(Qmp, JoinHandle<()>), VmmError> {
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = read(&mut reader).await;
        let io = |source| VmmError::Io { action: "cannot speak QMP on", path: path.clone(), source };
        let greeting = greeting.map_err(io)?;
        if greeting.get("QMP").is_none() {
            return Err(refused("the QMP greeting", &greeting));
        }
        let (sender, answers) = mpsc::channel(ANSWERS);
        let events = tokio::spawn(follow(reader, sender, reason));
        let qmp = Qmp { path, exchange: Mutex::new(Exchange { writer, answers, id: 0 }) };
        qmp.execute("qmp_capabilities", Value::Null, CONTROL_LIMIT).await?;
        Ok((qmp, events))
    }

    /// Sends a command and awaits its answer. Commands without arguments take `null`.
    pub(super) async fn execute(
        &self,
        command: &'static str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        let exchange = async {
            let mut exchange = self.exchange.lock().await;
            exchange.execute(command, arguments).await
        };
        let answer = timeout(limit, exchange).await;
        let mut answer =
            answer.map_err(|_| VmmError::Timeout { what: command, limit })?.map_err(|source| {
                VmmError::Io { action: "cannot speak QMP on", path: self.path.clone(), source }
            })?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(refused(command, &answer)),
        }
    }
}

impl Exchange {
    async fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        self.id += 1;
        let mut request = json!({"execute": command, "id": self.id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.writer.write_all((request.to_string() + "\n").as_bytes()).await?;
        loop {
            let answer = self.answers.recv().await.ok_or(io::ErrorKind::UnexpectedEof)?;
            if answer.get("id").and_then(Value::as_u64) == Some(self.id) {
                return Ok(answer);
            }
        }
    }
}

/// Reads until QEMU closes, which it does when it ends.
async fn follow(mut reader: BufReader<OwnedReadHalf>, answers: mpsc::Sender<Value>, reason: EndReason) {
    while let Ok(message) = read(&mut reader).await {
        if !is_event(&message, &reason) {
            // Full: answers to nobody's questions.
            let _ = answers.try_send(message);
        }
    }
}

/// Handles `message` if it is an event.
///
/// SHUTDOWN precedes every orderly end. A guest that panics restarts (`panic=-1`), and QEMU takes
/// that for an end (`-no-reboot`) with exit status 0: only the event's reason tells them apart.
fn is_event(message: &Value, reason: &EndReason) -> bool {
    let Some(event) = message.get("event").and_then(Value::as_str) else { return false };
    let why = message.pointer("/data/reason").and_then(Value::as_str).unwrap_or("unknown");
    match (event, why) {
        ("SHUTDOWN", "guest-shutdown") => {}
        ("SHUTDOWN", "guest-reset" | "guest-panic") => {
            reason.set("the guest restarted, which it does when its kernel panics or its init ends");
        }
        ("SHUTDOWN", other) => reason.set(format!("QEMU was told to end ({other})")),
        _ => tracing::debug!(event, "QMP"),
    }
    true
}

async fn read(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Value> {
    let mut line = Vec::new();
    reader.take(LINE_MAX).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(io::Error::from)
}

fn refused(request: &str, reply: &Value) -> VmmError {
    let description = reply.pointer("/error/desc").and_then(Value::as_str).map(str::to_owned);
    VmmError::Refused {
        program: "QEMU",
        request: request.into(),
        reply: description.unwrap_or_else(|| reply.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each line with the next of `script`; an empty line stands for no answer.
    async fn with_script<const N: usize>(script: [&str; N]) -> Result<(Value, EndReason), VmmError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let script = script.map(str::to_owned);
        let peer = tokio::spawn(async move {
            let (reader, mut writer) = theirs.into_split();
            let mut requests = BufReader::new(reader).lines();
            for answer in script {
                writer.write_all(answer.as_bytes()).await.unwrap();
                // The end of a script is the end of QEMU.
                if answer.ends_with('\n') && requests.next_line().await.unwrap().is_none() {
                    break;
                }
            }
        });
        let reason = EndReason::default();
        let (qmp, events) = Qmp::negotiate(ours, "/qmp.sock".into(), reason.clone()).await?;
        let value = qmp.execute("query-status", Value::Null, CONTROL_LIMIT).await?;
        drop(qmp);
        peer.await.unwrap();
        events.await.unwrap();
        Ok((value, reason))
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\n";
    const CAPABLE: &str = "{\"return\": {}, \"id\": 1}\n";

    #[tokio::test]
    async fn events_and_late_answers_may_come_between_a_command_and_its_answer() {
        let (value, reason) = with_script([
            GREETING,
            "{\"event\": \"RESUME\"}\r\n{\"return\": {}, \"id\": 1}\n",
            "{\"event\": \"X\"}\r\n{\"return\": {}, \"id\": 1}\r\n{\"return\": {\"running\": true}, \"id\": 2}\n",
        ])
        .await
        .unwrap();
        assert_eq!(value["running"], true);
        assert!(format!("{reason:?}").contains("None"));
    }

    #[tokio::test]
    async fn a_restart_is_told_from_a_power_off() {
        for (reason, abnormal) in [("guest-shutdown", false), ("guest-reset", true), ("host-signal", true)] {
            let end = format!(
                "{{\"return\": {{}}, \"id\": 2}}\n{{\"event\": \"SHUTDOWN\", \"data\": {{\"reason\": \"{reason}\"}}}}\n"
            );
            let (_, found) = with_script([GREETING, CAPABLE, &end]).await.unwrap();
            assert_eq!(!format!("{found:?}").contains("None"), abnormal, "{reason}: {found:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_carries_the_command_and_the_text() {
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": 2}\n";
        let error = with_script([GREETING, CAPABLE, refusal]).await.err().unwrap().to_string();
        assert_eq!(error, "QEMU refused query-status: no such thing");
    }

    #[tokio::test]
    async fn a_peer_that_does_not_speak_qmp_is_an_error() {
        assert!(matches!(with_script(["SSH-2.0-OpenSSH\n"]).await, Err(VmmError::Io { .. })));
        assert!(matches!(with_script(["{}\n"]).await, Err(VmmError::Refused { .. })));
    }
}
