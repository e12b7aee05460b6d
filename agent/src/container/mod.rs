//! Containers: from an OCI spec to running processes.
//!
//! A process is made in two programs. This one, the agent, checks the spec ([`spec`]), makes the
//! cgroup ([`cgroup`]) and clones a child that at once executes the agent's own binary again
//! ([`spawn`]). That child is single threaded and may do anything ([`stage`]): it enters namespaces,
//! mounts, drops privileges and finally executes the container's program. Where others live in the
//! container's pid namespace already, a child of its own does the last step: the stage, with all that it
//! may do, stays out of their sight.

mod cgroup;
mod error;
mod hostname;
mod mount_options;
mod namespaces;
mod network;
mod procfs;
mod readable;
mod seccomp;
mod spawn;
mod spec;
mod stage;

use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources, Process, Spec};
use tokio::{net::TcpSocket, time::timeout};

use self::{
    cgroup::Cgroup,
    namespaces::{Namespaces, Pid},
    procfs::{Home, Kept},
    spawn::{Child, Launch},
    stage::protocol::{AgentEnd, Exec, Init, Instructions, Message, Proc, Report},
};
use crate::stdio::ChildStdio;

pub use self::{
    cgroup::Freezer, error::ContainerError, spawn::set_stage_executable, spec::parse, stage::init_stage,
};

/// How long [`Container::delete`] waits for killed processes to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a process may take on its way to `execve`, and for that. On the way are files of the container,
/// which may be on a file system that some process of the container serves, or does not.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// What a container is made from.
#[derive(Debug)]
pub struct Config {
    /// Checked by the caller: one path component.
    pub id: String,
    /// config.json.
    pub spec: Spec,
    /// The mounted root file system.
    pub rootfs: PathBuf,
    /// A directory for a proc file system of the container's, out of its reach: made by create, removed by
    /// delete.
    pub proc: PathBuf,
    /// cgroup v2 directory in which the container's own is made. It holds no process itself, and the
    /// caller has enabled the controllers of its ancestors, down to its own `cgroup.controllers`.
    pub cgroup_parent: PathBuf,
    /// Whether its processes may create `AF_VSOCK` sockets.
    pub allow_vsock: bool,
}

/// A process that has been spawned. It is a child of this process, which must reap it.
///
/// It may have ended, and even have been reaped, before the future that gives this resolves: a reaper
/// keeps the status of a pid that it does not know while a [`Container::create`] or
/// [`Container::exec`] is under way.
#[derive(Debug)]
pub struct Spawned {
    /// Pid in the agent's pid namespace.
    pub pid: i32,
    /// The same process, safe against reuse of the pid.
    pub pidfd: OwnedFd,
    /// Master of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// A container. Its init process is spawned but waits in front of `execve` until [`Container::start`].
#[derive(Debug)]
pub struct Container {
    cgroup: Cgroup,
    /// The init process; its namespaces are the container's.
    init: OwnedFd,
    state: State,
    allow_vsock: bool,
    proc: Option<Kept>,
    /// The device rules that it was created with.
    device_rules: Vec<LinuxDeviceCgroup>,
}

#[derive(Debug)]
enum State {
    /// The init stage waits for [`AgentEnd::go`].
    Created(AgentEnd),
    Started,
    Deleted,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            State::Created(_) => "created",
            State::Started => "started",
            State::Deleted => "deleted",
        }
    }
}

impl Container {
    /// Checks the spec, makes cgroup and namespaces, and runs the init stage up to `execve`. On an
    /// error nothing is left but a zombie for the reaper. Everything that can be known to fail before
    /// start fails here: a field that is not supported, a mount, a user, a program that does not exist.
    ///
    /// `spec.root.path` and `spec.linux.cgroupsPath` are the host's and play no part. A container
    /// always gets a mount and a cgroup namespace of its own; a `network` namespace without a path is
    /// the guest's network.
    pub async fn create(
        mut config: Config,
        stdio: ChildStdio,
    ) -> Result<(Container, Spawned), ContainerError> {
        spec::clean(&mut config.spec);
        spec::settle_devices(&mut config.spec)?;
        check_terminal(spec::check(&config.spec)?, &stdio)?;
        let cgroup = Cgroup::create(&config.cgroup_parent, &config.id)?;
        let (id, allow_vsock) = (config.id.clone(), config.allow_vsock);
        let device_rules = device_rules(&config.spec).to_vec();
        let made = in_time(spawn_init(&cgroup, config, stdio)).await;
        let (child, terminal, proc) = match made {
            Ok(made) => made,
            Err(error) => {
                if let Err(left) = cgroup.remove(KILL_TIMEOUT).await {
                    log::warn!("container {id}: cannot undo a create that failed: {left}");
                }
                return Err(error);
            }
        };
        let init = duplicate(&child.pidfd)?;
        let (spawned, control) = child.release(terminal);
        let state = State::Created(control);
        Ok((Container { cgroup, init, state, allow_vsock, proc, device_rules }, spawned))
    }

