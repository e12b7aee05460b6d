//! The owner task: all state of a sandbox, and the only place where it changes.

mod create;
mod end;
mod member;
mod pause;
mod ready;
mod rollback;
mod run;
mod snapshot;
mod state;
mod status;
mod suspend;
mod template;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{api::Mount, protobuf::well_known_types::any::Any};
use cube_protocol::guest::QuiesceResponse;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, warn};

use self::{member::Motion, state::SandboxState};
use super::{
    Deleted, ExecRequest, Host, Identity, KillRequest, Message, Pids, ProcessId, ProcessState, Reply,
    Request, SnapshotRequest, Status,
    job::{self, Guest, Report},
    process::{Phase, Process},
    ready::{Ready, SandboxReadiness},
    restore::Restored,
    status::VmStatus,
};
use crate::{
    agent::GuestEvent,
    config::Config,
    errors::{Error, chain},
    events::{Publisher, TaskEvent},
    sandbox::Exit,
    snapshot::{Listed, Template},
    state::{FORMAT, State, now_ns},
    tenant::Tenant,
    vmm::Disk,
};

/// Events of the guest that may wait for the owner.
const GUEST_EVENTS: usize = 64;

struct Container {
    bundle: PathBuf,
    rootfs: Vec<Mount>,
    init: Process,
    execs: HashMap<String, Process>,
    /// Execs that came while the init process was being started: its output can be seen before its
    /// Start is answered, and a client that acts on it is right.
    early_execs: Vec<(ExecRequest, Reply<()>)>,
    /// Last known metrics.
    stats: Option<Any>,
    /// When containerd was last told that it is out of memory.
    oom: Option<Instant>,
    ready: Ready,
    /// Whether it runs, apart from its sandbox.
    motion: Motion,
    tenant: Tenant,
    /// If it is built for one.
    template: Option<Template>,
    /// Ends its creation; dropped afterwards.
    abort: Option<oneshot::Sender<()>>,
    /// If it was restored: how it goes on, and what takes the output of its processes that nobody knows.
    restored: Option<Arc<Restored>>,
}

impl Container {
    /// The exec with this id, or the init process for "".
    fn process(&mut self, exec: &str) -> Option<&mut Process> {
        if exec.is_empty() { Some(&mut self.init) } else { self.execs.get_mut(exec) }
    }
}

/// What brings the sandbox to rest as soon as nothing is under way that changes it.
enum Waiting {
    Pause(String, Reply<()>),
    /// To disk. For the main container, and whether it was paused before.
    Suspend {
        id: String,
        paused: bool,
        reply: Reply<()>,
    },
    Snapshot(SnapshotRequest, Reply<Listed>),
    /// To this snapshot. For the main container, and whether it was paused before.
    Rollback {
        snapshot: String,
        id: String,
        paused: bool,
        reply: Reply<()>,
    },
}

/// See the module.
pub(super) struct Owner {
    identity: Identity,
    config: Arc<Config>,
    host: Arc<dyn Host>,
    publisher: Publisher,
    /// To itself, for jobs.
    owner: mpsc::Sender<Message>,
    events: mpsc::Sender<GuestEvent>,
    guest_events: mpsc::Receiver<GuestEvent>,
    state: SandboxState,
    disk: State,
    containers: BTreeMap<String, Container>,
    guest: Option<Guest>,
    link: Option<JoinHandle<()>>,
    /// The VM that was booted, also after it has ended.
    vm: Option<VmStatus>,
    /// Jobs under way that change the sandbox.
    working: usize,
    /// What waits for them.
    waiting: Option<Waiting>,
    /// The guest at rest, while the sandbox is paused; without figures if it came to be so by a failure.
    rest: Option<QuiesceResponse>,
    /// Disks of the VM.
    disks: Vec<Disk>,
    /// Execs to be started at the end of a pause, which came between Exec and Start.
    waiting_starts: Vec<(ProcessId, Reply<u32>)>,
    /// Kills that wait for the end of a pause.
    waiting_kills: Vec<(KillRequest, Reply<()>)>,
    /// Deletes that came during a pause.
    waiting_deletes: Vec<(ProcessId, Reply<Deleted>)>,
    /// Deletes of what is being deleted already, and their answers.
    joined_deletes: Vec<(ProcessId, Deleted, Reply<Deleted>)>,
    /// Ends of stdin that came during a rollback.
    waiting_closes: Vec<ProcessId>,
    /// What the guest told during a rollback: it counts if that fails.
    held_events: Vec<GuestEvent>,
    /// Those who wait for the sandbox to be ready.
    waiting_ready: Vec<Reply<SandboxReadiness>>,
    /// Snapshots of a template that wait for it to be ready.
    waiting_builds: Vec<template::Waiting>,
    /// Connections refused to processes that are deleted.
    refused: u64,
    /// Pid of the VMM, also after it has ended; 0 before it is booted.
    pid: u32,
    idle_since: Option<Instant>,
    done: bool,
}

