//! The control connection to the agent: ttrpc on port 1024.
//!
//! One task owns the connection. It says Hello on each new one, waits in Events for what happens in
//! the guest, and reconnects when the connection ends; since a call is always waiting there, the end
//! is noticed at once. Everybody else takes the current clients from it and never connects.

use std::{
    future::Future,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::shim_async::TaskClient;
use cube_protocol::{
    guest::{Event, EventsRequest, HelloRequest, HelloResponse, event},
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

use super::{AgentError, Dial, bounded::Bounded, pace::Pace};
use crate::{errors::chain, task::check_id};

/// Time for one attempt to connect. A guest whose agent does not listen yet may not answer at all.
const DIAL_ATTEMPT: Duration = Duration::from_secs(2);

/// Shortest and longest pause between two attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// A pause is this part of the time that has been waited already: no guest is found later than it has to
/// be by more than that. Pauses that double would find some after twice the time.
const BACKOFF_SHARE: u32 = 8;

/// Time for Hello; an emulated guest is slow right after boot.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// How long after the loss of its connection a request is made again: a guest that lives is back at
/// once, and a caller should hear soon of one that does not.
const REPEAT: Duration = Duration::from_secs(5);

/// How long an Events call waits in the guest, and how much longer we wait for its answer.
const POLL: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// What an honest agent never does costs it as much as this many events: an answer before its time
/// without anything new, and the end of a connection.
const WASTE: u32 = 32;
const RECONNECT: u32 = 100;

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

/// The agent of one sandbox. Clones share the connection.
#[derive(Clone)]
pub struct Agent {
    clients: watch::Receiver<Option<Clients>>,
    /// To put another connection in its place; the link's as long as that runs.
    connection: Weak<watch::Sender<Option<Clients>>>,
    boot_id: u64,
    counters: Arc<Counters>,
    polling: watch::Sender<Polling>,
}

/// Whether the guest is asked for events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Polling {
    /// All the time.
    On,
    /// No more, once the poll that waits is answered.
    Ending,
    /// Not at all.
    Off,
}

/// How the control connection has fared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStatus {
    /// Whether there is one at the moment.
    pub connected: bool,
    /// Connections after the first.
    pub reconnects: u64,
    /// Number of the last event that came from the guest.
    pub last_event: u64,
}

#[derive(Debug, Default)]
struct Counters {
    reconnects: AtomicU64,
    last_event: AtomicU64,
    /// The timeline that the events are of.
    timeline: AtomicU64,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("connected", &self.clients.borrow().is_some()).finish()
    }
}

