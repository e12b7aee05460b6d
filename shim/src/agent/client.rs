//! The control connection to the agent: ttrpc on port 1024.
//!
//! One task owns the connection. It says Hello on each new one, waits in Events for what happens in
//! the guest, and reconnects when the connection ends; since a call is always waiting there, the end
//! is noticed at once. Everybody else takes the current clients from it and never connects.

use std::{
    future::Future,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::protobuf::Message;
use cube_protocol::guest::HelloResponse;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};
use tracing::debug;
use ttrpc::context::{self, Context};

use super::{
    AgentError, Dial,
    connect::{BACKOFF, Clients, connect},
    link::{Counters, Link, Polling},
};
use crate::errors::chain;

/// How long after the loss of its connection a request is made again: a guest that lives is back at
/// once, and a caller should hear soon of one that does not.
const REPEAT: Duration = Duration::from_secs(5);

/// Longest request: what ttrpc carries, less what it adds. A longer one would cost the connection.
const REQUEST_MAX: u64 = ttrpc::proto::MESSAGE_LENGTH_MAX as u64 - 1024;

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

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("connected", &self.clients.borrow().is_some()).finish()
    }
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
        Q: Message,
        F: Fn(Clients, Context, Q) -> R,
        R: Future<Output = ttrpc::Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let size = request.compute_size();
        if size > REQUEST_MAX {
            return Err(AgentError::Large { call, size, limit: REQUEST_MAX });
        }
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