impl Owner {
    pub(super) fn new(
        identity: Identity,
        config: Config,
        host: Arc<dyn Host>,
        publisher: Publisher,
        owner: mpsc::Sender<Message>,
    ) -> Owner {
        let (events, guest_events) = mpsc::channel(GUEST_EVENTS);
        let disk = State {
            format: FORMAT,
            namespace: identity.namespace.clone(),
            sandbox_id: identity.id.clone(),
            cgroup: PathBuf::new(),
            shim_home: None,
            backend: String::new(),
            user: 0,
            vmm_pid: 0,
            timeline: 0,
            past_timelines: Vec::new(),
            suspended: None,
            created_ns: now_ns(),
            containers: BTreeMap::new(),
        };
        Owner {
            identity,
            config: Arc::new(config),
            host,
            publisher,
            owner,
            events,
            guest_events,
            state: SandboxState::Creating,
            disk,
            containers: BTreeMap::new(),
            guest: None,
            link: None,
            vm: None,
            working: 0,
            waiting: None,
            rest: None,
            disks: Vec::new(),
            waiting_starts: Vec::new(),
            waiting_kills: Vec::new(),
            waiting_deletes: Vec::new(),
            joined_deletes: Vec::new(),
            waiting_closes: Vec::new(),
            held_events: Vec::new(),
            waiting_ready: Vec::new(),
            waiting_builds: Vec::new(),
            refused: 0,
            pid: 0,
            idle_since: Some(Instant::now()),
            done: false,
        }
    }

