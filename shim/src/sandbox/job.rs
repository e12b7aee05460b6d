//! What the owner does not wait for: calls to the guest and clean-up. Each job ends with a report to
//! the owner, or with the reply itself where no state depends on the outcome.

use std::{path::PathBuf, sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::{self, Status},
    cgroups_v2::metrics::Metrics,
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
};
use cube_protocol::{
    guest::{CreateOptions, PutSpecRequest, QuiesceResponse},
    spec::{PART, WHOLE_MAX},
};
use futures::future::join_all;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tracing::{error, warn};
use ttrpc::Code;

use super::{
    Deleted, ExecRequest, Host, KillRequest, ProcessId, Reply, SnapshotRequest,
    create::Created,
    machine::Machine,
    pause,
    process::Stdio,
    rollback::{Replaced, Unreplaced},
    snapshot::Taken,
    suspend::Loaded,
};
use crate::{
    agent::{Agent, AgentError, Clients, Dial},
    errors::{Error, chain},
    snapshot::Listed,
    state::RunDir,
    stdio::{Begin, Flows, LogConfig, ProcessIo, StdioConfig},
};

/// Deadlines of calls to the guest. An emulated guest takes its time to set a container up.
const CREATE_LIMIT: Duration = Duration::from_secs(60);
const START_LIMIT: Duration = Duration::from_secs(30);
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// SIGKILL must work on a hung guest as well, and containerd waits for it.
const SIGKILL_LIMIT: Duration = Duration::from_secs(3);
/// How often a call whose answer was lost is looked after.
const LOOK: Duration = Duration::from_millis(20);
const STATS_LIMIT: Duration = Duration::from_secs(1);
const DELETE_LIMIT: Duration = Duration::from_secs(2);
/// How long a Delete that fails is repeated, and how often. The guest itself gives processes 5 s to die.
const FORGET_LIMIT: Duration = Duration::from_secs(8);
const DELETE_PAUSE: Duration = Duration::from_millis(200);
/// How long output that still flows may hold Delete up; what is stuck is given up earlier. Clients
/// delete an exec the moment it exits, with as much of its output on the way as the guest buffers.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// The same with the guest gone: then only what is in the log already can be delivered.
const ORPHAN_DRAIN_LIMIT: Duration = Duration::from_millis(500);
/// How long the guest may take to agree to power off.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take then: the agent gives file systems 5 s to be written out, and a VM that is
/// killed meanwhile loses what was written to its disks.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(6);

/// The metrics of every guest.
const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// How a job ended.
#[allow(clippy::large_enum_variant, reason = "there is one at a time, in the box that Message has for it")]
pub(super) enum Report {
    Created { id: String, result: Result<Created, Error>, reply: Reply<u32> },
    Execed { process: ProcessId, result: Result<ProcessIo, Error>, reply: Reply<()> },
    Started { process: ProcessId, result: Result<u32, Error>, reply: Reply<u32> },
    Paused { id: String, result: Result<QuiesceResponse, pause::Failed>, reply: Reply<()> },
    Resumed { id: String, result: Result<(), Error>, reply: Reply<()> },
    Suspended { id: String, paused: bool, result: Result<QuiesceResponse, pause::Failed>, reply: Reply<()> },
    Replaced { id: String, paused: bool, result: Result<Replaced, Box<Unreplaced>>, reply: Reply<()> },
    RolledBack { id: String, paused: bool, result: Result<(), Error>, reply: Reply<()> },
    Loaded { id: String, result: Result<Loaded, Error>, reply: Reply<()> },
    MemberPaused { id: String, result: Result<(), Error>, reply: Reply<()> },
    MemberResumed { id: String, result: Result<(), Error>, reply: Reply<()> },
    Snapshotted { request: SnapshotRequest, result: Result<Taken, pause::Failed>, reply: Reply<Listed> },
    Deleted { process: ProcessId, deleted: Deleted, reply: Reply<Deleted> },
    Stats { id: String, result: Result<Any, Error>, reply: Reply<Any> },
}

