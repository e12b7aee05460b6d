//! What keeps the control connection up, and follows the events of the guest.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cube_protocol::guest::{Event, EventsRequest, event};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tracing::{debug, warn};
use ttrpc::context;

use super::{
    AgentError, Dial,
    connect::{Clients, HELLO_LIMIT, connect},
    pace::Pace,
};
use crate::{errors::chain, task::check_id};

/// How long an Events call waits in the guest, and how much longer we wait for its answer.
const POLL: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// What an honest agent never does costs it as much as this many events: an answer before its time
/// without anything new, and the end of a connection.
const WASTE: u32 = 32;
const RECONNECT: u32 = 100;

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

/// Whether the guest is asked for events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Polling {
    /// All the time.
    On,
    /// No more, once the poll that waits is answered.
    Ending,
    /// Not at all.
    Off,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reconnects: AtomicU64,
    pub(super) last_event: AtomicU64,
    /// The timeline that the events are of.
    pub(super) timeline: AtomicU64,
}

/// Owns the connection; becomes a task with [`Link::run`].
pub struct Link {
    pub(super) dial: Arc<dyn Dial>,
    pub(super) clients: Arc<watch::Sender<Option<Clients>>>,
    pub(super) counters: Arc<Counters>,
    pub(super) polling: watch::Sender<Polling>,
    pub(super) boot_id: u64,
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
