//! Making a container. Each step undoes itself when a later one fails.

use std::{path::Path, sync::Arc};

use oci_spec::runtime::Spec;
use tokio::{sync::RwLock, task::spawn_blocking};

use super::{Process, Streams, Task, Tasks, environment};
use crate::{
    container::{Config, Container},
    errors::lock,
    guest::{
        paths,
        storage::{Mount, Rootfs},
    },
    server::error::Error,
    stdio::{ChildStdio, Hub, Policy, ProcessId, Request},
};

/// What a Create asks for.
#[derive(Debug)]
pub struct NewTask {
    /// Container id; becomes a path component, so the caller has checked it.
    pub id: String,
    /// config.json.
    pub spec: Spec,
    /// For the root file system, in order.
    pub mounts: Vec<Mount>,
    /// stdio of the init process.
    pub streams: Streams,
    /// For its output, and that of execs.
    pub policy: Policy,
    /// Whether its processes may create `AF_VSOCK` sockets.
    pub allow_vsock: bool,
}

impl Tasks {
    /// Makes a container with an init process that waits for its Start. Gives the pid. On an error
    /// nothing is left. Must not be cancelled.
    pub async fn create(&self, new: NewTask) -> Result<i32, Error> {
        let id = new.id;
        let reservation = self.reserve(&id)?;

        let directory = Path::new(&self.directory).join(&id);
        let rootfs = spawn_blocking(move || Rootfs::mount(directory, &new.mounts)).await??;

        cube_fault::point("agent.create.rootfs_mounted");
        let process_id = ProcessId { container: id.clone(), exec: String::new() };
        let request = new.streams.request(new.policy);
        let (opened, stdio) = Opened::open(&self.hub, &process_id, request)?;

        let mut spec = new.spec;
        let process = spec.process().clone();
        if let Some(process) = spec.process_mut() {
            environment::complete(process, &lock(&self.environment));
        }
        let config = Config {
            id: id.clone(),
            spec,
            rootfs: rootfs.path(),
            proc: Path::new(paths::PROC).join(&id),
            cgroup_parent: self.cgroup.clone(),
            allow_vsock: new.allow_vsock,
        };
        let spawning = self.reaper.spawning();
        let start = self.starts.begin(&process_id);
        let made = start.carry_out(Container::create(config, stdio)).await;
        let (mut container, spawned) = made?;
        if let Some(master) = spawned.terminal
            && let Err(error) = self.hub.attach_terminal(&process_id, master)
        {
            container.delete().await?;
            return Err(error.into());
        }

        opened.keep();
        let exit = spawning.watch(spawned.pid);
        let init = Arc::new(Process::init(process_id, request, spawned.pid, spawned.pidfd));
        let task = Arc::new(Task {
            init: init.clone(),
            policy: new.policy,
            process,
            container: Arc::new(RwLock::new(container)),
            paused: RwLock::default(),
            rootfs: Some(rootfs).into(),
            execs: Default::default(),
            starts: self.starts.clone(),
            oom_watch: Default::default(),
        });
        self.follow(&task, init, exit);
        reservation.fill(task);
        cube_fault::point("agent.create.spawned");
        Ok(spawned.pid)
    }
}

/// Streams of a process that may yet fail to come to life: dropping this closes them.
#[derive(Debug)]
pub(super) struct Opened<'a> {
    hub: Option<&'a Hub>,
    process: ProcessId,
}

impl<'a> Opened<'a> {
    pub(super) fn open(
        hub: &'a Arc<Hub>,
        process: &ProcessId,
        request: Request,
    ) -> Result<(Opened<'a>, ChildStdio), Error> {
        let stdio = hub.open(process, request)?;
        Ok((Opened { hub: Some(hub), process: process.clone() }, stdio))
    }

    fn keep(mut self) {
        self.hub = None;
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        if let Some(hub) = self.hub {
            hub.close(&self.process);
        }
    }
}
