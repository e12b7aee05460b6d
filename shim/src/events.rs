//! Task events to containerd: in order, each repeated until containerd has taken it.
//!
//! containerd forgets what it is not told, and an exit that it learns of before the start confuses
//! every client, so there is one queue, and its head stays the head while containerd is away.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    events::task as message,
    protobuf::{
        MessageField, MessageFull, well_known_types::any::Any, well_known_types::timestamp::Timestamp,
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::EventsClient,
    topics,
};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{error, warn};
use ttrpc::{asynchronous::Client, asynchronous::transport::Socket, context};

use crate::{errors::chain, state::now_ns};

/// Events that may wait for containerd. It drives nearly all of them itself, so that more than a
/// handful wait only if something is badly wrong.
const QUEUE: usize = 4096;

/// Time that containerd has to take an event.
const FORWARD_LIMIT: Duration = Duration::from_secs(5);

/// Pauses between attempts grow from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// A task event; made by the constructors, published once.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskEvent {
    topic: &'static str,
    body: Any,
    time_ns: u64,
}

impl TaskEvent {
    fn new<M: MessageFull>(topic: &'static str, body: &M) -> TaskEvent {
        // Encoding into memory fails only for a message beyond 2 GiB.
        let value = body.write_to_bytes().unwrap_or_default();
        // typeurl of containerd knows its own messages by their bare names.
        let body = Any { type_url: M::descriptor().full_name().into(), value, ..Default::default() };
        TaskEvent { topic, body, time_ns: now_ns() }
    }

    /// A container was created.
    pub fn create(event: &message::TaskCreate) -> TaskEvent {
        TaskEvent::new(topics::TASK_CREATE_EVENT_TOPIC, event)
    }

    /// An init process runs.
    pub fn start(container_id: &str, pid: u32) -> TaskEvent {
        let event = message::TaskStart { container_id: container_id.into(), pid, ..Default::default() };
        TaskEvent::new(topics::TASK_START_EVENT_TOPIC, &event)
    }

    /// An exec was registered.
    pub fn exec_added(container_id: &str, exec_id: &str) -> TaskEvent {
        let (container_id, exec_id) = (container_id.into(), exec_id.into());
        let event = message::TaskExecAdded { container_id, exec_id, ..Default::default() };
        TaskEvent::new(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event)
    }

    /// An exec runs.
    pub fn exec_started(container_id: &str, exec_id: &str, pid: u32) -> TaskEvent {
        let (container_id, exec_id) = (container_id.into(), exec_id.into());
        let event = message::TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
        TaskEvent::new(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event)
    }

    /// A process has exited. `id` is the exec's, or the container's for its init process.
    pub fn exit(container_id: &str, id: &str, pid: u32, status: u32, exited_at_ns: u64) -> TaskEvent {
        let event = message::TaskExit {
            container_id: container_id.into(),
            id: id.into(),
            pid,
            exit_status: status,
            exited_at: MessageField::some(timestamp(exited_at_ns)),
            ..Default::default()
        };
        TaskEvent::new(topics::TASK_EXIT_EVENT_TOPIC, &event)
    }

    /// A sandbox stands still.
    pub fn paused(container_id: &str) -> TaskEvent {
        let event = message::TaskPaused { container_id: container_id.into(), ..Default::default() };
        TaskEvent::new(topics::TASK_PAUSED_EVENT_TOPIC, &event)
    }

    /// A sandbox goes on.
    pub fn resumed(container_id: &str) -> TaskEvent {
        let event = message::TaskResumed { container_id: container_id.into(), ..Default::default() };
        TaskEvent::new(topics::TASK_RESUMED_EVENT_TOPIC, &event)
    }

    /// The kernel killed a process of the container for want of memory.
    pub fn oom(container_id: &str) -> TaskEvent {
        let event = message::TaskOOM { container_id: container_id.into(), ..Default::default() };
        TaskEvent::new(topics::TASK_OOM_EVENT_TOPIC, &event)
    }