    pub(super) async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        while !self.done {
            // A far future stands for "never".
            let wake = self.wakeup().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                // Neither channel ends: we hold a sender of each.
                Some(message) = messages.recv() => self.handle(message),
                Some(event) = self.guest_events.recv() => self.guest_event(event),
                () = sleep_until(wake) => self.look_around(),
            }
            self.answer_ready();
            self.look_at_builds();
        }
        self.clean_up().await;
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Request(request) => self.request(request),
            Message::Report(report) => self.report(*report),
            Message::VmmExited(exit) => self.vmm_exited(&exit),
            Message::ProcessExited(id, exit) => self.process_exited(&id, exit),
            Message::KillOverdue(id) => self.kill_overdue(&id),
            Message::Probed(container, found) => self.probed(&container, found),
        }
    }

    fn request(&mut self, request: Request) {
        // A reply that nobody waits for any more is dropped, here and everywhere below.
        match request {
            Request::Create(plan, reply) => self.create(*plan, reply),
            Request::Start(process, reply) => self.start(process, reply),
            Request::Exec(request, reply) => self.exec(*request, reply),
            Request::Kill(request, reply) => self.kill(request, reply),
            Request::Pause(id, reply) => self.pause(id, reply),
            Request::Resume(id, reply) => self.resume(id, reply),
            Request::PauseAll(reply) => self.pause(self.main_id(), reply),
            Request::PauseToDisk(reply) => self.suspend(reply),
            Request::ResumeAll(reply) => self.resume(self.main_id(), reply),
            Request::Rollback(snapshot, reply) => self.rollback(snapshot, reply),
            Request::Snapshot(request, reply) => self.snapshot(request, reply),
            Request::Delete(process, reply) => self.delete(process, reply),
            Request::Wait(process, reply) => match self.known(&process) {
                Ok(process) => process.wait(reply),
                Err(e) => drop(reply.send(Err(e))),
            },
            Request::State(process, reply) => drop(reply.send(self.process_state(&process))),
            Request::Pid(id, reply) => {
                let pid = self.pid;
                drop(reply.send(self.known(&init_of(&id)).map(|_| pid)));
            }
            Request::Pids(id, reply) => self.pids(id, reply),
            Request::Stats(id, reply) => self.stats(id, reply),
            Request::Update(id, resources, reply) => match self.guest_of(&init_of(&id)) {
                Ok(guest) => answer_later(reply, job::update(guest, id, resources)),
                Err(e) => drop(reply.send(Err(e))),
            },
            Request::Resize(process, width, height, reply) => match self.guest_of(&process) {
                Ok(guest) => answer_later(reply, job::resize(guest, process, width, height)),
                Err(e) => drop(reply.send(Err(e))),
            },
            Request::CloseIo(process, reply) => drop(reply.send(self.close_stdin(process))),
            Request::Status(reply) => drop(reply.send(Ok(self.status()))),
            Request::WhenReady(reply) => self.when_ready(reply),
            Request::Readiness(reply) => drop(reply.send(self.readiness())),
            Request::Shutdown(reply) => {
                self.done = self.containers.is_empty();
                drop(reply.send(Ok(())));
            }
        }
    }

    fn report(&mut self, report: Report) {
        if report.is_of_work() {
            self.working -= 1;
        }
        self.take(report);
        self.begin_waiting();
    }

    fn take(&mut self, report: Report) {
        match report {
            Report::Created { id, result, reply } => {
                let created = self.created(&id, result);
                cube_fault::point("create.before_reply");
                drop(reply.send(created));
            }
            Report::Execed { process, result, reply } => drop(reply.send(self.execed(&process, result))),
            Report::Started { process, result, reply } => {
                let started = self.started(&process, result);
                cube_fault::point("run.before_reply");
                drop(reply.send(started));
            }
            Report::Paused { id, result, reply } => drop(reply.send(self.paused(&id, result))),
            Report::Resumed { id, result, reply } => drop(reply.send(self.resumed(&id, result))),
            Report::Suspended { id, paused, result, reply } => {
                drop(reply.send(self.suspended(&id, paused, result)));
            }
            Report::Replaced { id, paused, result, reply } => self.replaced(id, paused, result, reply),
            Report::RolledBack { id, paused, result, reply } => {
                drop(reply.send(self.rolled_back(&id, paused, result)));
            }
            Report::Loaded { id, result, reply } => drop(reply.send(self.loaded(&id, result))),
            Report::MemberPaused { id, result, reply } => drop(reply.send(self.member_paused(&id, result))),
            Report::MemberResumed { id, result, reply } => drop(reply.send(self.member_resumed(&id, result))),
            Report::Snapshotted { request, result, reply } => self.snapshotted(request, result, reply),
            Report::Deleted { process, deleted, reply } => {
                self.deleted(&process, deleted);
                cube_fault::point("delete.before_reply");
                drop(reply.send(Ok(deleted)));
                self.answer_joined_deletes();
            }
            Report::Stats { id, result, reply } => {
                let container = self.containers.get_mut(&id);
                drop(reply.send(match (result, container) {
                    (Ok(stats), Some(container)) => Ok(container.stats.insert(stats).clone()),
                    (Err(e), Some(Container { stats: Some(stats), .. })) => {
                        debug!("answering with the last known metrics: {}", chain(&e));
                        Ok(stats.clone())
                    }
                    (result, _) => result,
                }));
            }
        }
    }

    fn close_stdin(&mut self, id: ProcessId) -> Result<(), Error> {
        let lent = self.state == SandboxState::RollingBack;
        match &self.known(&id)?.io {
            Some(io) => io.close_stdin(),
            None if lent => self.waiting_closes.push(id),
            None => {}
        }
        Ok(())
    }

    fn process_state(&mut self, id: &ProcessId) -> Result<ProcessState, Error> {
        let (pid, state, motion) = (self.pid, self.state, self.motion(&id.container));
        let process = self.known(id)?;
        let (status, stdio, exit) = (process.status(), process.stdio.clone(), process.exit());
        let bundle = self.containers.get(&id.container).map(|container| container.bundle.clone());
        let status = match (status, state) {
            (Status::Running, SandboxState::Pausing | SandboxState::Suspending) => Status::Pausing,
            (Status::Running, state) if state.is_pause() => Status::Paused,
            (Status::Running, _) => motion.status(),
            (status, _) => status,
        };
        Ok(ProcessState { bundle: bundle.unwrap_or_default(), pid, status, stdio, exit })
    }

    fn pids(&mut self, id: String, reply: Reply<Pids>) {
        let (reported, guest) = (self.pid, self.guest_of(&init_of(&id)).ok());
        if let Err(e) = self.known(&init_of(&id)) {
            return drop(reply.send(Err(e)));
        }
        let started = self.containers.get(&id).into_iter().flat_map(|container| {
            let alive =
                container.execs.values().chain([&container.init]).filter(|process| !process.is_over());
            alive.map(|process| process.guest_pid).filter(|pid| *pid != 0)
        });
        let started = started.collect();
        match guest {
            Some(guest) => answer_later(reply, async move {
                let guest = job::pids(guest, id).await.unwrap_or_else(|e| {
                    debug!("answering with the processes that were started: {}", chain(&e));
                    started
                });
                Ok(Pids { reported, guest })
            }),
            None => drop(reply.send(Ok(Pids { reported, guest: started }))),
        }
    }

    fn stats(&mut self, id: String, reply: Reply<Any>) {
        let known = self.known(&init_of(&id)).map(drop);
        match (known, &self.guest) {
            (Err(e), _) => drop(reply.send(Err(e))),
            (Ok(()), Some(guest)) if !self.state.is_pause() => {
                let guest = guest.clone();
                self.later(async move {
                    let result = job::stats(guest, id.clone()).await;
                    Report::Stats { id, result, reply }
                });
            }
            (Ok(()), _) => {
                let result = Err(self.wrong_state("there are no metrics from before"));
                self.take(Report::Stats { id, result, reply });
            }
        }
    }

    /// A process that containerd knows: one that is still being created does not exist for it.
    fn known(&mut self, id: &ProcessId) -> Result<&mut Process, Error> {
        let container = self.containers.get_mut(&id.container);
        let container = container.ok_or_else(|| not_found("container", &id.container))?;
        let (what, name) = name_of(id);
        container
            .process(&id.exec)
            .filter(|process| process.phase != Phase::Creating)
            .ok_or_else(|| not_found(what, name))
    }

    /// The guest, for a call that concerns process `id`.
    fn guest_of(&mut self, id: &ProcessId) -> Result<Guest, Error> {
        self.known(id)?;
        match &self.guest {
            Some(guest) if !self.state.is_pause() => Ok(guest.clone()),
            Some(_) => Err(self.wrong_state("it must be resumed first")),
            None => Err(self.wrong_state("its VM must be running")),
        }
    }

    fn wrong_state(&self, needed: &'static str) -> Error {
        Error::State { what: "sandbox", id: self.identity.id.clone(), state: self.state.name(), needed }
    }

    fn publish_exit(&self, id: &ProcessId, exit: Exit) {
        let (_, name) = name_of(id);
        self.publisher.publish(TaskEvent::exit(&id.container, name, self.pid, exit.status, exit.at_ns));
    }

    async fn clean_up(self) {
        let (host, run_dir, cgroup) = (self.host, self.identity.run_dir, self.disk.cgroup);
        let removed = spawn_blocking(move || host.destroy(&run_dir, &cgroup)).await;
        if let Ok(Err(e)) = removed {
            warn!("cannot remove the sandbox: {}", chain(&e));
        }
    }

    fn save(&self) {
        if let Err(e) = self.identity.run_dir.save(&self.disk) {
            error!("cannot keep the state: {}", chain(&e));
        }
    }

    /// Runs a job that changes the sandbox: a pause waits for its report.
    fn work(&mut self, job: impl Future<Output = Report> + Send + 'static) {
        self.working += 1;
        self.later(job);
    }

    fn later(&self, job: impl Future<Output = Report> + Send + 'static) {
        let owner = self.owner.clone();
        tokio::spawn(async move {
            // Fails only when the owner has ended, and then nobody waits for the reply.
            let _ = owner.send(Message::Report(Box::new(job.await))).await;
        });
    }
}