/// Owns the connection; becomes a task with [`Link::run`].
pub struct Link {
    dial: Arc<dyn Dial>,
    clients: Arc<watch::Sender<Option<Clients>>>,
    counters: Arc<Counters>,
    polling: watch::Sender<Polling>,
    boot_id: u64,
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
        let counters = Arc::<Counters>::default();
        counters.timeline.store(hello.timeline, Ordering::Relaxed);
        let polling = watch::Sender::new(Polling::On);
        let sender = Arc::new(sender);
        let connection = Arc::downgrade(&sender);
        let boot_id = hello.boot_id;
        let link =
            Link { dial, clients: sender, counters: counters.clone(), polling: polling.clone(), boot_id };
        Ok((Agent { clients: receiver, connection, boot_id, counters, polling }, link, hello))
    }

    /// Makes no further poll for events; the one that waits is answered when the guest is quiesced.
    pub fn hold_events(&self) {
        self.polling.send_replace(Polling::Ending);
    }

    /// After [`hold_events`](Agent::hold_events): resolves when no poll waits in the guest. Never if the
    /// connection cannot be had any more. Cancel safe.
    pub async fn events_held(&self) {
        // We hold a sender: it cannot fail.
        let _ = self.polling.subscribe().wait_for(|polling| *polling != Polling::Ending).await;
    }

    /// Polls for events again, after the last that came, and connects again where that has to be.
    pub fn follow_events(&self) {
        self.polling.send_replace(Polling::On);
    }

    /// Resolves when events are followed, that is not between [`hold_events`](Agent::hold_events) and
    /// [`follow_events`](Agent::follow_events): a guest at rest is asked nothing. Cancel safe.
    pub async fn following(&self) {
        // We hold a sender: it cannot fail.
        let _ = self.polling.subscribe().wait_for(|polling| *polling == Polling::On).await;
    }

    /// Polls for the events of another timeline, after number `after`. For a guest that was restored, once
    /// it is thawed; events were held before.
    pub fn follow_events_of(&self, timeline: u64, after: u64) {
        self.counters.timeline.store(timeline, Ordering::Relaxed);
        self.counters.last_event.store(after, Ordering::Relaxed);
        self.follow_events();
    }

    /// Gives up the connection to a guest that has no VM for a while. Events have to be
    /// [held](Agent::hold_events): nobody connects then before [`renew`](Agent::renew).
    pub fn disconnect(&self) {
        if let Some(connection) = self.connection.upgrade() {
            connection.send_replace(None);
        }
    }

    /// Connects to the same guest in another VM, trying again for at most `limit`. Events are still held.
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Agent::connect); [`AgentError::OtherGuest`] for a guest that has booted anew.
    pub async fn renew(&self, dial: &dyn Dial, limit: Duration) -> Result<HelloResponse, AgentError> {
        let (clients, hello) = connect(dial, limit).await?;
        if hello.boot_id != self.boot_id {
            return Err(AgentError::OtherGuest { expected: self.boot_id, found: hello.boot_id });
        }
        if let Some(connection) = self.connection.upgrade() {
            self.counters.reconnects.fetch_add(1, Ordering::Relaxed);
            connection.send_replace(Some(clients));
        }
        Ok(hello)
    }

    /// How the connection has fared, from memory.
    pub fn link(&self) -> LinkStatus {
        LinkStatus {
            // A task that is gone keeps no connection up.
            connected: self.clients.has_changed().is_ok() && self.clients.borrow().is_some(),
            reconnects: self.counters.reconnects.load(Ordering::Relaxed),
            last_event: self.counters.last_event.load(Ordering::Relaxed),
        }
    }

    /// Makes a call with a deadline of `limit`, waiting within it for a connection if there is none.
    /// `send` makes the request on the clients that it is given.
    ///
    /// A request whose connection is lost is made again on the next one. For calls that may be made
    /// twice; what the agent then refuses because the first has done it
    /// ([`AgentError::may_be_done`]) is for the caller to tell.
    pub async fn call<Q, F, R, T>(
        &self,
        call: &'static str,
        limit: Duration,
        request: Q,
        send: F,
    ) -> Result<T, AgentError>
    where
        Q: Clone,
        F: Fn(Clients, Context, Q) -> R,
        R: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let deadline = Instant::now() + limit;
        let mut lost: Option<(Instant, AgentError)> = None;
        loop {
            let until = lost.as_ref().map_or(deadline, |(give_up, _)| *give_up);
            let attempt = |clients, context| send(clients, context, request.clone());
            match self.attempt(call, limit, until, deadline, attempt).await {
                Err(AgentError::Deadline { .. }) if until < deadline && Instant::now() < deadline => {
                    let unanswered = AgentError::Deadline { call, limit };
                    return Err(lost.map_or(unanswered, |(_, error)| error));
                }
                Err(error @ AgentError::Transport { .. }) if Instant::now() < until && self.may_return() => {
                    debug!("making {call} again: {}", chain(&error));
                    let give_up = lost.map_or(deadline.min(Instant::now() + REPEAT), |(give_up, _)| give_up);
                    lost = Some((give_up, error));
                    // The owner of the connection notices its end by itself, a little later.
                    sleep(BACKOFF.0).await;
                }
                Err(AgentError::Refused { call, status, .. }) => {
                    return Err(AgentError::Refused { call, status, repeated: lost.is_some() });
                }
                result => return result,
            }
        }
    }

    /// Like [`call`](Agent::call), for a request that must not be made twice: its effect is unknown if
    /// the connection is lost.
    pub async fn call_once<F, R, T>(
        &self,
        call: &'static str,
        limit: Duration,
        send: F,
    ) -> Result<T, AgentError>
    where
        F: FnOnce(Clients, Context) -> R,
        R: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let deadline = Instant::now() + limit;
        self.attempt(call, limit, deadline, deadline, send).await
    }

    /// Waits for a connection until `connected`, and for the answer until `deadline`.
    ///
    /// The request runs in a task of its own: ttrpc closes the whole connection when one is dropped
    /// while it is being written, and our caller may go away at any time.
    async fn attempt<F, R, T>(
        &self,
        call: &'static str,
        limit: Duration,
        connected: Instant,
        deadline: Instant,
        send: F,
    ) -> Result<T, AgentError>
    where
        F: FnOnce(Clients, Context) -> R,
        R: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let clients = self.connected(connected).await.ok_or(AgentError::Deadline { call, limit })?;
        let context = context::with_duration(deadline.saturating_duration_since(Instant::now()));
        let answer = tokio::spawn(send(clients, context));
        let answer = tokio::select! {
            answer = timeout_at(deadline, answer) => answer,
            // Whatever becomes of the connection.
            () = self.ended() => {
                return Err(AgentError::Transport { call, source: ttrpc::Error::RemoteClosed });
            }
        };
        match answer {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(ttrpc::Error::RpcStatus(status)))) => Err(AgentError::refused(call, status)),
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

    /// Whether somebody connects again: nobody does once the VM has ended.
    fn may_return(&self) -> bool {
        self.clients.has_changed().is_ok()
    }

    /// Resolves when nobody connects again.
    async fn ended(&self) {
        let mut clients = self.clients.clone();
        while clients.changed().await.is_ok() {}
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
        let mut refused = 0_u64;
        let mut pace = Pace::new();
        loop {
            if self.clients.borrow().is_none() {
                self.reconnect().await?;
            }
            self.may_poll().await;
            // Another one than before, if the guest has moved to another VM meanwhile.
            let Some(clients) = self.clients.borrow().clone() else { continue };
            let mut after = self.counters.last_event.load(Ordering::Relaxed);
            let request = EventsRequest {
                after,
                timeout_ms: POLL.0.as_millis() as u32,
                timeline: self.counters.timeline.load(Ordering::Relaxed),
                ..Default::default()
            };
            let begun = Instant::now();
            match clients.guest.events(context::with_duration(POLL.0 + POLL.1), &request).await {
                Ok(answer) => {
                    // The guest may round its time differently.
                    let due = *self.polling.borrow() != Polling::On || begun.elapsed() >= POLL.0 / 2;
                    let hasty = answer.events.is_empty() && !due;
                    let mut units = if hasty { WASTE } else { 1 };
                    for event in answer.events {
                        units += 1;
                        let Some(event) = checked(event, &mut after) else {
                            refused += 1;
                            // A line for each would be the guest's to write.
                            if refused.is_power_of_two() {
                                warn!(refused, "the guest tells events that cannot be, they are ignored");
                            }
                            continue;
                        };
                        self.counters.last_event.store(after, Ordering::Relaxed);
                        if events.send(event).await.is_err() {
                            return Ok(());
                        }
                    }
                    pace.charge(units).await;
                }
                Err(e) => {
                    debug!("the connection to the agent ended: {}", chain(&e));
                    self.clients.send_replace(None);
                    // An agent that answers with an error at once must not make us spin.
                    pace.charge(RECONNECT).await;
                }
            }
        }
    }

    /// Waits while no events are wanted.
    async fn may_poll(&self) {
        let mut changes = self.polling.subscribe();
        while *changes.borrow_and_update() != Polling::On {
            self.polling.send_if_modified(|polling| {
                let ends = *polling == Polling::Ending;
                if ends {
                    *polling = Polling::Off;
                }
                ends
            });
            // We hold a sender: it cannot fail.
            let _ = changes.changed().await;
        }
    }

    /// Tries until it works: the VMM's end is noticed elsewhere and stops this task.
    async fn reconnect(&self) -> Result<(), AgentError> {
        loop {
            match connect(&*self.dial, HELLO_LIMIT).await {
                Ok((_, hello)) if hello.boot_id != self.boot_id => {
                    return Err(AgentError::OtherGuest { expected: self.boot_id, found: hello.boot_id });
                }
                Ok((clients, _)) => {
                    self.counters.reconnects.fetch_add(1, Ordering::Relaxed);
                    self.clients.send_replace(Some(clients));
                    return Ok(());
                }
                Err(e) if e.is_final() => return Err(e),
                Err(e) => warn!("cannot reconnect to the agent, trying again: {}", chain(&e)),
            }
        }
    }
}

/// An event that is new, and names what may exist.
fn checked(event: Event, after: &mut u64) -> Option<GuestEvent> {
    if event.sequence <= *after {
        return None;
    }
    *after = event.sequence;
    let valid = |container: &str, exec: &str| {
        check_id("container id", container).is_ok() && (exec.is_empty() || check_id("exec id", exec).is_ok())
    };
    match event.kind? {
        event::Kind::Exit(exit) if valid(&exit.container_id, &exit.exec_id) => Some(GuestEvent::Exit(exit)),
        event::Kind::Oom(oom) if valid(&oom.container_id, "") => Some(GuestEvent::Oom(oom)),
        _ => None,
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