    /// A container was deleted.
    pub fn delete(container_id: &str, pid: u32, status: u32, exited_at_ns: u64) -> TaskEvent {
        let event = message::TaskDelete {
            container_id: container_id.into(),
            pid,
            exit_status: status,
            exited_at: MessageField::some(timestamp(exited_at_ns)),
            ..Default::default()
        };
        TaskEvent::new(topics::TASK_DELETE_EVENT_TOPIC, &event)
    }
}

/// `ns` nanoseconds since 1970 as protobuf has it.
pub fn timestamp(ns: u64) -> Timestamp {
    const SECOND: u64 = 1_000_000_000;
    // Both fit: u64::MAX nanoseconds are 584 years.
    Timestamp { seconds: (ns / SECOND) as i64, nanos: (ns % SECOND) as i32, ..Default::default() }
}

#[derive(Debug)]
enum Item {
    Event(TaskEvent),
    Flushed(oneshot::Sender<()>),
}

/// Publishes events. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Item>,
    counters: Arc<Counters>,
}

/// What has become of the events that were published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublisherStatus {
    /// Not yet taken by containerd, the one that is being offered included.
    pub waiting: u64,
    /// Given up: containerd refused them, or too many waited.
    pub lost: u64,
}

#[derive(Debug, Default)]
struct Counters {
    published: AtomicU64,
    /// With containerd, or lost.
    settled: AtomicU64,
    lost: AtomicU64,
}

impl Counters {
    fn settle(&self, taken: bool) {
        if !taken {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.settled.fetch_add(1, Ordering::Relaxed);
    }
}

impl Publisher {
    /// Publishes to the containerd that listens on `address` (`TTRPC_ADDRESS`, with or without
    /// `unix://`), in `namespace`. Needs a tokio runtime, in which it runs a task.
    pub fn new(address: &str, namespace: &str) -> Publisher {
        let (queue, items) = mpsc::channel(QUEUE);
        let path = address.strip_prefix("unix://").unwrap_or(address).into();
        let counters = Arc::<Counters>::default();
        let forwarder =
            Forwarder { path, namespace: namespace.into(), client: None, counters: counters.clone() };
        tokio::spawn(forwarder.run(items));
        Publisher { queue, counters }
    }

    /// What has become of the events so far.
    pub fn status(&self) -> PublisherStatus {
        // In this order: what is published meanwhile may count as waiting, never as less than nothing.
        let settled = self.counters.settled.load(Ordering::Relaxed);
        let published = self.counters.published.load(Ordering::Relaxed);
        PublisherStatus {
            waiting: published.saturating_sub(settled),
            lost: self.counters.lost.load(Ordering::Relaxed),
        }
    }

    /// Queues an event and returns at once.
    pub fn publish(&self, event: TaskEvent) {
        self.counters.published.fetch_add(1, Ordering::Relaxed);
        if let Err(e) = self.queue.try_send(Item::Event(event)) {
            self.counters.settle(false);
            error!("an event is lost because containerd has not taken the {QUEUE} before it: {e}");
        }
    }

    /// Waits at most `limit` until everything published so far is with containerd; tells whether it is.
    pub async fn flush(&self, limit: Duration) -> bool {
        let (done, flushed) = oneshot::channel();
        let wait = async {
            self.queue.send(Item::Flushed(done)).await.ok()?;
            flushed.await.ok()
        };
        matches!(timeout(limit, wait).await, Ok(Some(())))
    }
}

struct Forwarder {
    path: PathBuf,
    namespace: String,
    client: Option<EventsClient>,
    counters: Arc<Counters>,
}

impl Forwarder {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(item) = items.recv().await {
            match item {
                Item::Event(event) => {
                    let taken = self.deliver(event).await;
                    self.counters.settle(taken);
                }
                // Whoever waited may have given up.
                Item::Flushed(done) => drop(done.send(())),
            }
        }
    }

