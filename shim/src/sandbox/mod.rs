//! One sandbox: a VM and the containers in it.
//!
//! An owner task holds all state and never waits: a request is either answered from memory, or
//! checked, noted in the state and handed to a job (`create`, `job`), whose report comes back as a
//! message. So every question has an answer at once, whatever the guest does. [`Sandbox`] is the
//! handle that the Task service uses.

mod clone;
mod create;
#[cfg(test)]
mod fakes;
mod host;
mod job;
mod machine;
mod owner;
mod pause;
mod process;
mod ready;
mod relaunch;
mod restore;
mod rollback;
pub mod size;
mod snapshot;
pub mod spec;
mod status;
mod steps;
mod suspend;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Arc, time::Duration};

use containerd_shim_protos::{api::Mount, protobuf::well_known_types::any::Any};
use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

pub use host::{Host, LinuxHost, Rootfs, RootfsRequest, Selected};
pub use process::{Exit, ProcessState, Status, Stdio};
pub use ready::{Readiness, SandboxReadiness};
pub use status::{ProcessStatus, ReadyStatus, SandboxStatus, VmStatus};

use crate::{
    annotations::{self, Annotations},
    config::Config,
    errors::Error,
    events::Publisher,
    snapshot::Listed,
    state::RunDir,
};

/// Requests that may wait for the owner, which takes each in microseconds.
const QUEUE: usize = 256;

/// Who a sandbox is; fixed for its life.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd namespace.
    pub namespace: String,
    /// Id of the pod, or of the only container.
    pub id: String,
    /// Where its files are.
    pub run_dir: RunDir,
}

/// Names a process: its container, and its exec id or "" for the init process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the init process.
    pub exec: String,
}

impl ProcessId {
    /// Whether it is a container's init process.
    pub fn is_init(&self) -> bool {
        self.exec.is_empty()
    }
}

/// What Create asks for, ids checked.
#[derive(Debug)]
pub struct CreateRequest {
    /// Container id.
    pub id: String,
    /// Its bundle, absolute.
    pub bundle: PathBuf,
    /// Mounts that make the rootfs, in order.
    pub rootfs: Vec<Mount>,
    /// Its init process's stdio.
    pub stdio: Stdio,
    /// The snapshot to go on from; an annotation may name it, too.
    pub restore: Option<String>,
}

/// A [`CreateRequest`] with what its bundle says.
#[derive(Debug)]
struct Plan {
    request: CreateRequest,
    spec: Value,
    annotations: Annotations,
    /// The snapshot to go on from.
    restore: Option<String>,
}

/// What Exec asks for, ids checked.
#[derive(Debug)]
pub struct ExecRequest {
    /// Names the new process; not init.
    pub process: ProcessId,
    /// The OCI process, as containerd packed it.
    pub spec: Any,
    /// Its stdio.
    pub stdio: Stdio,
}

/// What Kill asks for.
#[derive(Debug, Clone)]
pub struct KillRequest {
    /// The process.
    pub process: ProcessId,
    /// Signal number as kill(2) has it.
    pub signal: u32,
    /// Every process of the container.
    pub all: bool,
}

/// What a snapshot is wanted of.
#[derive(Debug, Clone, Default)]
pub struct SnapshotRequest {
    /// Its name in the store; `None` takes the template's id, or makes one of the sandbox's id and the time.
    pub name: Option<String>,
    /// For containerd's Checkpoint: the container that was named, and the path for the event.
    pub checkpoint: Option<(String, String)>,
    /// A directory that is to get a copy. Without it there is no snapshot either.
    pub copy_to: Option<PathBuf>,
}

/// A process that was deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// Pid that containerd was told.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

