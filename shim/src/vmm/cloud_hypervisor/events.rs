//! Cloud Hypervisor's event monitor: JSON objects on a pipe, one after the other.
//!
//! It is how a restart of the guest is noticed. A guest whose kernel panics restarts (`panic=-1`),
//! and Cloud Hypervisor would boot it anew, with none of the sandbox's containers in it.

use std::os::fd::OwnedFd;

use serde::Deserialize;
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, task::spawn_blocking};

use super::super::{
    VmmError,
    machine::{EndReason, KILL_LIMIT},
};
use crate::cgroup::SandboxCgroup;

/// An event has some hundred bytes; what does not parse within this is given up.
const BUFFER_MAX: usize = 64 << 10;

#[derive(Debug, Deserialize)]
struct Event {
    source: String,
    event: String,
}

/// A pipe: its end for the shim, and the one to pass on.
pub(super) fn pipe() -> Result<(Receiver, OwnedFd), VmmError> {
    let io = |source| VmmError::Io { action: "cannot make", path: "a pipe".into(), source };
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| io(e.into()))?;
    Ok((Receiver::from_owned_fd(read).map_err(io)?, write))
}

/// Follows events until the VMM ends, and ends it when the guest restarts.
pub(super) async fn follow(mut pipe: Receiver, reason: EndReason, cgroup: SandboxCgroup) {
    let mut buffer = Vec::new();
    while let Ok(1..) = pipe.read_buf(&mut buffer).await {
        for event in take_events(&mut buffer) {
            tracing::debug!(source = event.source, event = event.event, "Cloud Hypervisor");
            if (event.source.as_str(), event.event.as_str()) == ("vm", "rebooting") {
                reason.set("the guest restarted, which it does when its kernel panics or its init ends");
                let cgroup = cgroup.clone();
                let killed = spawn_blocking(move || cgroup.kill(KILL_LIMIT)).await;
                if !matches!(killed, Ok(Ok(()))) {
                    tracing::error!(?killed, "a VM whose guest restarted was not killed");
                }
            }
        }
        if buffer.len() > BUFFER_MAX {
            return;
        }
    }
}

/// Takes the complete events off the front.
fn take_events(buffer: &mut Vec<u8>) -> Vec<Event> {
    let mut stream = serde_json::Deserializer::from_slice(buffer).into_iter::<Event>();
    let events = stream.by_ref().map_while(Result::ok).collect();
    let taken = stream.byte_offset();
    buffer.drain(..taken);
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_may_be_cut_anywhere() {
        let text = b"{\n \"timestamp\": {\"secs\": 0}, \"source\": \"vm\",\n \"event\": \"booting\", \"properties\": null\n}\n\n\
            {\"source\": \"vm\", \"event\": \"rebooting\"}\n\n";
        let mut buffer = Vec::new();
        let mut seen = Vec::new();
        for byte in text {
            buffer.push(*byte);
            seen.extend(take_events(&mut buffer).into_iter().map(|e| e.event));
        }
        assert_eq!(seen, ["booting", "rebooting"]);
    }
}
