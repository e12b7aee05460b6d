//! The tasks of this guest: containers with their processes, and what may be done to them when.
//!
//! Locks: a task's `container` is held for writing by what changes it as a whole (starting its init
//! process, deleting it), for reading by the rest, execs included; calls about other containers are
//! never held up. The state of a process is outside of that lock, so that exits, signals and State
//! wait for nothing.
//!
//! Calls that change something run in tasks of their own: ttrpc drops the future of a call when its
//! connection ends or its deadline passes, which must not leave a container half made.

mod create;
mod delete;
mod environment;
mod pause;
mod probe;
mod process;
mod start;
mod starts;
mod state;

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use oci_spec::runtime::{self, LinuxResources};
use tokio::{
    sync::{RwLock, oneshot},
    task::JoinHandle,
};

use self::starts::Starts;
pub use self::{create::NewTask, delete::Deleted, process::Process, starts::GivenUp, state::State};
use super::{error::Error, events::Events};
use crate::{
    boot::reaper::{Exit, Reaper},
    container::Container,
    errors::lock,
    guest::storage::Rootfs,
    stdio::{Hub, Policy, ProcessId, Request},
};

/// Every task of the guest.
#[derive(Debug)]
pub struct Tasks {
    slots: Mutex<HashMap<String, Slot>>,
    hub: Arc<Hub>,
    reaper: Arc<Reaper>,
    events: Arc<Events>,
    starts: Arc<Starts>,
    /// cgroup below which containers have theirs.
    cgroup: PathBuf,
    /// Directory of the containers' directories.
    directory: PathBuf,
    /// "NAME=value" for processes that do not set NAME themselves.
    environment: Mutex<Vec<String>>,
}

/// Who has an id.
#[derive(Debug)]
enum Slot {
    /// A Create that is under way.
    Creating,
    Ready(Arc<Task>),
}

/// A container with its processes.
#[derive(Debug)]
pub struct Task {
    /// The first process.
    pub init: Arc<Process>,
    policy: Policy,
    /// What the init process runs; a probe runs as it does.
    process: Option<runtime::Process>,
    container: Arc<RwLock<Container>>,
    /// Whether its cgroup is frozen. Locked for reading by whoever spawns a process in it.
    paused: RwLock<bool>,
    rootfs: Mutex<Option<Rootfs>>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    starts: Arc<Starts>,
    oom_watch: Mutex<Option<JoinHandle<()>>>,
}

impl Tasks {
    /// No tasks. `cgroup` and `directory` exist, and belong to the agent.
    pub fn new(
        hub: Arc<Hub>,
        reaper: Arc<Reaper>,
        events: Arc<Events>,
        cgroup: PathBuf,
        directory: PathBuf,
    ) -> Arc<Tasks> {
        let (slots, environment, starts) = Default::default();
        Arc::new(Tasks { slots, hub, reaper, events, starts, cgroup, directory, environment })
    }

    /// Carries out `work`, which needs the end of all starts that are under way: those that take longer than
    /// `patience` are given up.
    pub async fn hurry<T>(&self, patience: Duration, work: impl Future<Output = T>) -> T {
        self.starts.hurry(|_| true, patience, work).await
    }