impl Report {
    /// Whether the job has changed the sandbox, or tried to.
    pub(super) fn is_of_work(&self) -> bool {
        match self {
            Report::Created { .. }
            | Report::Execed { .. }
            | Report::Started { .. }
            | Report::MemberPaused { .. }
            | Report::MemberResumed { .. }
            | Report::Deleted { .. } => true,
            Report::Paused { .. }
            | Report::Resumed { .. }
            | Report::Suspended { .. }
            | Report::Loaded { .. }
            | Report::Replaced { .. }
            | Report::RolledBack { .. }
            | Report::Snapshotted { .. }
            | Report::Stats { .. } => false,
        }
    }
}

/// The way to a guest that runs.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) agent: Agent,
    pub(super) machine: Machine,
    /// For streams.
    pub(super) dial: Arc<dyn Dial>,
    /// Whether the streams flow, and on which timeline.
    pub(super) flows: Flows,
    /// Of a guest that was restored: the id of its container for containerd, and in the guest.
    pub(super) alias: Option<Arc<(String, String)>>,
}

impl Guest {
    /// The id in the guest of what is container `id` for containerd.
    pub(super) fn inside(&self, id: String) -> String {
        match &self.alias {
            Some(alias) if alias.0 == id => alias.1.clone(),
            _ => id,
        }
    }

    /// The id for containerd of what is container `id` in the guest.
    pub(super) fn outside(&self, id: &str) -> String {
        match &self.alias {
            Some(alias) if alias.1 == id => alias.0.clone(),
            _ => id.into(),
        }
    }
}

/// What the stdio module needs to know of a process.
pub(super) fn stdio_config(
    namespace: &str,
    process: &ProcessId,
    guest_container_id: String,
    stdio: &Stdio,
    log: Option<LogConfig>,
) -> StdioConfig {
    let Stdio { terminal, stdin, stdout, stderr } = stdio.clone();
    let (container_id, exec_id) = (process.container.clone(), process.exec.clone());
    StdioConfig {
        namespace: namespace.into(),
        container_id,
        guest_container_id,
        exec_id,
        terminal,
        stdin,
        stdout,
        stderr,
        log,
        begin: Begin::default(),
    }
}

/// How the agent is told that it must make a stream: any text but the empty one does.
pub(super) fn stream(wanted: bool) -> String {
    if wanted { "stream".into() } else { String::new() }
}

/// Registers an exec in the guest and begins to relay its stdio.
pub(super) async fn exec(guest: Guest, namespace: String, request: ExecRequest) -> Result<ProcessIo, Error> {
    let ExecRequest { process, spec, stdio } = request;
    let inside = guest.inside(process.container.clone());
    let mut io = ProcessIo::prepare(stdio_config(&namespace, &process, inside.clone(), &stdio, None)).await?;
    let wanted = io.wanted();
    let call = api::ExecProcessRequest {
        id: inside,
        exec_id: process.exec,
        terminal: stdio.terminal,
        stdin: stream(wanted.stdin),
        stdout: stream(wanted.stdout),
        stderr: stream(wanted.stderr),
        spec: MessageField::some(spec),
        ..Default::default()
    };
    let made = guest
        .agent
        .call("Exec", CALL_LIMIT, call, |c, ctx, call| async move { c.task.exec(ctx, &call).await });
    match made.await {
        // The owner has checked that the id is new.
        Err(e) if e.may_be_done(Code::ALREADY_EXISTS) => {}
        made => drop(made?),
    }
    io.start(guest.dial, &guest.flows);
    Ok(io)
}

/// Lets a created process run. Gives its pid in the guest.
pub(super) async fn start(guest: Guest, process: ProcessId) -> Result<u32, Error> {
    let ProcessId { container, exec } = process;
    let call = api::StartRequest { id: guest.inside(container), exec_id: exec, ..Default::default() };
    cube_fault::point("run.before_start");
    let deadline = Instant::now() + START_LIMIT;
    let mut lost = false;
    loop {
        let request = call.clone();
        let started = guest.agent.call("Start", START_LIMIT, request, |c, ctx, call| async move {
            c.task.start(ctx, &call).await
        });
        let error = match started.await {
            Ok(started) => {
                cube_fault::point("run.process_started");
                return Ok(started.pid);
            }
            Err(error) => error,
        };
        lost |= error.may_be_done(Code::FAILED_PRECONDITION);
        let AgentError::Refused { status, .. } = &error else { return Err(error.into()) };
        if !lost || status.code() != Code::FAILED_PRECONDITION || Instant::now() >= deadline {
            return Err(error.into());
        }
        // What the lost request began may still be under way, and may yet fail.
        let state = state(&guest.agent, &call.id, &call.exec_id).await?;
        if state.status.enum_value() != Ok(Status::CREATED) {
            return Ok(state.pid);
        }
        sleep(LOOK).await;
    }
}