/// The processes of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pids {
    /// Pid that containerd is told: the VMM's.
    pub reported: u32,
    /// Pids in the guest.
    pub guest: Vec<u32>,
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the Task service asks of the owner.
enum Request {
    Create(Box<Plan>, Reply<u32>),
    Start(ProcessId, Reply<u32>),
    Exec(Box<ExecRequest>, Reply<()>),
    Kill(KillRequest, Reply<()>),
    Pause(String, Reply<()>),
    Resume(String, Reply<()>),
    /// The whole sandbox, by its own id.
    PauseAll(Reply<()>),
    PauseToDisk(Reply<()>),
    ResumeAll(Reply<()>),
    Rollback(String, Reply<()>),
    Snapshot(SnapshotRequest, Reply<Listed>),
    Delete(ProcessId, Reply<Deleted>),
    Wait(ProcessId, Reply<Exit>),
    State(ProcessId, Reply<ProcessState>),
    Pid(String, Reply<u32>),
    Pids(String, Reply<Pids>),
    Stats(String, Reply<Any>),
    Update(String, Any, Reply<()>),
    Resize(ProcessId, u32, u32, Reply<()>),
    CloseIo(ProcessId, Reply<()>),
    Shutdown(Reply<()>),
    Status(Reply<SandboxStatus>),
    /// To be answered when it is ready, or cannot become so.
    WhenReady(Reply<SandboxReadiness>),
    Readiness(Reply<SandboxReadiness>),
}

/// Everything that the owner reacts to.
enum Message {
    Request(Request),
    Report(Box<job::Report>),
    VmmExited(crate::vmm::VmmExit),
    /// What [`process::Process::exiting`] asked to be awaited is over.
    ProcessExited(ProcessId, Exit),
    /// A SIGKILL was asked for a while ago.
    KillOverdue(ProcessId),
    /// A container's ready probe has succeeded, or not and why.
    Probed(String, Result<(), String>),
}

/// Handle of a sandbox. Clones mean the same sandbox.
#[derive(Clone)]
pub struct Sandbox {
    owner: mpsc::Sender<Message>,
}