    /// Whether containerd has taken it.
    async fn deliver(&mut self, event: TaskEvent) -> bool {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(event.time_ns)),
            namespace: self.namespace.clone(),
            topic: event.topic.into(),
            event: MessageField::some(event.body),
            ..Default::default()
        };
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let mut pause = BACKOFF.0;
        loop {
            match self.forward(&request).await {
                Ok(()) => return true,
                // It would be refused for ever, and everything behind it would wait.
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::INVALID_ARGUMENT => {
                    error!("containerd refuses the event {}: {}", event.topic, status.message());
                    return false;
                }
                Err(e) => {
                    if pause == BACKOFF.0 {
                        warn!(
                            "containerd does not take the event {}, trying again: {}",
                            event.topic,
                            chain(&e)
                        );
                    }
                    self.client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let connection = timeout(FORWARD_LIMIT, UnixStream::connect(&self.path)).await;
                let stream = connection
                    .unwrap_or_else(|elapsed| Err(elapsed.into()))
                    .map_err(|e| ttrpc::Error::Socket(format!("{}: {e}", self.path.display())))?;
                self.client.insert(EventsClient::new(Client::new(Socket::new(stream))))
            }
        };
        client.forward(context::with_duration(FORWARD_LIMIT), request).await.map(drop)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        path::Path,
        sync::{Arc, Mutex},
    };

    use async_trait::async_trait;
    use containerd_shim_protos::{
        protobuf::{Message, well_known_types::empty::Empty},
        shim_async::{Events, create_events},
    };
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// containerd's side: fails the first calls, then records.
    #[derive(Default)]
    pub(crate) struct Containerd {
        failures: Mutex<u32>,
        pub(crate) seen: Mutex<Vec<Envelope>>,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let mut failures = self.failures.lock().unwrap();
            if *failures > 0 {
                *failures -= 1;
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNAVAILABLE, "not yet")));
            }
            self.seen.lock().unwrap().push(request.envelope.unwrap());
            Ok(Empty::new())
        }
    }

    pub(crate) async fn serve(containerd: Arc<Containerd>, socket: &Path) -> Server {
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(containerd));
        server.start().await.unwrap();
        server
    }

    #[tokio::test]
    async fn events_arrive_once_and_in_order_though_containerd_comes_late_and_fails() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock.ttrpc");
        let publisher = Publisher::new(socket.to_str().unwrap(), "default");
        for pid in 1..=50 {
            publisher.publish(TaskEvent::start("c1", pid));
        }
        publisher.publish(TaskEvent::exit("c1", "c1", 50, 137, 1_500_000_000));
        // Nobody listens yet, so nothing can have been delivered.
        assert!(!publisher.flush(Duration::from_millis(50)).await);

        let containerd = Arc::new(Containerd { failures: Mutex::new(3), ..Default::default() });
        let _server = serve(containerd.clone(), &socket).await;
        assert!(publisher.flush(Duration::from_secs(30)).await);

        let seen = containerd.seen.lock().unwrap();
        let pids: Vec<u32> = seen[..50]
            .iter()
            .map(|envelope| message::TaskStart::parse_from_bytes(&envelope.event.value).unwrap().pid)
            .collect();
        assert_eq!(pids, (1..=50).collect::<Vec<_>>());
        assert_eq!((seen[0].topic.as_str(), seen[0].namespace.as_str()), ("/tasks/start", "default"));
        assert_eq!(seen[0].event.type_url, "containerd.events.TaskStart");
        let exit = message::TaskExit::parse_from_bytes(&seen[50].event.value).unwrap();
        assert_eq!((exit.id.as_str(), exit.exit_status, exit.exited_at.seconds), ("c1", 137, 1));
        assert_eq!(seen.len(), 51);
    }

    #[tokio::test]
    async fn delivery_goes_on_after_containerd_was_restarted() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock.ttrpc");
        let containerd = Arc::new(Containerd::default());
        let mut first = serve(containerd.clone(), &socket).await;
        let publisher = Publisher::new(socket.to_str().unwrap(), "default");
        publisher.publish(TaskEvent::oom("c1"));
        assert!(publisher.flush(Duration::from_secs(30)).await);
        first.shutdown().await.unwrap();
        drop(first);
        std::fs::remove_file(&socket).unwrap();

        publisher.publish(TaskEvent::exec_added("c1", "e1"));
        let _second = serve(containerd.clone(), &socket).await;
        assert!(publisher.flush(Duration::from_secs(30)).await);
        let topics: Vec<String> = containerd.seen.lock().unwrap().iter().map(|e| e.topic.clone()).collect();
        assert_eq!(topics, ["/tasks/oom", "/tasks/exec-added"]);
    }
}