/// Brings the `config.json` of `container` into the guest, in parts if it has to be, and gives what its Create
/// says of it.
pub(super) async fn bring_spec(
    agent: &Agent,
    container: &str,
    spec: Vec<u8>,
) -> Result<CreateOptions, AgentError> {
    if spec.len() <= WHOLE_MAX {
        return Ok(CreateOptions { spec, ..Default::default() });
    }
    let total_bytes = spec.len() as u64;
    for (index, part) in spec.chunks(PART).enumerate() {
        let call = PutSpecRequest {
            container_id: container.into(),
            total_bytes,
            offset: (index * PART) as u64,
            part: part.into(),
            ..Default::default()
        };
        agent
            .call(
                "PutSpec",
                CALL_LIMIT,
                call,
                |c, ctx, call| async move { c.guest.put_spec(ctx, &call).await },
            )
            .await?;
    }
    Ok(CreateOptions { spec_bytes: total_bytes, ..Default::default() })
}

/// Makes a container with an init process that does not run yet; gives its pid in the guest.
pub(super) async fn create(agent: &Agent, call: api::CreateTaskRequest) -> Result<u32, AgentError> {
    let deadline = Instant::now() + CREATE_LIMIT;
    let mut lost = false;
    loop {
        let request = call.clone();
        let created = agent.call("Create", CREATE_LIMIT, request, |c, ctx, call| async move {
            c.task.create(ctx, &call).await
        });
        let error = match created.await {
            Ok(created) => return Ok(created.pid),
            Err(error) => error,
        };
        lost |= error.may_be_done(Code::ALREADY_EXISTS);
        let AgentError::Refused { status, .. } = &error else { return Err(error) };
        if !lost || status.code() != Code::ALREADY_EXISTS || Instant::now() >= deadline {
            return Err(error);
        }
        // What the lost request began does not exist before it is complete, and may yet fail.
        match state(agent, &call.id, "").await {
            Ok(state) => return Ok(state.pid),
            Err(AgentError::Refused { status, .. }) if status.code() == Code::NOT_FOUND => {}
            Err(error) => return Err(error),
        }
        sleep(LOOK).await;
    }
}

pub(super) async fn state(
    agent: &Agent,
    container: &str,
    exec: &str,
) -> Result<api::StateResponse, AgentError> {
    let call = api::StateRequest { id: container.into(), exec_id: exec.into(), ..Default::default() };
    agent.call("State", CALL_LIMIT, call, |c, ctx, call| async move { c.task.state(ctx, &call).await }).await
}