fn answer_later<T: Send + 'static>(
    reply: Reply<T>,
    job: impl Future<Output = Result<T, Error>> + Send + 'static,
) {
    tokio::spawn(async move { drop(reply.send(job.await)) });
}

fn init_of(container: &str) -> ProcessId {
    ProcessId { container: container.into(), exec: String::new() }
}

/// What a process is for containerd's clients, and under which name.
fn name_of(id: &ProcessId) -> (&'static str, &str) {
    if id.is_init() { ("container", &id.container) } else { ("exec", &id.exec) }
}

fn not_found(what: &'static str, id: &str) -> Error {
    Error::NotFound { what, id: id.into(), state: "does not exist" }
}

fn gone(id: &ProcessId) -> Error {
    let (what, name) = name_of(id);
    Error::NotFound { what, id: name.into(), state: "has exited already" }
}

/// Of a container whose first process has exited, and waits for who reads its output.
fn over(id: &str, needed: &'static str) -> Error {
    let state = "over, with output that its reader has not taken";
    Error::State { what: "container", id: id.into(), state, needed }
}

fn wrong_phase(id: &ProcessId, phase: Phase, needed: &'static str) -> Error {
    let (what, name) = name_of(id);
    Error::State { what, id: name.into(), state: phase.name(), needed }
}
