//! The control connection to the agent: ttrpc on port 1024.
//!
//! One task owns the connection. It says Hello on each new one, waits in Events for what happens in
//! the guest, and reconnects when the connection ends; since a call is always waiting there, the end
//! is noticed at once. Everybody else takes the current clients from it and never connects.

use std::{future::Future, sync::Arc, time::Duration};

use containerd_shim_protos::shim_async::TaskClient;
use cube_protocol::{
    guest::{EventsRequest, HelloRequest, HelloResponse, event},
    guest_ttrpc::GuestClient,
    ports, version,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{debug, warn};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};

use super::{Dial, DialError};
use crate::errors::chain;

/// Time for one attempt to connect. A guest whose agent does not listen yet may not answer at all.
const DIAL_ATTEMPT: Duration = Duration::from_secs(2);

/// Shortest and longest pause between two attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// A pause is this part of the time that has been waited already: no guest is found later than it has to
/// be by more than that. Pauses that double would find some after twice the time.
const BACKOFF_SHARE: u32 = 8;

/// Time for Hello; an emulated guest is slow right after boot.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// How long an Events call waits in the guest, and how much longer we wait for its answer.
const POLL: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// The services behind one connection.
#[derive(Clone)]
pub struct Clients {
    /// containerd's Task API, served by the agent.
    pub task: TaskClient,
    /// `cube.agent.v1.Guest`.
    pub guest: GuestClient,
}

/// What happens in the guest.
#[derive(Debug, Clone, PartialEq)]
pub enum GuestEvent {
    /// A process has exited.
    Exit(cube_protocol::guest::TaskExit),
    /// The kernel killed a process for want of memory.
    Oom(cube_protocol::guest::TaskOom),
    /// Another guest answers, or one that speaks another protocol: ours is gone. The last event.
    Lost(String),
}

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent could not be reached in time.
    #[error("the agent did not answer within {limit:?}; the last attempt failed")]
    Unreachable {
        /// How long was tried.
        limit: Duration,
        /// Why the last attempt failed, if any ended by itself.
        source: Option<Box<AgentError>>,
    },
    /// A connection could not be opened.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The agent refused a call; its code is passed on.
    #[error("{call} in the guest: {}", status.message())]
    Refused {
        /// Name of the method.
        call: &'static str,
        /// What the agent answered.
        status: ttrpc::Status,
    },
    /// The guest did not answer a call in time.
    #[error("the guest did not answer {call} within {limit:?}")]
    Deadline {
        /// Name of the method.
        call: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The connection ended during a call, whose effect is unknown.
    #[error("the connection to the guest was lost during {call}")]
    Transport {
        /// Name of the method.
        call: &'static str,
        /// Why.
        source: ttrpc::Error,
    },
    /// The agent speaks a protocol that we do not.
    #[error(transparent)]
    Version(#[from] version::Mismatch),
    /// Another guest is behind the same address.
    #[error("the guest has restarted: its boot id is {found:016x}, it was {expected:016x}")]
    OtherGuest {
        /// From the first Hello.
        expected: u64,
        /// From this Hello.
        found: u64,
    },
}

impl AgentError {
    /// Whether trying again cannot help.
    fn is_final(&self) -> bool {
        match self {
            AgentError::Version(_) | AgentError::OtherGuest { .. } => true,
            AgentError::Refused { status, .. } => status.code() == ttrpc::Code::FAILED_PRECONDITION,
            _ => false,
        }
    }
}

/// The agent of one sandbox. Clones share the connection.
#[derive(Clone)]
pub struct Agent {
    clients: watch::Receiver<Option<Clients>>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("connected", &self.clients.borrow().is_some()).finish()
    }
}

/// Owns the connection; becomes a task with [`Link::run`].
pub struct Link {
    dial: Arc<dyn Dial>,
    clients: watch::Sender<Option<Clients>>,
    boot_id: u64,
    timeline: u64,
}

impl Agent {
    /// Connects and says Hello, trying again for at most `limit`.
    ///
    /// # Errors
    ///
    /// At once for an agent of another protocol version, [`AgentError::Unreachable`] otherwise.
    pub async fn connect(
        dial: Arc<dyn Dial>,
        limit: Duration,
    ) -> Result<(Agent, Link, HelloResponse), AgentError> {
        let (clients, hello) = connect(&*dial, limit).await?;
        let (sender, receiver) = watch::channel(Some(clients));
        let link = Link { dial, clients: sender, boot_id: hello.boot_id, timeline: hello.timeline };
        Ok((Agent { clients: receiver }, link, hello))
    }