/// Sends a signal. If the guest does not take it and `last_resort` is set, SIGKILL ends the VM.
pub(super) async fn kill(guest: Guest, request: KillRequest, last_resort: bool) -> Result<(), Error> {
    let sigkill = request.signal == libc::SIGKILL as u32;
    let limit = if sigkill { SIGKILL_LIMIT } else { CALL_LIMIT };
    let ProcessId { container, exec } = request.process;
    let call = api::KillRequest {
        id: guest.inside(container),
        exec_id: exec,
        signal: request.signal,
        all: request.all,
        ..Default::default()
    };
    let answer = if sigkill {
        let send = |c: Clients, ctx, call| async move { c.task.kill(ctx, &call).await };
        guest.agent.call("Kill", limit, call, send).await
    } else {
        guest.agent.call_once("Kill", limit, |c, ctx| async move { c.task.kill(ctx, &call).await }).await
    };
    match answer {
        Ok(_) => Ok(()),
        Err(e) if e.may_be_done(Code::NOT_FOUND) => Ok(()),
        // It may have exited a moment ago; the owner waits for it to be told.
        Err(e) if e.is_not_found() => Err(e.into()),
        Err(e) if sigkill && last_resort => {
            warn!("the guest did not take SIGKILL, killing its VM: {}", chain(&e));
            guest.machine.kill().await;
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Metrics of a container.
pub(super) async fn stats(guest: Guest, id: String) -> Result<Any, Error> {
    let call = api::StatsRequest { id: guest.inside(id), ..Default::default() };
    let answer = guest
        .agent
        .call("Stats", STATS_LIMIT, call, |c, ctx, call| async move { c.task.stats(ctx, &call).await })
        .await?;
    Ok(whole(answer.stats.unwrap_or_default()))
}

/// Puts empty messages where metrics have none: clients read their fields without looking whether they are
/// there, and a guest must not be able to make them crash.
fn whole(stats: Any) -> Any {
    // What cannot be read has no figures.
    let mut metrics = Metrics::parse_from_bytes(&stats.value).unwrap_or_else(|e| {
        warn!("the guest's metrics cannot be read: {e}");
        Metrics::default()
    });
    metrics.pids.mut_or_insert_default();
    metrics.cpu.mut_or_insert_default();
    metrics.memory.mut_or_insert_default();
    metrics.rdma.mut_or_insert_default();
    metrics.io.mut_or_insert_default();
    metrics.memory_events.mut_or_insert_default();
    // Encoding into memory fails only for a message beyond 2 GiB.
    let value = metrics.write_to_bytes().unwrap_or_default();
    Any { type_url: METRICS_TYPE.into(), value, ..Default::default() }
}

/// Pids in the guest of every process of a container.
pub(super) async fn pids(guest: Guest, id: String) -> Result<Vec<u32>, Error> {
    let call = api::PidsRequest { id: guest.inside(id), ..Default::default() };
    let send = |c: Clients, ctx, call| async move { c.task.pids(ctx, &call).await };
    let answer = guest.agent.call("Pids", STATS_LIMIT, call, send).await?;
    Ok(answer.processes.iter().map(|process| process.pid).collect())
}

/// Freezes the processes of a container. If that fails, they run.
pub(super) async fn pause(guest: Guest, id: String) -> Result<(), Error> {
    let call = api::PauseRequest { id: guest.inside(id.clone()), ..Default::default() };
    let send = |c: Clients, ctx, call| async move { c.task.pause(ctx, &call).await };
    match guest.agent.call("Pause", CALL_LIMIT, call, send).await {
        Ok(_) => Ok(()),
        Err(e @ AgentError::Refused { .. }) => Err(e.into()),
        // It may be done all the same.
        Err(e) => {
            if let Err(e) = resume(guest, id).await {
                warn!("the way back from a pause failed: {}", chain(&e));
            }
            Err(e.into())
        }
    }
}

/// Lets them go on.
pub(super) async fn resume(guest: Guest, id: String) -> Result<(), Error> {
    let call = api::ResumeRequest { id: guest.inside(id), ..Default::default() };
    let send = |c: Clients, ctx, call| async move { c.task.resume(ctx, &call).await };
    guest.agent.call("Resume", CALL_LIMIT, call, send).await?;
    Ok(())
}

/// Changes limits.
pub(super) async fn update(guest: Guest, id: String, resources: Any) -> Result<(), Error> {
    let id = guest.inside(id);
    let call = api::UpdateTaskRequest { id, resources: MessageField::some(resources), ..Default::default() };
    let send = |c: Clients, ctx, call| async move { c.task.update(ctx, &call).await };
    guest.agent.call("Update", CALL_LIMIT, call, send).await?;
    Ok(())
}

/// Sets a window size.
pub(super) async fn resize(guest: Guest, process: ProcessId, width: u32, height: u32) -> Result<(), Error> {
    let ProcessId { container, exec } = process;
    let id = guest.inside(container);
    let call = api::ResizePtyRequest { id, exec_id: exec, width, height, ..Default::default() };
    let send = |c: Clients, ctx, call| async move { c.task.resize_pty(ctx, &call).await };
    guest.agent.call("ResizePty", CALL_LIMIT, call, send).await?;
    Ok(())
}

/// What is to be removed.
pub(super) struct Removal {
    /// The processes that go, with their stdio, the one that was asked for last.
    pub(super) processes: Vec<(ProcessId, Option<ProcessIo>)>,
    /// Containers whose rootfs goes.
    pub(super) containers: Vec<String>,
    /// The guest, if it still runs.
    pub(super) guest: Option<Guest>,
    /// Whether the whole sandbox goes; names its cgroup.
    pub(super) sandbox: Option<PathBuf>,
}

/// Removes processes, containers, and the sandbox. Nothing that fails stops the rest: what is left
/// over is for `shim delete`, which containerd runs after every Delete.
pub(super) async fn remove(removal: Removal, host: Arc<dyn Host>, run_dir: RunDir) {
    let Removal { processes, containers, guest, sandbox } = removal;
    let (ids, ios): (Vec<_>, Vec<_>) = processes.into_iter().unzip();
    let limit = if guest.is_some() { DRAIN_LIMIT } else { ORPHAN_DRAIN_LIMIT };
    join_all(ids.iter().zip(ios).filter_map(|(id, io)| Some(finish(id, io?, limit)))).await;
    cube_fault::point("delete.drained");

    match (&guest, &sandbox) {
        (Some(guest), Some(_)) => power_off(guest).await,
        (Some(guest), None) => forget(guest, &ids, &containers).await,
        (None, _) => {}
    }
    cube_fault::point("delete.guest_ended");
    let released = spawn_blocking(move || {
        for id in &containers {
            if let Err(e) = host.release_rootfs(&run_dir, id) {
                warn!("cannot release the rootfs of {id:?}: {}", chain(&e));
            }
        }
        cube_fault::point("delete.rootfs_released");
        match sandbox {
            Some(cgroup) => host.destroy(&run_dir, &cgroup),
            None => Ok(()),
        }
    });
    match released.await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => warn!("cannot remove the sandbox: {}", chain(&e)),
        Err(e) => warn!("cannot remove the sandbox: {e}"),
    }
}

async fn finish(process: &ProcessId, io: ProcessIo, limit: Duration) {
    io.process_exited();
    let report = io.finish(limit).await;
    if !report.complete {
        warn!(container = process.container, exec = process.exec, "output was discarded: {report:?}");
    }
}

async fn power_off(guest: &Guest) {
    let call = api::ShutdownRequest { now: true, ..Default::default() };
    let told = guest
        .agent
        .call_once("Shutdown", SHUTDOWN_LIMIT, |c, ctx| async move { c.task.shutdown(ctx, &call).await })
        .await;
    match told {
        Ok(_) => guest.machine.shutdown(POWER_OFF_LIMIT).await,
        // An agent may power off before it has answered.
        Err(AgentError::Transport { .. }) => guest.machine.shutdown(POWER_OFF_LIMIT).await,
        Err(e) => {
            warn!("the guest cannot be told to power off: {}", chain(&e));
            guest.machine.kill().await;
        }
    }
}

/// Deletes in the guest: the containers, whose execs go with them, else the single exec.
async fn forget(guest: &Guest, processes: &[ProcessId], containers: &[String]) {
    let inits: Vec<ProcessId>;
    let targets = if containers.is_empty() {
        processes
    } else {
        inits =
            containers.iter().map(|id| ProcessId { container: id.clone(), exec: String::new() }).collect();
        &inits
    };
    for process in targets {
        if let Err(e) = delete_in(guest, process).await {
            let ProcessId { container, exec } = process;
            error!(container, exec, "it stays in the guest, and its id is taken there: {}", chain(&e));
        }
    }
}

/// Tries again after an error: processes may take their time to die, and what the guest keeps nobody will
/// ever delete.
async fn delete_in(guest: &Guest, process: &ProcessId) -> Result<(), AgentError> {
    let ProcessId { container, exec } = process.clone();
    let call = api::DeleteRequest { id: guest.inside(container), exec_id: exec, ..Default::default() };
    let deadline = Instant::now() + FORGET_LIMIT;
    loop {
        let request = call.clone();
        let answer = guest.agent.call("Delete", DELETE_LIMIT, request, |c, ctx, call| async move {
            c.task.delete(ctx, &call).await
        });
        match answer.await {
            Ok(_) => return Ok(()),
            Err(AgentError::Refused { status, .. }) if status.code() == Code::NOT_FOUND => return Ok(()),
            Err(e) if Instant::now() >= deadline => return Err(e),
            Err(e) => warn!("the guest cannot delete yet: {}", chain(&e)),
        }
        sleep(DELETE_PAUSE).await;
    }
}