    /// The task of container `id`.
    pub fn get(&self, id: &str) -> Result<Arc<Task>, Error> {
        match lock(&self.slots).get(id) {
            Some(Slot::Ready(task)) => Ok(task.clone()),
            Some(Slot::Creating) | None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// Every task.
    pub fn all(&self) -> Vec<Arc<Task>> {
        let ready = |slot: &Slot| match slot {
            Slot::Ready(task) => Some(task.clone()),
            Slot::Creating => None,
        };
        lock(&self.slots).values().filter_map(ready).collect()
    }

    /// Sets what is added to the environment of every process that is created or started from now on.
    /// The caller has [checked](cube_protocol::environment::check) it.
    pub fn set_environment(&self, environment: Vec<String>) {
        *lock(&self.environment) = environment;
    }

    /// Gives every container that has the host name `old` the name `new`.
    pub async fn replace_hostname(&self, old: &str, new: &str) -> Result<(), Error> {
        for task in self.all() {
            task.container.read().await.replace_hostname(old, new)?;
        }
        Ok(())
    }

    /// Registers an exec, to be spawned by its Start. The caller has checked `exec_id`.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: runtime::Process,
        streams: Streams,
    ) -> Result<(), Error> {
        let task = self.get(id)?;
        // Keeps a Delete out, which would not see the new process.
        let _container = task.container.read().await;
        self.still_there(&task)?;
        if task.init.state().exit().is_some() {
            return Err(task.init.wrong_state("it must be running to exec in it"));
        }
        let _unpaused = task.unpaused().await?;
        let process_id = ProcessId { container: id.to_owned(), exec: exec_id.to_owned() };
        match lock(&task.execs).entry(exec_id.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => Err(Error::AlreadyExists(process_id)),
            std::collections::btree_map::Entry::Vacant(vacant) => {
                let request = streams.request(task.policy);
                let stdio = self.hub.open(&process_id, request)?;
                vacant.insert(Arc::new(Process::exec(process_id, request, process, stdio)));
                Ok(())
            }
        }
    }

    /// Fails if `task` was deleted since it was got.
    fn still_there(&self, task: &Arc<Task>) -> Result<(), Error> {
        let id = &task.init.id.container;
        match lock(&self.slots).get(id) {
            Some(Slot::Ready(current)) if Arc::ptr_eq(current, task) => Ok(()),
            _ => Err(Error::NoContainer(id.clone())),
        }
    }

    /// Records the end of a process when it comes.
    fn follow(&self, task: &Arc<Task>, process: Arc<Process>, exit: oneshot::Receiver<Exit>) {
        let (hub, events, task) = (self.hub.clone(), self.events.clone(), task.clone());
        tokio::spawn(async move {
            // The reaper lives as long as the agent.
            let Ok(exit) = exit.await else { return };
            process.exited(exit);
            cube_fault::point("agent.exit.before_event");
            events.exited(&process.id, process.pid(), exit);
            hub.exited(&process.id);
            if !process.id.exec.is_empty() {
                return;
            }
            let id = &process.id.container;
            task.starts.give_up(|starting| starting.container == *id, GivenUp::ContainerEnded);
            // With a pid namespace of its own the kernel has done so already; without one the rest of
            // the container ends with its init process all the same, as with runc.
            if let Err(error) = task.container.read().await.kill_all(libc::SIGKILL) {
                let error: Error = error.into();
                tracing::warn!(container = process.id.container, "{}", crate::errors::chain(&error));
            }
        });
    }
}

impl Task {
    /// The process `exec`, or the init process for "".
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, Error> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        let no_process = || {
            Error::NoProcess(ProcessId { container: self.init.id.container.clone(), exec: exec.to_owned() })
        };
        lock(&self.execs).get(exec).cloned().ok_or_else(no_process)
    }

    /// Init process and execs.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let execs = lock(&self.execs);
        std::iter::once(&self.init).chain(execs.values()).cloned().collect()
    }

    /// Signals one process, or every process of the container.
    pub async fn kill(&self, exec: &str, signal: i32, all: bool) -> Result<(), Error> {
        let process = self.process(exec)?;
        if !all {
            // An exec that is being started has no pid yet.
            let starting = signal == libc::SIGKILL && process.pid() == 0;
            if starting && self.starts.give_up(|starting| *starting == process.id, GivenUp::Killed) {
                return Ok(());
            }
            return process.kill(signal);
        }
        if process.state().exit().is_some() {
            return Err(Error::Finished(process.id.clone()));
        }
        Ok(self.container.read().await.kill_all(signal)?)
    }

    /// Pids in the agent's pid namespace.
    pub async fn pids(&self) -> Result<Vec<i32>, Error> {
        Ok(self.container.read().await.pids()?)
    }

    /// Figures of the container's cgroup.
    pub async fn stats(&self) -> Result<Metrics, Error> {
        Ok(self.container.read().await.stats()?)
    }

    /// Changes limits.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        Ok(self.container.read().await.update(resources)?)
    }
}

/// Which streams a process is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    /// A pseudo terminal.
    pub terminal: bool,
    /// Input from the host.
    pub stdin: bool,
    /// Output to the host.
    pub stdout: bool,
    /// Error output to the host.
    pub stderr: bool,
}

impl Streams {
    fn request(self, policy: Policy) -> Request {
        let Streams { terminal, stdin, stdout, stderr } = self;
        Request { terminal, stdin, stdout, stderr, policy }
    }
}

/// An id that nobody else can take. Dropping it frees the id.
#[derive(Debug)]
struct Reservation<'a> {
    tasks: &'a Tasks,
    id: &'a str,
}

impl Tasks {
    /// Refuses an id that is taken, or being taken.
    pub fn check_free(&self, id: &str) -> Result<(), Error> {
        match lock(&self.slots).contains_key(id) {
            true => Err(Error::AlreadyExists(ProcessId { container: id.to_owned(), exec: String::new() })),
            false => Ok(()),
        }
    }

    fn reserve<'a>(&'a self, id: &'a str) -> Result<Reservation<'a>, Error> {
        match lock(&self.slots).entry(id.to_owned()) {
            Entry::Occupied(_) => {
                Err(Error::AlreadyExists(ProcessId { container: id.to_owned(), exec: String::new() }))
            }
            Entry::Vacant(vacant) => {
                vacant.insert(Slot::Creating);
                Ok(Reservation { tasks: self, id })
            }
        }
    }
}

impl Reservation<'_> {
    /// The container exists now.
    fn fill(self, task: Arc<Task>) {
        lock(&self.tasks.slots).insert(self.id.to_owned(), Slot::Ready(task));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Entry::Occupied(slot) = lock(&self.tasks.slots).entry(self.id.to_owned())
            && matches!(slot.get(), Slot::Creating)
        {
            slot.remove();
        }
    }
}