    /// Lets the init process go on to `execve`, and returns when that has happened. Once. An init process
    /// that takes too long is killed, and so is one whose start is given up.
    pub async fn start(&mut self) -> Result<(), ContainerError> {
        let State::Created(control) = &mut self.state else {
            return Err(ContainerError::State { state: self.state.name(), needed: "created" });
        };
        control
            .go()
            .map_err(|source| ContainerError::stage("start the init process, which has ended", source))?;
        let mut kill = KillUnless { pidfd: &self.init, done: false };
        let message = in_time(async { Ok(control.message().await) }).await;
        kill.done = message.is_ok();
        drop(kill);
        self.state = State::Started;
        executed(message?)
    }

    /// Runs another process in the container, and returns when its `execve` has happened. Cancel safe: a
    /// process that has been spawned is killed.
    pub async fn exec(&self, process: &Process, stdio: ChildStdio) -> Result<Spawned, ContainerError> {
        if !matches!(self.state, State::Started) {
            return Err(ContainerError::State { state: self.state.name(), needed: "started" });
        }
        spec::check_process(process)?;
        check_terminal(process, &stdio)?;
        let launch = Launch {
            instructions: &Instructions::Exec(Box::new(Exec {
                process: process.clone(),
                allow_vsock: self.allow_vsock,
            })),
            stdio,
            cgroup: self.cgroup.open_leaf()?,
            extra: duplicate(&self.init)?,
            new_pid_namespace: false,
        };
        let mut child = spawn::spawn(launch)?;
        let terminal = in_time(async {
            let terminal = child.await_ready().await?;
            child
                .control
                .go()
                .map_err(|source| ContainerError::stage("start a process, which has ended", source))?;
            executed(child.control.message().await)?;
            Ok(terminal)
        });
        let terminal = terminal.await?;
        Ok(child.release(terminal).0)
    }

    /// Pids in the agent's pid namespace of every process in the container's cgroup.
    pub fn pids(&self) -> Result<Vec<i32>, ContainerError> {
        self.cgroup.pids()
    }

    /// Signals every process of the container; SIGKILL by `cgroup.kill`.
    pub fn kill_all(&self, signal: i32) -> Result<(), ContainerError> {
        self.cgroup.signal(signal)
    }

    /// What freezes all of its processes.
    pub fn freezer(&self) -> Freezer {
        self.cgroup.freezer()
    }

    /// cgroup v2 metrics as containerd's own shim reports them.
    pub fn stats(&self) -> Result<Metrics, ContainerError> {
        self.cgroup.stats()
    }

    /// Changes the limits of the cgroup. What `resources` does not name stays as it is. Clients send the
    /// device rules of the create along.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        let rules = resources.devices().as_deref().unwrap_or_default();
        if !rules.is_empty() && rules != self.device_rules {
            return Err(ContainerError::Unsupported {
                field: "linux.resources.devices".into(),
                hint: Some("the device rules of a container are fixed when it is created"),
            });
        }
        spec::check_resources(resources)?;
        self.cgroup.limit(resources)
    }

    /// Gives the container's uts namespace the host name `new` if it has the name `old`.
    pub fn replace_hostname(&self, old: &str, new: &str) -> Result<(), ContainerError> {
        hostname::replace(&self.init, old, new)
            .map_err(|source| ContainerError::stage("set the host name of a container", source))
    }

    /// A socket for a TCP connection to `to`, in the network of the container.
    pub fn tcp_socket(&self, to: SocketAddr) -> Result<TcpSocket, ContainerError> {
        network::tcp_socket(&self.init, to)
            .map_err(|source| ContainerError::stage("make a socket in the container's network", source))
    }

    /// Resolves when the kernel has killed a process of the container for want of memory, after more
    /// than `seen` such kills in all; gives the new count. Cancel safe. Never resolves without a
    /// memory controller.
    pub async fn oom_kills_after(&self, seen: u64) -> u64 {
        self.cgroup.oom_kills_after(seen).await
    }

    /// Kills what still runs, and removes the cgroup. Can be repeated. The rootfs stays mounted.
    pub async fn delete(&mut self) -> Result<(), ContainerError> {
        // The state holds the socket of an init process that was never started, which would exit by
        // itself at its end: it has to die of the kill.
        let removed = self.cgroup.remove(KILL_TIMEOUT).await;
        self.state = State::Deleted;
        self.proc = None;
        removed
    }
}

