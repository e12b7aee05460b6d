//! A connection to the agent, and Hello on it.

use std::time::Duration;

use containerd_shim_protos::shim_async::TaskClient;
use cube_protocol::{
    guest::{HelloRequest, HelloResponse},
    guest_ttrpc::GuestClient,
    ports, version,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
};

use super::{AgentError, Dial, bounded::Bounded};

/// Time for one attempt to connect. A guest whose agent does not listen yet may not answer at all.
const DIAL_ATTEMPT: Duration = Duration::from_secs(2);

/// Shortest and longest pause between two attempts.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// A pause is this part of the time that has been waited already: no guest is found later than it has to
/// be by more than that. Pauses that double would find some after twice the time.
const BACKOFF_SHARE: u32 = 8;

/// Time for Hello; an emulated guest is slow right after boot.
pub(super) const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// The services behind one connection.
#[derive(Clone)]
pub struct Clients {
    /// containerd's Task API, served by the agent.
    pub task: TaskClient,
    /// `cube.agent.v1.Guest`.
    pub guest: GuestClient,
}

/// Connects and says Hello, trying again for at most `limit`.
pub(super) async fn connect(
    dial: &dyn Dial,
    limit: Duration,
) -> Result<(Clients, HelloResponse), AgentError> {
    let begin = Instant::now();
    let deadline = begin + limit;
    let mut last = None;
    loop {
        match timeout_at(deadline, attempt(dial)).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(e)) if e.is_final() => return Err(e),
            Ok(Err(e)) => last = Some(Box::new(e)),
            Err(_) => return Err(AgentError::Unreachable { limit, source: last }),
        }
        sleep((begin.elapsed() / BACKOFF_SHARE).clamp(BACKOFF.0, BACKOFF.1)).await;
    }
}

async fn attempt(dial: &dyn Dial) -> Result<(Clients, HelloResponse), AgentError> {
    let limit = DIAL_ATTEMPT;
    let stream = timeout(limit, dial.dial(ports::CONTROL))
        .await
        .map_err(|_| AgentError::Deadline { call: "CONNECT", limit })??;
    let client = Client::new(Socket::new(Bounded::new(stream)));
    let clients = Clients { task: TaskClient::new(client.clone()), guest: GuestClient::new(client) };
    let request = HelloRequest {
        protocol: Some(version::CURRENT.into()).into(),
        shim_version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    };
    let call = "Hello";
    let hello =
        clients.guest.hello(context::with_duration(HELLO_LIMIT), &request).await.map_err(|e| match e {
            ttrpc::Error::RpcStatus(status) => AgentError::refused(call, status),
            source => AgentError::Transport { call, source },
        })?;
    version::Version::from(hello.protocol.get_or_default()).check()?;
    Ok((clients, hello))
}