    /// Makes one call with a deadline of `limit`, waiting within it for a connection if there is none.
    ///
    /// The call runs in a task of its own: ttrpc closes the whole connection when a request is
    /// dropped while it is being written, and our caller may go away at any time.
    pub async fn call<F, R, T>(
        &self,
        call: &'static str,
        limit: Duration,
        request: F,
    ) -> Result<T, AgentError>
    where
        F: FnOnce(Clients, Context) -> R + Send + 'static,
        R: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let deadline = Instant::now() + limit;
        let clients = self.connected(deadline).await.ok_or(AgentError::Deadline { call, limit })?;
        let context = context::with_duration(limit);
        let answer = tokio::spawn(request(clients, context));
        match timeout_at(deadline, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(ttrpc::Error::RpcStatus(status)))) => Err(AgentError::Refused { call, status }),
            // ttrpc's own deadline races with ours, and has no code of its own.
            Ok(Ok(Err(_))) if Instant::now() >= deadline => Err(AgentError::Deadline { call, limit }),
            Ok(Ok(Err(source))) => Err(AgentError::Transport { call, source }),
            Ok(Err(panicked)) => {
                let source = ttrpc::Error::Others(panicked.to_string());
                Err(AgentError::Transport { call, source })
            }
            Err(_) => Err(AgentError::Deadline { call, limit }),
        }
    }

    async fn connected(&self, deadline: Instant) -> Option<Clients> {
        let mut clients = self.clients.clone();
        let found = timeout_at(deadline, clients.wait_for(Option::is_some)).await;
        found.ok()?.ok()?.clone()
    }
}

impl Link {
    /// Delivers the events of the guest to `events`, in order and each once, and keeps the connection
    /// up. Ends with [`GuestEvent::Lost`], or when `events` is dropped.
    pub fn run(self, events: mpsc::Sender<GuestEvent>) -> JoinHandle<()> {
        tokio::spawn(async move {
            if let Err(e) = self.follow(&events).await {
                // Nobody listens once the sandbox is gone.
                let _ = events.send(GuestEvent::Lost(chain(&e))).await;
            }
        })
    }

    async fn follow(&self, events: &mpsc::Sender<GuestEvent>) -> Result<(), AgentError> {
        let mut after = 0;
        loop {
            let clients = self.clients.borrow().clone();
            let clients = match clients {
                Some(clients) => clients,
                None => self.reconnect().await?,
            };
            let request = EventsRequest {
                after,
                timeout_ms: POLL.0.as_millis() as u32,
                timeline: self.timeline,
                ..Default::default()
            };
            match clients.guest.events(context::with_duration(POLL.0 + POLL.1), &request).await {
                Ok(answer) => {
                    for event in answer.events {
                        after = after.max(event.sequence);
                        let event = match event.kind {
                            Some(event::Kind::Exit(exit)) => GuestEvent::Exit(exit),
                            Some(event::Kind::Oom(oom)) => GuestEvent::Oom(oom),
                            _ => continue,
                        };
                        if events.send(event).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                Err(e) => {
                    debug!("the connection to the agent ended: {}", chain(&e));
                    // An agent that answers with an error at once must not make us spin.
                    sleep(BACKOFF.0).await;
                    self.clients.send_replace(None);
                }
            }
        }
    }

    /// Tries until it works: the VMM's end is noticed elsewhere and stops this task.
    async fn reconnect(&self) -> Result<Clients, AgentError> {
        loop {
            match connect(&*self.dial, HELLO_LIMIT).await {
                Ok((_, hello)) if hello.boot_id != self.boot_id => {
                    return Err(AgentError::OtherGuest { expected: self.boot_id, found: hello.boot_id });
                }
                Ok((clients, _)) => {
                    self.clients.send_replace(Some(clients.clone()));
                    return Ok(clients);
                }
                Err(e) if e.is_final() => return Err(e),
                Err(e) => warn!("cannot reconnect to the agent, trying again: {}", chain(&e)),
            }
        }
    }
}

async fn connect(dial: &dyn Dial, limit: Duration) -> Result<(Clients, HelloResponse), AgentError> {
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
    let client = Client::new(Socket::new(stream));
    let clients = Clients { task: TaskClient::new(client.clone()), guest: GuestClient::new(client) };
    let request = HelloRequest {
        protocol: Some(version::CURRENT.into()).into(),
        shim_version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    };
    let call = "Hello";
    let hello =
        clients.guest.hello(context::with_duration(HELLO_LIMIT), &request).await.map_err(|e| match e {
            ttrpc::Error::RpcStatus(status) => AgentError::Refused { call, status },
            source => AgentError::Transport { call, source },
        })?;
    version::Version::from(hello.protocol.get_or_default()).check()?;
    Ok((clients, hello))
}
