//! The owner task: all state of a sandbox, and the only place where it changes.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    api::Mount, events::task as message, protobuf::MessageField, protobuf::well_known_types::any::Any,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, info, warn};

use super::{
    Deleted, ExecRequest, Host, Identity, KillRequest, Message, Plan, ProcessId, ProcessState, Reply,
    Request,
    create::{Booted, Created, Creation},
    job::{self, Guest, Removal, Report},
    process::{Exit, Phase, Process, Stdio},
    spec::Pod,
};
use crate::{
    agent::GuestEvent,
    config::Config,
    errors::{Error, chain},
    events::{Publisher, TaskEvent},
    state::{ContainerState, FORMAT, State, now_ns},
    stdio::{LogConfig, ProcessIo},
    vmm::VmmExit,
};

/// How long a shim without containers lives: containerd asks for a Create right after `start`, and
/// for a Shutdown right after the last Delete, if it has not crashed in between.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// How often a shim whose VM has ended looks whether `shim delete` has removed the sandbox.
const ORPHAN_INTERVAL: Duration = Duration::from_secs(2);

/// Events of the guest that may wait for the owner.
const GUEST_EVENTS: usize = 64;

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SandboxState {
    /// No VM yet.
    Creating,
    /// The guest answers.
    Running,
    /// The main container is being deleted, and everything with it.
    Stopping,
    /// The VM has ended, or could not be booted.
    Stopped,
}

impl SandboxState {
    fn name(self) -> &'static str {
        match self {
            SandboxState::Creating => "being created",
            SandboxState::Running => "running",
            SandboxState::Stopping => "being stopped",
            SandboxState::Stopped => "stopped",
        }
    }
}