/// Kills a process, unless what was awaited of it has happened.
struct KillUnless<'a> {
    pidfd: &'a OwnedFd,
    done: bool,
}

impl Drop for KillUnless<'_> {
    fn drop(&mut self) {
        if !self.done {
            // A process that is gone already is as good as killed.
            let _ = spawn::pidfd_kill(self.pidfd.as_fd());
        }
    }
}

async fn in_time<T>(starting: impl Future<Output = Result<T, ContainerError>>) -> Result<T, ContainerError> {
    let limit = START_TIMEOUT;
    timeout(limit, starting).await.unwrap_or(Err(ContainerError::SlowStart { limit }))
}

/// Limits the cgroup, and brings an init stage up to `execve`. Gives its terminal, if it has one, and the
/// proc that is kept for containers that join its pid namespace, if that is a new one.
async fn spawn_init(
    cgroup: &Cgroup,
    config: Config,
    stdio: ChildStdio,
) -> Result<(Child, Option<OwnedFd>, Option<Kept>), ContainerError> {
    let mut namespaces = Namespaces::from_spec(&config.spec)?;
    let resources = config.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    cgroup.restrict_devices(device_rules(&config.spec))?;
    if let Some(resources) = resources {
        cgroup.limit(resources)?;
    }
    let mut kept = None;
    let proc = match &namespaces.pid {
        Pid::Guest => Proc::Mount,
        Pid::New => {
            let prepared = kept.insert(Kept::prepare(config.proc)?);
            Proc::Keep(prepared.path().to_owned())
        }
        Pid::Join(path) => match procfs::home(path) {
            Home::Container(path) => Proc::Kept(path),
            Home::Guest => {
                namespaces.pid = Pid::Guest;
                Proc::Mount
            }
            Home::Unknown => {
                let reason = "it is the pid namespace of no container of this sandbox";
                return Err(ContainerError::invalid("linux.namespaces (pid)", path.display(), reason));
            }
        },
    };
    let launch = Launch {
        // Entering its own cgroup namespace while it is in the container's cgroup makes that cgroup the
        // namespace's root; only then does it move itself into the leaf.
        cgroup: cgroup.open()?,
        extra: cgroup.open_leaf_procs()?,
        new_pid_namespace: namespaces.pid == Pid::New,
        instructions: &Instructions::Init(Box::new(Init {
            rootfs: config.rootfs,
            allow_vsock: config.allow_vsock,
            namespaces,
            proc,
            spec: config.spec,
        })),
        stdio,
    };
    let mut child = spawn::spawn(launch)?;
    let terminal = child.await_ready().await?;
    cgroup.delegate_controllers();
    if let Some(kept) = &kept {
        kept.publish(child.pid);
    }
    Ok((child, terminal, kept))
}

fn device_rules(spec: &Spec) -> &[LinuxDeviceCgroup] {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default()
}

/// What the last report of a stage that was told to go says.
fn executed(message: std::io::Result<Option<Message>>) -> Result<(), ContainerError> {
    match message.map_err(|source| ContainerError::stage("read the report of the init stage", source))? {
        // The socket is CLOEXEC: its end is the execve.
        None => Ok(()),
        Some(Message { report: Report::Failed { action, errno }, .. }) => {
            Err(ContainerError::stage(action, std::io::Error::from_raw_os_error(errno)))
        }
        Some(message) => Err(stage::protocol::unexpected(&message)),
    }
}

fn check_terminal(process: &Process, stdio: &ChildStdio) -> Result<(), ContainerError> {
    let wanted = process.terminal().unwrap_or(false);
    match (wanted, stdio) {
        (true, ChildStdio::Terminal) | (false, ChildStdio::Pipes(_)) => Ok(()),
        _ => Err(ContainerError::invalid(
            "process.terminal",
            wanted,
            "the request to create the process says otherwise",
        )),
    }
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, ContainerError> {
    fd.try_clone().map_err(|source| ContainerError::stage("duplicate a pidfd", source))
}