impl Sandbox {
    /// Starts the owner task. Nothing runs yet: the first Create boots the VM. The task ends after
    /// Shutdown, or when no container came or was left for a while; then nothing of the sandbox
    /// exists any more.
    pub fn spawn(
        identity: Identity,
        config: Config,
        host: Arc<dyn Host>,
        publisher: Publisher,
    ) -> (Sandbox, JoinHandle<()>) {
        let (sender, messages) = mpsc::channel(QUEUE);
        let owner = owner::Owner::new(identity, config, host, publisher, sender.clone());
        (Sandbox { owner: sender }, tokio::spawn(owner.run(messages)))
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.owner.send(Message::Request(request(reply))).await.map_err(|_| Error::ShuttingDown)?;
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Creates a container, after booting the VM if it is the first. Gives the pid for containerd.
    pub async fn create(&self, request: CreateRequest) -> Result<u32, Error> {
        let plan = spawn_blocking(|| -> Result<Plan, Error> {
            let spec = spec::load(&request.bundle)?;
            let annotations = annotations::parse(spec::annotations(&spec)?)?;
            let restore = request.restore.clone().or_else(|| annotations.restore.clone());
            Ok(Plan { request, spec, annotations, restore })
        });
        let plan = Box::new(plan.await??);
        self.ask(|reply| Request::Create(plan, reply)).await
    }

    /// Starts a created process. Gives the pid for containerd.
    pub async fn start(&self, process: ProcessId) -> Result<u32, Error> {
        self.ask(|reply| Request::Start(process, reply)).await
    }

    /// Registers another process in a running container.
    pub async fn exec(&self, request: ExecRequest) -> Result<(), Error> {
        self.ask(|reply| Request::Exec(Box::new(request), reply)).await
    }

    /// Sends a signal. SIGKILL of the sandbox's main container ends the VM if the guest is hung or paused;
    /// other signals wait for the end of a pause.
    pub async fn kill(&self, request: KillRequest) -> Result<(), Error> {
        self.ask(|reply| Request::Kill(request, reply)).await
    }

    /// Stops the VM of the sandbox whose main container is `id`, with everything that runs in it.
    pub async fn pause(&self, id: String) -> Result<(), Error> {
        self.ask(|reply| Request::Pause(id, reply)).await
    }

    /// Lets a paused sandbox go on, also one that is paused to disk.
    pub async fn resume(&self, id: String) -> Result<(), Error> {
        self.ask(|reply| Request::Resume(id, reply)).await
    }

    /// Stops the VM, whatever the id of its main container.
    pub async fn pause_all(&self) -> Result<(), Error> {
        self.ask(Request::PauseAll).await
    }

    /// Writes the memory of a running or paused sandbox to disk, and ends its VMM. For containerd it is
    /// paused then.
    pub async fn pause_to_disk(&self) -> Result<(), Error> {
        self.ask(Request::PauseToDisk).await
    }

    /// Lets a sandbox go on that is paused, in memory or to disk.
    pub async fn resume_all(&self) -> Result<(), Error> {
        self.ask(Request::ResumeAll).await
    }

    /// Puts a running or paused sandbox back to a snapshot of its own, by name or path; it runs then.
    pub async fn rollback(&self, snapshot: String) -> Result<(), Error> {
        self.ask(|reply| Request::Rollback(snapshot, reply)).await
    }

    /// Takes a snapshot; of a template build once it is ready. The sandbox stands still while memory and
    /// disks are written, and is then as it
    /// was before: running, or paused.
    pub async fn snapshot(&self, request: SnapshotRequest) -> Result<Listed, Error> {
        self.ask(|reply| Request::Snapshot(request, reply)).await
    }

    /// Removes a process that does not run; for init, the whole container, and for the sandbox's main
    /// container everything.
    pub async fn delete(&self, process: ProcessId) -> Result<Deleted, Error> {
        self.ask(|reply| Request::Delete(process, reply)).await
    }

    /// Resolves when the process has exited.
    pub async fn wait(&self, process: ProcessId) -> Result<Exit, Error> {
        self.ask(|reply| Request::Wait(process, reply)).await
    }

    /// The state of a process, from memory.
    pub async fn state(&self, process: ProcessId) -> Result<ProcessState, Error> {
        self.ask(|reply| Request::State(process, reply)).await
    }

    /// The pid that containerd is told for container `id`, from memory; never 0.
    pub async fn pid(&self, id: String) -> Result<u32, Error> {
        self.ask(|reply| Request::Pid(id, reply)).await
    }

    /// The processes of a container: fresh if the guest answers within a second, else those that were started
    /// through containerd.
    pub async fn pids(&self, id: String) -> Result<Pids, Error> {
        self.ask(|reply| Request::Pids(id, reply)).await
    }

    /// Metrics of a container: fresh if the guest answers within a second, else the last known.
    pub async fn stats(&self, id: String) -> Result<Any, Error> {
        self.ask(|reply| Request::Stats(id, reply)).await
    }

    /// Changes the limits of a container; `resources` as containerd packed them.
    pub async fn update(&self, id: String, resources: Any) -> Result<(), Error> {
        self.ask(|reply| Request::Update(id, resources, reply)).await
    }

    /// Sets the size of a process's terminal, in characters.
    pub async fn resize(&self, process: ProcessId, width: u32, height: u32) -> Result<(), Error> {
        self.ask(|reply| Request::Resize(process, width, height, reply)).await
    }

    /// Ends a process's stdin once its FIFO is drained.
    pub async fn close_stdin(&self, process: ProcessId) -> Result<(), Error> {
        self.ask(|reply| Request::CloseIo(process, reply)).await
    }

    /// Everything that is known of the sandbox, from memory, in every state.
    pub async fn status(&self) -> Result<SandboxStatus, Error> {
        self.ask(Request::Status).await
    }

    /// Waits until every container is ready, for at most `limit`, and tells how far it has come then.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] if a container has exited that would have to be ready.
    pub async fn wait_ready(&self, limit: Duration) -> Result<SandboxReadiness, Error> {
        match timeout(limit, self.ask(Request::WhenReady)).await {
            Ok(readiness) => readiness,
            Err(_) => self.ask(Request::Readiness).await,
        }
    }

    /// Ends the shim, if no container is left.
    pub async fn shutdown(&self) -> Result<(), Error> {
        self.ask(Request::Shutdown).await
    }
}