struct Container {
    bundle: PathBuf,
    rootfs: Vec<Mount>,
    init: Process,
    execs: HashMap<String, Process>,
    /// Pid of the init process in the guest.
    guest_pid: u32,
    /// Last known metrics.
    stats: Option<Any>,
    /// Ends its creation; dropped afterwards.
    abort: Option<oneshot::Sender<()>>,
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
            backend: String::new(),
            vmm_pid: 0,
            timeline: 0,
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
        }
        self.clean_up().await;
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Request(request) => self.request(request),
            Message::Report(report) => self.report(report),
            Message::VmmExited(exit) => self.vmm_exited(&exit),
        }
    }

    fn request(&mut self, request: Request) {
        // A reply that nobody waits for any more is dropped, here and everywhere below.
        match request {
            Request::Create(plan, reply) => self.create(*plan, reply),
            Request::Start(process, reply) => self.start(process, reply),
            Request::Exec(request, reply) => self.exec(*request, reply),
            Request::Kill(request, reply) => self.kill(request, reply),
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
            Request::Stats(id, reply) => self.stats(id, reply),
            Request::Update(id, resources, reply) => match self.guest_of(&init_of(&id)) {
                Ok(guest) => answer_later(reply, job::update(guest, id, resources)),
                Err(e) => drop(reply.send(Err(e))),
            },
            Request::Resize(process, width, height, reply) => match self.guest_of(&process) {
                Ok(guest) => answer_later(reply, job::resize(guest, process, width, height)),
                Err(e) => drop(reply.send(Err(e))),
            },
            Request::CloseIo(process, reply) => {
                let closed = self.known(&process).map(|process| {
                    if let Some(io) = &process.io {
                        io.close_stdin();
                    }
                });
                drop(reply.send(closed));
            }
            Request::Shutdown(reply) => {
                self.done = self.containers.is_empty();
                drop(reply.send(Ok(())));
            }
        }
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Created { id, result, reply } => drop(reply.send(self.created(&id, result))),
            Report::Execed { process, result, reply } => drop(reply.send(self.execed(&process, result))),
            Report::Started { process, result, reply } => drop(reply.send(self.started(&process, result))),
            Report::Deleted { process, deleted, reply } => {
                self.deleted(&process, deleted);
                drop(reply.send(Ok(deleted)));
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

    // Create

    fn create(&mut self, plan: Plan, reply: Reply<u32>) {
        match self.admit(&plan) {
            Ok((creation_parts, abort)) => {
                let (log, joins) = creation_parts;
                let id = plan.request.id.clone();
                let creation = Creation {
                    identity: self.identity.clone(),
                    config: self.config.clone(),
                    host: self.host.clone(),
                    plan,
                    log,
                    state: self.disk.clone(),
                    joins,
                    owner: self.owner.clone(),
                    events: self.events.clone(),
                };
                self.later(async move {
                    let result = creation.run(abort).await;
                    Report::Created { id, result, reply }
                });
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// Checks whether the container may be created now, and notes it in memory and on disk.
    #[allow(clippy::type_complexity)]
    fn admit(
        &mut self,
        plan: &Plan,
    ) -> Result<((Option<LogConfig>, Option<(Guest, Pod)>), oneshot::Receiver<()>), Error> {
        let id = &plan.request.id;
        if self.containers.contains_key(id) {
            return Err(Error::AlreadyExists { what: "container", id: id.clone() });
        }
        let joins = match (self.state, &self.guest) {
            (SandboxState::Creating, _) if self.containers.is_empty() => None,
            (SandboxState::Running, Some(guest)) => Some((guest.clone(), self.pod())),
            _ => return Err(self.wrong_state("it must be running or new to take a container")),
        };
        if joins.is_none() {
            self.disk.cgroup = self.host.cgroup(self.identity.run_dir.key())?;
        }
        let log = self.log_config(plan);
        let bundle = plan.request.bundle.clone();
        let log_dir = log.as_ref().map(|log| log.dir.clone());
        let on_disk = ContainerState { bundle: bundle.clone(), log_dir, created_ns: now_ns() };
        self.disk.containers.insert(id.clone(), on_disk);
        if let Err(e) = self.identity.run_dir.create().and_then(|()| self.identity.run_dir.save(&self.disk)) {
            self.disk.containers.remove(id);
            return Err(e.into());
        }
        let (abort, aborted) = oneshot::channel();
        let container = Container {
            bundle,
            rootfs: plan.request.rootfs.clone(),
            init: Process::new(plan.request.stdio.clone()),
            execs: HashMap::new(),
            guest_pid: 0,
            stats: None,
            abort: Some(abort),
        };
        self.containers.insert(id.clone(), container);
        self.idle_since = None;
        Ok(((log, joins), aborted))
    }

    fn pod(&self) -> Pod {
        let guest_pid = self.containers.get(&self.identity.id).map(|main| main.guest_pid).unwrap_or_default();
        Pod { reported_pid: self.pid, guest_pid }
    }

    fn log_config(&self, plan: &Plan) -> Option<LogConfig> {
        if plan.request.stdio.terminal || !plan.annotations.log_forwarding {
            return None;
        }
        let log = &self.config.log;
        let dir = if log.dir == Path::new("bundle") {
            plan.request.bundle.clone()
        } else {
            log.dir.join(&self.identity.namespace).join(&plan.request.id)
        };
        Some(LogConfig { dir, segment_bytes: log.segment_bytes, segments: log.segments })
    }

    fn created(&mut self, id: &str, result: Result<Created, Error>) -> Result<u32, Error> {
        let Created { io, guest_pid, booted } = match result {
            Ok(created) => created,
            Err(e) => {
                self.forget_container(id);
                if self.guest.is_none() {
                    self.state = SandboxState::Stopped;
                }
                return Err(e);
            }
        };
        if let Some(Booted { guest, pid, backend, link }) = booted {
            self.disk.vmm_pid = pid;
            self.disk.timeline = guest.timeline;
            self.disk.backend = backend;
            (self.pid, self.guest, self.link) = (pid, Some(guest), Some(link));
            self.state = SandboxState::Running;
            self.save();
        }
        let pid = self.pid;
        let Some(container) = self.containers.get_mut(id) else { return Err(not_found("container", id)) };
        container.guest_pid = guest_pid;
        container.abort = None;
        container.init.io = Some(io);
        let Stdio { terminal, stdin, stdout, stderr } = container.init.stdio.clone();
        let stdio = message::TaskIO { stdin, stdout, stderr, terminal, ..Default::default() };
        self.publisher.publish(TaskEvent::create(&message::TaskCreate {
            container_id: id.into(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            rootfs: container.rootfs.clone(),
            io: MessageField::some(stdio),
            pid,
            ..Default::default()
        }));
        if let Some(exit) = container.init.settle(Phase::Created) {
            self.publish_exit(&init_of(id), exit);
        }
        Ok(pid)
    }

    // Start and Exec

    fn start(&mut self, id: ProcessId, reply: Reply<u32>) {
        let guest = self.guest_of(&id).and_then(|guest| {
            let process = self.known(&id)?;
            if process.phase != Phase::Created {
                return Err(wrong_phase(&id, process.phase, "only a created process can be started"));
            }
            process.phase = Phase::Starting;
            Ok(guest)
        });
        match guest {
            Ok(guest) => self.later(async move {
                let result = job::start(guest, id.clone()).await;
                Report::Started { process: id, result, reply }
            }),
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    fn started(&mut self, id: &ProcessId, result: Result<(), Error>) -> Result<u32, Error> {
        let pid = self.pid;
        let process = self.known(id)?;
        if process.phase != Phase::Starting {
            // The VM has ended meanwhile, which has been told already.
            return Err(wrong_phase(id, process.phase, "it ended before it was started"));
        }
        let exit = match &result {
            Ok(()) => {
                let exit = process.settle(Phase::Running);
                self.publisher.publish(if id.is_init() {
                    TaskEvent::start(&id.container, pid)
                } else {
                    TaskEvent::exec_started(&id.container, &id.exec, pid)
                });
                exit
            }
            Err(_) => process.settle(Phase::Created),
        };
        if let Some(exit) = exit {
            self.publish_exit(id, exit);
        }
        result.map(|()| pid)
    }

    fn exec(&mut self, request: ExecRequest, reply: Reply<()>) {
        match self.admit_exec(&request) {
            Ok(guest) => {
                let namespace = self.identity.namespace.clone();
                self.later(async move {
                    let process = request.process.clone();
                    let result = job::exec(guest, namespace, request).await;
                    Report::Execed { process, result, reply }
                });
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    fn admit_exec(&mut self, request: &ExecRequest) -> Result<Guest, Error> {
        let init = init_of(&request.process.container);
        let guest = self.guest_of(&init)?;
        let phase = self.known(&init)?.phase;
        if phase != Phase::Running {
            return Err(wrong_phase(&init, phase, "it must be running for an exec"));
        }
        let exec = &request.process.exec;
        let container = self.containers.get_mut(&init.container);
        let container = container.ok_or_else(|| not_found("container", &init.container))?;
        if container.execs.contains_key(exec) {
            return Err(Error::AlreadyExists { what: "exec", id: exec.clone() });
        }
        container.execs.insert(exec.clone(), Process::new(request.stdio.clone()));
        Ok(guest)
    }

    fn execed(&mut self, id: &ProcessId, result: Result<ProcessIo, Error>) -> Result<(), Error> {
        let container = self.containers.get_mut(&id.container);
        let container = container.ok_or_else(|| not_found("container", &id.container))?;
        match result {
            Ok(io) => {
                let process = container.execs.get_mut(&id.exec).ok_or_else(|| not_found("exec", &id.exec))?;
                process.io = Some(io);
                let exit = process.settle(Phase::Created);
                self.publisher.publish(TaskEvent::exec_added(&id.container, &id.exec));
                if let Some(exit) = exit {
                    self.publish_exit(id, exit);
                }
                Ok(())
            }
            Err(e) => {
                container.execs.remove(&id.exec);
                Err(e)
            }
        }
    }

    // Kill and Delete

    fn kill(&mut self, request: KillRequest, reply: Reply<()>) {
        let id = &request.process;
        if request.signal == libc::SIGKILL as u32
            && let Some(abort) = self.containers.get_mut(&id.container).and_then(|c| c.abort.take())
        {
            // The creation fails with it.
            let _ = abort.send(());
            drop(reply.send(Ok(())));
            return;
        }
        let last_resort = id.is_init() && self.is_main(&id.container);
        let guest = self.known(id).and_then(|process| match process.exit() {
            Some(_) => Err(gone(id)),
            None => Ok(()),
        });
        match guest.and_then(|()| self.guest_of(id)) {
            Ok(guest) => answer_later(reply, job::kill(guest, request, last_resort)),
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    fn is_main(&self, id: &str) -> bool {
        id == self.identity.id || self.containers.len() == 1
    }

    fn delete(&mut self, id: ProcessId, reply: Reply<Deleted>) {
        let phase = match self.known(&id) {
            Ok(process) => process.phase,
            Err(e) => return drop(reply.send(Err(e))),
        };
        match phase {
            Phase::Stopped(_) | Phase::Created => {}
            Phase::Creating | Phase::Starting | Phase::Running | Phase::Deleting(_) => {
                let needed = "it must have exited to be deleted";
                return drop(reply.send(Err(wrong_phase(&id, phase, needed))));
            }
        }
        let Some(exit) = self.begin_delete(&id) else {
            return drop(reply.send(Err(not_found("container", &id.container))));
        };
        let deleted = Deleted { pid: self.pid, exit };
        let removal = self.removal(&id);
        let (host, run_dir) = (self.host.clone(), self.identity.run_dir.clone());
        self.later(async move {
            job::remove(removal, host, run_dir).await;
            Report::Deleted { process: id, deleted, reply }
        });
    }

    fn begin_delete(&mut self, id: &ProcessId) -> Option<Exit> {
        let (exit, news) = self.known(id).ok()?.delete();
        if news {
            self.publish_exit(id, exit);
        }
        Some(exit)
    }

    /// Collects what goes with process `id`: an exec alone; a container with its execs; the main
    /// container with every member of its pod, for containerd 2 deletes none of them by itself.
    fn removal(&mut self, id: &ProcessId) -> Removal {
        let guest = self.guest.clone();
        if !id.is_init() {
            let io = self.known(id).ok().and_then(|process| process.io.take());
            return Removal {
                processes: vec![(id.clone(), io)],
                containers: Vec::new(),
                guest,
                sandbox: None,
            };
        }
        let everything = self.is_main(&id.container);
        let containers: Vec<String> = if everything {
            self.state = SandboxState::Stopping;
            self.containers.keys().cloned().collect()
        } else {
            vec![id.container.clone()]
        };
        let mut processes = Vec::new();
        for container in &containers {
            for process in self.process_ids(container) {
                if process != *id {
                    self.begin_delete(&process);
                }
                let io = self.known(&process).ok().and_then(|process| process.io.take());
                processes.push((process, io));
            }
        }
        let sandbox = everything.then(|| self.disk.cgroup.clone());
        Removal { processes, containers, guest, sandbox }
    }

    /// Every process of a container, init last.
    fn process_ids(&self, container: &str) -> Vec<ProcessId> {
        let execs = self.containers.get(container).into_iter().flat_map(|c| c.execs.keys());
        let exec = |exec: &String| ProcessId { container: container.into(), exec: exec.clone() };
        execs.map(exec).chain([init_of(container)]).collect()
    }

    fn deleted(&mut self, id: &ProcessId, deleted: Deleted) {
        if !id.is_init() {
            if let Some(container) = self.containers.get_mut(&id.container) {
                container.execs.remove(&id.exec);
            }
            return;
        }
        let gone: Vec<String> = match self.state {
            SandboxState::Stopping => self.containers.keys().cloned().collect(),
            _ => vec![id.container.clone()],
        };
        for container in gone {
            let exit = self.known(&init_of(&container)).ok().and_then(|init| init.exit());
            let Exit { status, at_ns } = exit.unwrap_or(deleted.exit);
            self.forget_container(&container);
            self.publisher.publish(TaskEvent::delete(&container, deleted.pid, status, at_ns));
        }
        if self.state == SandboxState::Stopping {
            self.state = SandboxState::Stopped;
            self.end_of_guest();
        } else {
            self.save();
        }
    }

    fn forget_container(&mut self, id: &str) {
        self.containers.remove(id);
        self.disk.containers.remove(id);
        if self.containers.is_empty() {
            self.idle_since = Some(Instant::now());
        }
    }

    // Questions

    fn process_state(&mut self, id: &ProcessId) -> Result<ProcessState, Error> {
        let pid = self.pid;
        self.known(id)?;
        let container =
            self.containers.get(&id.container).ok_or_else(|| not_found("container", &id.container))?;
        let process = match id.exec.as_str() {
            "" => &container.init,
            exec => container.execs.get(exec).ok_or_else(|| not_found("exec", exec))?,
        };
        Ok(ProcessState {
            bundle: container.bundle.clone(),
            pid,
            status: process.status(),
            stdio: process.stdio.clone(),
            exit: process.exit(),
        })
    }

    fn stats(&mut self, id: String, reply: Reply<Any>) {
        let known = self.known(&init_of(&id)).map(drop);
        match (known, &self.guest) {
            (Err(e), _) => drop(reply.send(Err(e))),
            (Ok(()), Some(guest)) => {
                let guest = guest.clone();
                self.later(async move {
                    let result = job::stats(guest, id.clone()).await;
                    Report::Stats { id, result, reply }
                });
            }
            (Ok(()), None) => {
                let result = Err(self.wrong_state("there are no metrics without a guest"));
                self.report(Report::Stats { id, result, reply });
            }
        }
    }

    /// A process that containerd knows: one that is still being created does not exist for it.
    fn known(&mut self, id: &ProcessId) -> Result<&mut Process, Error> {
        let container = self.containers.get_mut(&id.container);
        let container = container.ok_or_else(|| not_found("container", &id.container))?;
        let (what, name) = if id.is_init() { ("container", &id.container) } else { ("exec", &id.exec) };
        let process =
            if id.is_init() { Some(&mut container.init) } else { container.execs.get_mut(&id.exec) };
        process.filter(|process| process.phase != Phase::Creating).ok_or_else(|| not_found(what, name))
    }

    /// The guest, for a call that concerns process `id`.
    fn guest_of(&mut self, id: &ProcessId) -> Result<Guest, Error> {
        self.known(id)?;
        match &self.guest {
            Some(guest) => Ok(guest.clone()),
            None => Err(self.wrong_state("its VM must be running")),
        }
    }

    fn wrong_state(&self, needed: &'static str) -> Error {
        Error::State { what: "sandbox", id: self.identity.id.clone(), state: self.state.name(), needed }
    }

    // What happens by itself

    fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Exit(exit) => {
                let id = ProcessId { container: exit.container_id.clone(), exec: exit.exec_id.clone() };
                self.process_exited(&id, Exit::from(&exit));
            }
            GuestEvent::Oom(oom) if self.containers.contains_key(&oom.container_id) => {
                info!(container = oom.container_id, count = oom.count, "out of memory");
                self.publisher.publish(TaskEvent::oom(&oom.container_id));
            }
            GuestEvent::Oom(oom) => debug!("OOM in the unknown container {:?}", oom.container_id),
            GuestEvent::Lost(why) => {
                error!("the guest is lost, killing its VM: {why}");
                if let Some(guest) = self.guest.clone() {
                    tokio::spawn(async move { guest.machine.kill().await });
                }
            }
        }
    }

    fn process_exited(&mut self, id: &ProcessId, exit: Exit) {
        let container = self.containers.get_mut(&id.container);
        let process = container.and_then(|container| match id.exec.as_str() {
            "" => Some(&mut container.init),
            exec => container.execs.get_mut(exec),
        });
        let Some(process) = process else {
            return debug!("exit of the unknown process {id:?}");
        };
        if process.exited(exit) {
            self.publish_exit(id, exit);
        }
    }

    fn publish_exit(&self, id: &ProcessId, exit: Exit) {
        let name = if id.is_init() { &id.container } else { &id.exec };
        self.publisher.publish(TaskEvent::exit(&id.container, name, self.pid, exit.status, exit.at_ns));
    }

    /// Every process has died with the VM, whatever it was doing. Jobs that wait for the guest fail
    /// by themselves, because their connections end.
    fn vmm_exited(&mut self, exit: &VmmExit) {
        if exit.expected || self.state == SandboxState::Stopping {
            info!("the VM has ended: {}", exit.description);
        } else {
            error!("the VM has ended unexpectedly: {}", exit.description);
        }
        self.end_of_guest();
        if self.state != SandboxState::Stopping {
            self.state = SandboxState::Stopped;
        }
        let containers: Vec<String> = self.containers.keys().cloned().collect();
        let processes: Vec<ProcessId> = containers.iter().flat_map(|id| self.process_ids(id)).collect();
        for id in processes {
            let Ok(process) = self.known(&id) else { continue };
            let exit = Exit::killed();
            let news = match process.phase {
                // It is not going to be started any more; containerd is told the exit all the same,
                // for somebody may wait for it.
                Phase::Starting => process.settle(Phase::Created).is_some() || process.exited(exit),
                _ => process.exited(exit),
            };
            if let (true, Some(exit)) = (news, process.exit()) {
                self.publish_exit(&id, exit);
            }
        }
    }

    fn end_of_guest(&mut self) {
        self.guest = None;
        if let Some(link) = self.link.take() {
            link.abort();
        }
    }

    fn wakeup(&self) -> Option<Instant> {
        match self.idle_since {
            Some(since) => Some(since + IDLE_LIMIT),
            None if self.state == SandboxState::Stopped => Some(Instant::now() + ORPHAN_INTERVAL),
            None => None,
        }
    }

    fn look_around(&mut self) {
        let idle = self.idle_since.is_some_and(|since| since.elapsed() >= IDLE_LIMIT);
        // `shim delete` removes the directory: containerd has forgotten us.
        let orphaned = self.state == SandboxState::Stopped && !self.identity.run_dir.path().exists();
        if idle || orphaned {
            info!(idle, orphaned, "nobody needs this shim any more");
            self.done = true;
        }
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

    fn later(&self, job: impl Future<Output = Report> + Send + 'static) {
        let owner = self.owner.clone();
        tokio::spawn(async move {
            // Fails only when the owner has ended, and then nobody waits for the reply.
            let _ = owner.send(Message::Report(job.await)).await;
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

fn not_found(what: &'static str, id: &str) -> Error {
    Error::NotFound { what, id: id.into(), state: "does not exist" }
}

fn gone(id: &ProcessId) -> Error {
    let (what, name) = if id.is_init() { ("container", &id.container) } else { ("exec", &id.exec) };
    Error::NotFound { what, id: name.clone(), state: "has exited already" }
}

fn wrong_phase(id: &ProcessId, phase: Phase, needed: &'static str) -> Error {
    let (what, name) = if id.is_init() { ("container", &id.container) } else { ("exec", &id.exec) };
    Error::State { what, id: name.clone(), state: phase.name(), needed }
}
