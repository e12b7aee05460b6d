//! What the agent serves: containerd's Task API and the Guest service on the control port, stdio on
//! the stream port.

pub mod connection;
pub mod error;
pub mod events;
mod guest;
pub mod ids;
pub mod listen;
mod probe;
mod rest;
mod specs;
mod task;
pub mod tasks;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::shim_async::create_task;
use cube_protocol::guest_ttrpc::create_guest;
use futures::stream;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
    time::timeout,
};
use ttrpc::asynchronous::{Server, transport};

use self::{
    events::Events, guest::GuestService, listen::Listener, specs::Specs, task::TaskService, tasks::Tasks,
};
use crate::{
    boot::{process::HostRun, reaper::Reaper},
    container::Freezer,
    guest::{
        identity::Identity,
        info, network, paths,
        quiesce::{Kernel, Quiescence},
    },
    stdio::{Hub, Limits},
};

/// Processes with stdio at once.
const PROCESSES: usize = 300;

/// All rings together get this part of the guest's memory, but no less than the least.
const RING_SHARE: u64 = 32;
const RING_LEAST: u64 = 8 << 20;

/// How long containers may take to end when the guest is told to.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(10);

/// How long the answer to Shutdown may take to leave.
const ANSWER_GRACE: Duration = Duration::from_millis(50);

/// Where the agent serves, and on what.
#[derive(Debug)]
pub struct Config {
    /// Where the host connects.
    pub listener: Listener,
    /// cgroup v2 directory for the containers.
    pub cgroup: PathBuf,
    /// On the `process` backend.
    pub host_run: Option<HostRun>,
}

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was done.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The ttrpc server does not start.
    #[error("cannot serve ttrpc")]
    Ttrpc(#[from] ttrpc::Error),
}

impl ServeError {
    fn system(action: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
        move |source| ServeError::System { action, source }
    }
}

/// Connections that were refused because the peer is not the host, or sent nothing of use.
#[derive(Debug, Default)]
pub struct Refused(AtomicU64);

impl Refused {
    /// Counts one, and gives the new count.
    fn count(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Carries out `work` to its end, even if the caller goes away: ttrpc drops the future of a call when
/// its connection ends or its deadline passes. `pass` is held until then.
async fn detached<T: Send + 'static>(
    pass: impl Send + 'static,
    work: impl Future<Output = Result<T, error::Error>> + Send + 'static,
) -> Result<T, error::Error> {
    tokio::spawn(async move {
        let _pass = pass;
        work.await
    })
    .await?
}

/// Serves until a Shutdown or a SIGTERM or SIGINT, then ends all containers and returns.
pub async fn run(config: Config) -> Result<(), ServeError> {
    let reaper = Reaper::start().map_err(ServeError::system("watch for children"))?;
    let identity = Identity::random().map_err(ServeError::system("get random numbers"))?;
    let memory = info::memory().map_err(ServeError::system("read the size of the memory"))?;
    let ring_budget = (memory.total / RING_SHARE).max(RING_LEAST);
    let limits =
        Limits { ring_budget: usize::try_from(ring_budget).unwrap_or(usize::MAX), processes: PROCESSES };
    let hub = Hub::new(limits, identity.timeline);
    let kernel = if config.host_run.is_some() { Kernel::Host } else { Kernel::Own };
    let quiescence = Arc::new(Quiescence::new(Freezer::new(config.cgroup.clone()), hub.clone(), kernel));
    let events = Arc::new(Events::default());
    let tasks =
        Tasks::new(hub.clone(), reaper, events.clone(), config.cgroup, PathBuf::from(paths::CONTAINERS));
    let refused = Arc::new(Refused::default());
    let shutdown = Arc::new(Notify::new());

    if let Err(error) = network::configure(&[], &[]) {
        tracing::warn!("no loopback network: {}", crate::errors::chain(&error));
    }

    let specs = Arc::new(Specs::default());
    let guest = GuestService::new(guest::Parts {
        boot_id: identity.boot_id,
        ring_budget,
        quiescence: quiescence.clone(),
        tasks: tasks.clone(),
        hub: hub.clone(),
        events,
        refused: refused.clone(),
        host_run: config.host_run,
        specs: specs.clone(),
    });
    let task = TaskService::new(tasks.clone(), hub.clone(), quiescence, specs, shutdown.clone());
    let control = listen::start(config.listener, hub, refused).map_err(ServeError::system("listen"))?;
    let control =
        stream::unfold(control, async |mut control| control.recv().await.map(|next| (Ok(next), control)));
    let mut server = Server::new()
        .register_service(create_task(Arc::new(task)))
        .register_service(create_guest(Arc::new(guest)))
        .add_listener(transport::Listener::new(control));
    server.start().await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "serving");

    wait_for_end(&shutdown).await?;
    tokio::time::sleep(ANSWER_GRACE).await;
    if timeout(TEARDOWN_LIMIT, tasks.delete_all()).await.is_err() {
        tracing::warn!("containers still run after {TEARDOWN_LIMIT:?}");
    }
    Ok(())
}

async fn wait_for_end(shutdown: &Notify) -> Result<(), ServeError> {
    let failed = || ServeError::system("watch for signals");
    let mut terminate = signal(SignalKind::terminate()).map_err(failed())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed())?;
    tokio::select! {
        () = shutdown.notified() => tracing::info!("shutting down: the host asks for it"),
        _ = terminate.recv() => tracing::info!("shutting down: SIGTERM"),
        _ = interrupt.recv() => tracing::info!("shutting down: SIGINT"),
    }
    Ok(())
}
