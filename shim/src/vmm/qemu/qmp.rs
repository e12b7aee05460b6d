//! QMP, QEMU's control protocol: JSON objects, one a line. See QEMU's `docs/interop/qmp-spec.rst`.

use std::{io, path::Path};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::super::{VmmError, machine::EndReason};

/// The longest line that is read; QEMU's answers to what we ask have less than a kilobyte.
const LINE_MAX: u64 = 1 << 20;

/// A connection on which QEMU takes commands.
pub(super) struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    reason: EndReason,
}

impl Qmp {
    /// Does the handshake on a connection that QEMU has opened. Why the VM ends goes to `reason`.
    pub(super) async fn negotiate(
        stream: UnixStream,
        path: &Path,
        reason: EndReason,
    ) -> Result<Qmp, VmmError> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Qmp { reader: BufReader::new(reader), writer, reason };
        let io = |source| VmmError::Io { action: "cannot speak QMP on", path: path.into(), source };
        let greeting = qmp.read().await.map_err(io)?;
        if greeting.get("QMP").is_none() {
            return Err(refused("the QMP greeting", &greeting));
        }
        qmp.execute("qmp_capabilities", path).await?;
        Ok(qmp)
    }

    /// Sends a command and awaits its answer. Events that come before it are handled.
    pub(super) async fn execute(&mut self, command: &str, path: &Path) -> Result<Value, VmmError> {
        let io = |source| VmmError::Io { action: "cannot speak QMP on", path: path.into(), source };
        let request = json!({"execute": command}).to_string() + "\n";
        self.writer.write_all(request.as_bytes()).await.map_err(io)?;
        loop {
            let mut reply = self.read().await.map_err(io)?;
            if self.is_event(&reply) {
                continue;
            }
            return match reply.get_mut("return") {
                Some(value) => Ok(value.take()),
                None => Err(refused(command, &reply)),
            };
        }
    }

    /// Follows events until QEMU closes, which it does when it ends.
    pub(super) async fn follow(mut self) {
        while let Ok(message) = self.read().await {
            self.is_event(&message);
        }
    }

    /// Handles `message` if it is an event.
    ///
    /// SHUTDOWN precedes every orderly end. A guest that panics restarts (`panic=-1`), and QEMU takes
    /// that for an end (`-no-reboot`) with exit status 0: only the event's reason tells them apart.
    fn is_event(&self, message: &Value) -> bool {
        let Some(event) = message.get("event").and_then(Value::as_str) else { return false };
        let reason = message.pointer("/data/reason").and_then(Value::as_str).unwrap_or("unknown");
        match (event, reason) {
            ("SHUTDOWN", "guest-shutdown") => {}
            ("SHUTDOWN", "guest-reset" | "guest-panic") => {
                self.reason.set("the guest restarted, which it does when its kernel panics or its init ends");
            }
            ("SHUTDOWN", other) => self.reason.set(format!("QEMU was told to end ({other})")),
            _ => tracing::debug!(event, "QMP"),
        }
        true
    }

    async fn read(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        (&mut self.reader).take(LINE_MAX).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_slice(&line).map_err(io::Error::from)
    }
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

    async fn with_script(script: &'static str) -> Result<(Value, EndReason), VmmError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(script.as_bytes()).await.unwrap();
        let reason = EndReason::default();
        let path = Path::new("/qmp.sock");
        let mut qmp = Qmp::negotiate(ours, path, reason.clone()).await?;
        let value = qmp.execute("query-status", path).await?;
        drop(theirs);
        qmp.follow().await;
        Ok((value, reason))
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\n{\"return\": {}}\n";

    #[tokio::test]
    async fn events_may_come_between_a_command_and_its_answer() {
        let script = "{\"QMP\": {}}\n{\"event\": \"RESUME\"}\n{\"return\": {}}\n{\"event\": \"X\"}\n{\"return\": {\"running\": true}}\n";
        let (value, reason) = with_script(script).await.unwrap();
        assert_eq!(value["running"], true);
        assert!(format!("{reason:?}").contains("None"));
    }

    #[tokio::test]
    async fn a_restart_is_told_from_a_power_off() {
        for (reason, abnormal) in [("guest-shutdown", false), ("guest-reset", true), ("host-signal", true)] {
            let script = format!(
                "{GREETING}{{\"return\": {{}}}}\n{{\"event\": \"SHUTDOWN\", \"data\": {{\"reason\": \"{reason}\"}}}}\n"
            );
            let (_, found) = with_script(script.leak()).await.unwrap();
            assert_eq!(!format!("{found:?}").contains("None"), abnormal, "{reason}: {found:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_carries_the_command_and_the_text() {
        let script = "{\"QMP\": {}}\n{\"return\": {}}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n";
        let error = with_script(script).await.err().unwrap().to_string();
        assert_eq!(error, "QEMU refused query-status: no such thing");
    }

    #[tokio::test]
    async fn a_peer_that_does_not_speak_qmp_is_an_error() {
        assert!(matches!(with_script("SSH-2.0-OpenSSH\n").await, Err(VmmError::Io { .. })));
        assert!(matches!(with_script("{}\n").await, Err(VmmError::Refused { .. })));
    }
}
