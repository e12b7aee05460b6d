//! A VM that runs: its VMM process and the helpers that it depends on. Shared by the backends.

use std::{
    future::Future,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use super::{
    Disk, VSOCK_SOCKET, VmSpec, Vmm, VmmError, VmmExit,
    console::Ring,
    helper::{Ended, Helper},
    lent,
    wall::{User, keeper},
};
use crate::{agent::dial::HybridVsock, cgroup::SandboxCgroup, errors::chain};

/// How long processes may take to die of SIGKILL. A VMM has guest memory to give back.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How long the end of a VMM may take to be told after its connections have ended.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Why a VMM ends although its exit status does not tell: "the guest restarted". Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct EndReason(Arc<Mutex<Option<String>>>);

impl EndReason {
    /// The first reason stays: what follows is its consequence.
    pub(crate) fn set(&self, reason: impl Into<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason.into());
    }

    fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How long a VMM may take to stop or to start its virtual CPUs, which takes it less than a millisecond
/// each, and to say so.
pub(crate) const CONTROL_LIMIT: Duration = Duration::from_secs(10);

/// What makes a running VMM do something. Every method may be called while another is under way.
#[async_trait]
pub(crate) trait Control: Send + Sync {
    /// See [`Vmm::pause`].
    async fn pause(&self) -> Result<(), VmmError>;

    /// See [`Vmm::resume`].
    async fn resume(&self) -> Result<(), VmmError>;

    /// See [`Vmm::snapshot`].
    async fn snapshot(&self, dir: &Path) -> Result<(), VmmError>;

    /// See [`Vmm::add_disk`].
    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError>;
}

/// The parts of a VM, once all of them run.
pub(crate) struct Parts {
    pub(crate) vmm: Helper,
    pub(crate) control: Box<dyn Control>,
    /// When one of them ends, the guest would hang: the VM is killed.
    pub(crate) helpers: Vec<Helper>,
    /// The guest's serial console.
    pub(crate) console: Ring,
    pub(crate) reason: EndReason,
    /// Follows the VMM's events, and ends with the VMM.
    pub(crate) events: Option<JoinHandle<()>>,
}

/// What the task follows.
struct Processes {
    vmm: Helper,
    keeper: Helper,
    helpers: Vec<Helper>,
    console: Ring,
    reason: EndReason,
    events: Option<JoinHandle<()>>,
}

/// The VMM process and the task that follows it.
struct Machine {
    pid: u32,
    control: Box<dyn Control>,
    shutting_down: Arc<AtomicBool>,
    exit: watch::Receiver<Option<VmmExit>>,
}

impl Machine {
    fn supervise(parts: Parts, keeper: Helper, spec: VmSpec) -> Machine {
        let shutting_down = Arc::new(AtomicBool::new(false));
        let (sender, exit) = watch::channel(None);
        let Parts { vmm, control, helpers, console, reason, events } = parts;
        let machine = Machine { pid: keeper.pid(), control, shutting_down: shutting_down.clone(), exit };
        let processes = Processes { vmm, keeper, helpers, console, reason, events };
        tokio::spawn(async move {
            let exit = supervise(processes, SandboxCgroup::at(&spec.cgroup), &shutting_down).await;
            let taken = spawn_blocking(move || lent::take_back(&spec.run_dir)).await;
            if let Ok(Err(error)) = taken {
                tracing::warn!(error = %chain(&error), "a disk stays with the user of its VMM");
            }
            let _ = sender.send(Some(exit));
        });
        machine
    }

    async fn wait(&self) -> VmmExit {
        match self.exit.clone().wait_for(Option::is_some).await.map(|exit| exit.clone()) {
            Ok(Some(exit)) => exit,
            // The supervising task goes away with the runtime only.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// What became of `request`, which the VMM may not live to answer.
    async fn during(
        &self,
        request: &'static str,
        answer: impl Future<Output = Result<(), VmmError>>,
    ) -> Result<(), VmmError> {
        let ended = |exit: VmmExit| VmmError::Ended { during: request, description: exit.description };
        tokio::select! {
            biased;
            // The connection may be seen to end before the process.
            answer = answer => match answer {
                Err(error) if error.is_io() => Err(timeout(END_LIMIT, self.wait()).await.map_or(error, ended)),
                answer => answer,
            },
            exit = self.wait() => Err(ended(exit)),
        }
    }
}

/// Ends everything in the sandbox's cgroup. Also for a VM of which only some parts were started.
async fn kill_all(cgroup: &SandboxCgroup) -> Result<(), VmmError> {
    let cgroup = cgroup.clone();
    match spawn_blocking(move || cgroup.kill(KILL_LIMIT)).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(error.into()),
    }
}

/// What differs from one VMM to the next.
#[async_trait]
pub(crate) trait Backend: Send + Sync {
    fn spec(&self) -> &VmSpec;

    /// Starts helpers and VMM, and returns when the virtual CPUs run. On an error it may leave
    /// processes behind in the sandbox's cgroup.
    async fn start(&self) -> Result<Parts, VmmError>;
}

/// A VM of some backend.
pub(crate) struct Vm<B> {
    backend: B,
    machine: Option<Machine>,
}

impl<B: Backend> Vm<B> {
    pub(crate) fn new(backend: B) -> Vm<B> {
        Vm { backend, machine: None }
    }

    fn cgroup(&self) -> SandboxCgroup {
        SandboxCgroup::at(&self.backend.spec().cgroup)
    }

    async fn given_up(&self, error: VmmError) -> Result<(), VmmError> {
        kill_all(&self.cgroup()).await?;
        Err(error)
    }

    fn booted(&self, request: &str) -> Result<&Machine, VmmError> {
        let reply = "it has not been booted".to_owned();
        self.machine.as_ref().ok_or(VmmError::Refused { program: "the VMM", request: request.into(), reply })
    }
}

#[async_trait]
impl<B: Backend> Vmm for Vm<B> {
    async fn boot(&mut self) -> Result<(), VmmError> {
        match self.backend.start().await {
            Ok(parts) => match keeper_of(&parts.vmm, self.backend.spec()).await {
                Ok(keeper) => {
                    let spec = self.backend.spec().clone();
                    self.machine = Some(Machine::supervise(parts, keeper, spec));
                    Ok(())
                }
                Err(error) => self.given_up(error).await,
            },
            Err(error) => self.given_up(error).await,
        }
    }

    fn pid(&self) -> u32 {
        self.machine.as_ref().map_or(0, |machine| machine.pid)
    }

    fn vsock(&self) -> HybridVsock {
        HybridVsock::new(self.backend.spec().run_dir.join(VSOCK_SOCKET))
    }

    async fn wait(&self) -> VmmExit {
        match &self.machine {
            Some(machine) => machine.wait().await,
            None => std::future::pending().await,
        }
    }

    async fn pause(&self) -> Result<(), VmmError> {
        let machine = self.booted("pause")?;
        machine.during("pause", machine.control.pause()).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        let machine = self.booted("resume")?;
        machine.during("resume", machine.control.resume()).await
    }

    async fn snapshot(&self, dir: &Path) -> Result<(), VmmError> {
        let machine = self.booted("snapshot")?;
        machine.during("snapshot", machine.control.snapshot(dir)).await
    }

    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError> {
        let machine = self.booted("add a disk")?;
        machine.during("add a disk", machine.control.add_disk(disk)).await
    }

    async fn shutdown(&self, grace: Duration) -> Result<(), VmmError> {
        if let Some(machine) = &self.machine {
            machine.shutting_down.store(true, Ordering::Relaxed);
            let _ = timeout(grace, machine.wait()).await;
        }
        self.kill().await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        kill_all(&self.cgroup()).await?;
        let Some(machine) = &self.machine else { return Ok(()) };
        match timeout(KILL_LIMIT, machine.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(VmmError::Timeout { what: "the end of the killed VMM", limit: KILL_LIMIT }),
        }
    }
}

/// The death of a helper if one has died, else `error`: a VMM reports it in its own, vaguer words.
pub(crate) async fn culprit(helpers: &[Helper], error: VmmError) -> VmmError {
    match timeout(Duration::from_millis(200), first_to_end(helpers)).await {
        Ok(helper) => helper.died().await,
        Err(_) => error,
    }
}

async fn supervise(processes: Processes, cgroup: SandboxCgroup, shutting_down: &AtomicBool) -> VmmExit {
    let Processes { vmm, keeper, helpers, console, reason, events } = processes;
    let ended = tokio::select! {
        biased;
        ended = vmm.ended() => ended,
        // Whoever kills the process that he takes for the container's means the container.
        _ = killed(&keeper, &vmm) => {
            reason.set("the process whose pid clients are told was killed, so the VM was killed");
            log_failure(kill_all(&cgroup).await);
            vmm.ended().await
        }
        helper = first_to_end(&helpers) => end_without(helper, &vmm, &cgroup, &reason).await,
    };
    // Helpers that outlived the VMM would keep connections to the guest open, and their users waiting.
    log_failure(kill_all(&cgroup).await);
    if let Some(events) = events {
        let _ = timeout(Duration::from_secs(1), events).await;
    }
    let reason = reason.get();
    let expected = shutting_down.load(Ordering::Relaxed) || (ended.success && reason.is_none());
    let program = vmm.program().display();
    let status = &ended.status;
    let mut description = format!("{program} ended with {status}");
    if !expected {
        let quotes = [
            (": ", reason.unwrap_or_default()),
            ("; its last lines: ", vmm.last_lines()),
            ("; the guest's last lines: ", console.last_lines()),
        ];
        for (intro, text) in quotes.iter().filter(|(_, text)| !text.is_empty()) {
            description.push_str(intro);
            description.push_str(text);
        }
    }
    VmmExit { expected, description }
}

async fn keeper_of(vmm: &Helper, spec: &VmSpec) -> Result<Helper, VmmError> {
    let user = User { uid: spec.helper_user().uid, gid: spec.helper_user().gid };
    let cgroup = SandboxCgroup::at(&spec.cgroup).helpers();
    vmm.until("the start of the keeper", KILL_LIMIT, keeper::launch(vmm, user, &spec.root(), cgroup)).await
}

/// Resolves when the keeper has ended although the VMM has not. It ends with the VMM, whose own end may be told
/// just behind.
async fn killed(keeper: &Helper, vmm: &Helper) {
    let ended = keeper.ended().await;
    if ended.success {
        vmm.ended().await;
    }
}

/// A guest would hang without its helper, so the VM is killed. But a helper also ends when the VMM
/// disconnects from it: the VMM's own end may be just behind.
async fn end_without(helper: &Helper, vmm: &Helper, cgroup: &SandboxCgroup, reason: &EndReason) -> Ended {
    if let Ok(ended) = timeout(Duration::from_secs(1), vmm.ended()).await {
        return ended;
    }
    let (program, status) = (helper.program().display(), helper.ended().await.status);
    reason.set(format!("{program} ended with {status}, so the VM was killed: {}", helper.last_lines()));
    log_failure(kill_all(cgroup).await);
    vmm.ended().await
}

fn log_failure(result: Result<(), VmmError>) {
    if let Err(error) = result {
        let error: &(dyn std::error::Error + 'static) = &error;
        tracing::error!(error, "processes of a VM that has ended live on");
    }
}

async fn first_to_end(helpers: &[Helper]) -> &Helper {
    if helpers.is_empty() {
        return std::future::pending().await;
    }
    let ends = helpers.iter().map(|helper| {
        Box::pin(async move {
            helper.ended().await;
            helper
        })
    });
    futures::future::select_all(ends).await.0
}
