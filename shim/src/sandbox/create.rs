//! Create: from a bundle to a created container, booting the VM on the way if it is the first.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api,
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
};
use cube_protocol::guest::{HelloResponse, PrepareSandboxRequest, SharedMount};
use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
};
use tracing::{info, warn};

use super::{
    Host, Identity, Message, Plan, ProcessId, Rootfs, RootfsRequest, Selected,
    job::{self, Guest, stdio_config, stream},
    machine::Machine,
    restore::Restored,
    size::{self, VmSize},
    spec,
    steps::Steps,
};
use crate::{
    agent::{Agent, Dial, GuestEvent, Link},
    cgroup::{Limited, Limits, SandboxCgroup},
    config::{Config, VmmChoice},
    errors::{Error, chain},
    rootfs::{Share, block::BlockRequest},
    state::State,
    stdio::{Flows, LogConfig, ProcessIo},
    tenant::Tenant,
    vmm::{Disk, VmSpec, Vmm},
};

/// Time from the VMM's start to the agent's first answer. Emulation on a busy host needs most of it.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Time for the guest to set its name and mounts up.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);

/// Type of the options that the agent takes.
const OPTIONS_TYPE: &str = "cube.agent.v1.CreateOptions";

/// A job that creates one container.
pub(super) struct Creation {
    pub(super) identity: Identity,
    pub(super) config: Arc<Config>,
    pub(super) host: Arc<dyn Host>,
    pub(super) plan: Plan,
    /// Whose the container is.
    pub(super) tenant: Tenant,
    /// The largest VM that it may go on in, if that is not its own business.
    pub(super) most: Option<VmSize>,
    pub(super) log: Option<LogConfig>,
    /// As saved before this job began.
    pub(super) state: State,
    /// The guest and the pod's pids, unless this container is the first.
    pub(super) joins: Option<(Guest, spec::Pod)>,
    pub(super) owner: mpsc::Sender<Message>,
    pub(super) events: mpsc::Sender<GuestEvent>,
}

/// What a successful creation gives the owner.
pub(super) struct Created {
    pub(super) io: ProcessIo,
    /// Pid of the init process in the guest.
    pub(super) guest_pid: u32,
    /// The VM, if this container's creation booted it.
    pub(super) booted: Option<Booted>,
    /// If it was restored: how it goes on.
    pub(super) restored: Option<Restored>,
}

/// A VM that has just been booted.
pub(super) struct Booted {
    pub(super) guest: Guest,
    /// Pid of the VMM on the host.
    pub(super) pid: u32,
    pub(super) backend: String,
    /// Why this one.
    pub(super) reason: String,
    /// Who answered.
    pub(super) hello: HelloResponse,
    /// The task that follows the guest's events; to be aborted when the VM has ended.
    pub(super) link: JoinHandle<()>,
    /// Its disks.
    pub(super) disks: Vec<Disk>,
    /// What its processes on the host may take.
    pub(super) limited: Option<Limited>,
}

/// A VM whose agent has answered.
pub(super) struct Reached {
    pub(super) vmm: Box<dyn Vmm>,
    pub(super) backend: String,
    pub(super) reason: String,
    pub(super) shared_mount: SharedMount,
    pub(super) dial: Arc<dyn Dial>,
    pub(super) agent: Agent,
    pub(super) link: Link,
    pub(super) hello: HelloResponse,
    pub(super) limited: Option<Limited>,
}

impl Creation {
    /// Creates the container. `abort` ends the attempt. On an error nothing is left, and for the
    /// first container that means nothing of the sandbox.
    pub(super) async fn run(mut self, mut abort: oneshot::Receiver<()>) -> Result<Created, Error> {
        let result = match self.plan.restore.take() {
            Some(snapshot) => self.restore(&snapshot, abort).await,
            None => match self.prepare(&mut abort).await {
                Ok((rootfs, io)) => tokio::select! {
                    result = self.create(rootfs, io) => result,
                    _ = abort => Err(Error::Killed),
                },
                Err(e) => Err(e),
            },
        };
        if let Err(e) = &result {
            warn!(container = self.plan.request.id, "cannot create the container: {}", chain(e));
            self.roll_back().await;
        }
        result
    }

    /// What happens on the host alone. `abort` ends what may take long, and only that: a mount that is
    /// made while the clean-up runs would stay.
    async fn prepare(&mut self, abort: &mut oneshot::Receiver<()>) -> Result<(Rootfs, ProcessIo), Error> {
        let mut steps = Steps::begin();
        let host = self.host.clone();
        let block = self.block()?;
        let cancel = block.as_ref().map(|block| block.cancel.clone()).unwrap_or_default();
        let request = RootfsRequest {
            run_dir: self.identity.run_dir.clone(),
            id: self.plan.request.id.clone(),
            bundle: self.plan.request.bundle.clone(),
            mounts: self.plan.request.rootfs.clone(),
            block,
        };
        let mut spec = std::mem::take(&mut self.plan.spec);
        let pod = self.joins.as_ref().map(|(_, pod)| *pod);
        let cgroup = self.joins.is_none().then(|| self.state.cgroup.clone());
        let mut prepared = spawn_blocking(move || -> Result<(Value, Rootfs), Error> {
            spec::rewrite(&mut spec, pod)?;
            if let Some(cgroup) = cgroup {
                host.create_cgroup(&cgroup)?;
                cube_fault::point("create.cgroup_made");
            }
            let rootfs = host.prepare_rootfs(request, &mut spec)?;
            Ok((spec, rootfs))
        });
        let (spec, rootfs) = tokio::select! {
            prepared = &mut prepared => prepared??,
            _ = abort => {
                cancel.cancel();
                drop(prepared.await?);
                return Err(Error::Killed);
            }
        };
        steps.done("spec checked, cgroup and rootfs made");
        self.plan.spec = spec;
        let process = self.process();
        let stdio = stdio_config(
            &self.identity.namespace,
            &process,
            process.container.clone(),
            &self.plan.request.stdio,
            self.log.clone(),
        );
        let io = ProcessIo::prepare(stdio).await?;
        cube_fault::point("create.stdio_prepared");
        steps.done("stdio prepared");
        Ok((rootfs, io))
    }

    /// How the rootfs becomes disks, if the annotations ask for that.
    fn block(&self) -> Result<Option<BlockRequest>, Error> {
        let annotations = &self.plan.annotations;
        if !annotations.rootfs_block {
            return Ok(None);
        }
        let refused = |what: &str, hint| Err(Error::Unimplemented { what: what.into(), hint });
        if self.joins.is_some() {
            return refused(
                "cube.rootfs.mode=block for a container that joins a running sandbox",
                ": its VM has booted with the disks that it has",
            );
        }
        if self.config.vmm == VmmChoice::Process {
            return refused(
                "cube.rootfs.mode=block with vmm = \"process\"",
                ": there is no VM, and no disk of one",
            );
        }
        let cgroup = SandboxCgroup::at(&self.state.cgroup).helpers();
        Ok(Some(BlockRequest::new(&self.config, annotations.rootfs_size, cgroup)))
    }

    async fn create(&self, rootfs: Rootfs, mut io: ProcessIo) -> Result<Created, Error> {
        let (guest, booted) = match &self.joins {
            Some(_) if !rootfs.disks.is_empty() => {
                return Err(Error::Unimplemented {
                    what: "a block device as rootfs of a container that joins a running sandbox".into(),
                    hint: "",
                });
            }
            Some((guest, _)) => (guest.clone(), None),
            None => {
                let booted = self.boot(&rootfs).await?;
                (booted.guest.clone(), Some(booted))
            }
        };
        let mut steps = Steps::begin();
        let wanted = io.wanted();
        let spec = self.plan.spec.to_string().into_bytes();
        let mut options = job::bring_spec(&guest.agent, &self.plan.request.id, spec).await?;
        options.log_mode = self.plan.annotations.log_mode.into();
        let options = Any {
            type_url: OPTIONS_TYPE.into(),
            // Encoding into memory fails only for a message beyond 2 GiB.
            value: options.write_to_bytes().unwrap_or_default(),
            ..Default::default()
        };
        let call = api::CreateTaskRequest {
            id: self.plan.request.id.clone(),
            rootfs: rootfs.guest_mounts,
            terminal: self.plan.request.stdio.terminal,
            stdin: stream(wanted.stdin),
            stdout: stream(wanted.stdout),
            stderr: stream(wanted.stderr),
            options: MessageField::some(options),
            ..Default::default()
        };
        let guest_pid = job::create(&guest.agent, call).await?;
        cube_fault::point("create.container_made");
        steps.done("container created in the guest");
        io.start(guest.dial.clone(), &guest.flows);
        Ok(Created { io, guest_pid, booted, restored: None })
    }

    async fn boot(&self, rootfs: &Rootfs) -> Result<Booted, Error> {
        let mut steps = Steps::begin();
        let run_dir = &self.identity.run_dir;
        let policy = self.tenant.is_pod().then_some(&self.config.policy);
        let size = size::of(&self.plan.spec, &self.plan.annotations, &self.config.vm, policy);
        // The members of a pod come later, with whatever rootfs the snapshotter gives them.
        let share = rootfs.share || spec::sandbox_id(&self.plan.spec).is_some();
        let vm = VmSpec {
            sandbox_id: self.identity.id.clone(),
            run_dir: run_dir.path().into(),
            cgroup: self.state.cgroup.clone(),
            user: self.state.user,
            group: self.config.users.first,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            share: share.then(|| Share::of(run_dir.path()).dir().into()),
            disks: rootfs.disks.clone(),
            cmdline: String::new(),
            restore: None,
        };
        let Reached { vmm, backend, reason, shared_mount, dial, agent, link, hello, limited } =
            self.reach(vm, &mut steps).await?;
        let shared_mounts = if share { vec![shared_mount] } else { Vec::new() };
        // From now on it is the link that connects again.
        let link = link.run(self.events.clone());
        let hostname = spec::hostname_or(&self.plan.spec, &self.identity.id);
        let prepared = prepare_guest(&agent, hostname, shared_mounts).await;
        prepared.inspect_err(|_| link.abort())?;
        cube_fault::point("create.guest_ready");
        steps.done("guest prepared");
        info!(agent = hello.agent_version, kernel = hello.kernel_release, "the guest is ready");

        let pid = vmm.pid();
        let machine = Machine::watch(vmm, self.owner.clone());
        let guest = Guest { agent, machine, dial, flows: Flows::on(hello.timeline), alias: None };
        Ok(Booted { guest, pid, backend, reason, hello, link, disks: rootfs.disks.clone(), limited })
    }

    /// Starts the VM, and waits for its agent.
    pub(super) async fn reach(&self, vm: VmSpec, steps: &mut Steps) -> Result<Reached, Error> {
        let (host, config) = (self.host.clone(), self.config.clone());
        let (vcpus, memory_mib, restores) = (vm.vcpus, vm.memory_mib, vm.restore.is_some());
        // It may run programs to find out what works here.
        let selected = spawn_blocking(move || host.select(&config, vm)).await??;
        let Selected { mut vmm, backend, reason, shared_mount, overhead_mib } = selected;
        info!(backend, reason, vcpus, memory_mib, restores, "booting");
        steps.done("VMM chosen");
        let limited = match overhead_mib {
            Some(overhead_mib) => Some(self.limit(vcpus, memory_mib, overhead_mib).await?),
            None => None,
        };
        steps.done("cgroup limited");
        vmm.boot().await?;
        cube_fault::point("create.vmm_spawned");
        steps.done("VMM started");

        let dial: Arc<dyn Dial> = Arc::new(vmm.vsock());
        let (agent, link, hello) = tokio::select! {
            connected = Agent::connect(dial.clone(), BOOT_LIMIT) => connected?,
            exit = vmm.wait() => {
                let id = self.identity.id.clone();
                return Err(Error::VmmEnded { id, description: exit.description });
            }
        };
        steps.done("agent reached");
        Ok(Reached { vmm, backend, reason, shared_mount, dial, agent, link, hello, limited })
    }

    /// Limits what the sandbox takes of its host.
    async fn limit(&self, vcpus: u32, memory_mib: u64, overhead_mib: u64) -> Result<Limited, Error> {
        let limits = Limits::of(vcpus, memory_mib, overhead_mib, &self.config.limits.io_max);
        let (host, cgroup) = (self.host.clone(), self.state.cgroup.clone());
        let limited = spawn_blocking(move || host.limit(&cgroup, &limits)).await??;
        info!(cgroup = %limited.cgroup.display(), "the sandbox is limited on the host: {limited}");
        Ok(limited)
    }

    async fn roll_back(&self) {
        let (host, run_dir) = (self.host.clone(), self.identity.run_dir.clone());
        let (id, first, cgroup) =
            (self.plan.request.id.clone(), self.joins.is_none(), self.state.cgroup.clone());
        let undone = spawn_blocking(move || {
            if first { host.destroy(&run_dir, &cgroup) } else { host.release_rootfs(&run_dir, &id) }
        });
        match undone.await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => warn!("cannot clean up: {}", chain(&e)),
            Err(e) => warn!("cannot clean up: {e}"),
        }
    }

    pub(super) fn process(&self) -> ProcessId {
        ProcessId { container: self.plan.request.id.clone(), exec: String::new() }
    }
}

async fn prepare_guest(agent: &Agent, hostname: &str, shared_mounts: Vec<SharedMount>) -> Result<(), Error> {
    let call = PrepareSandboxRequest { hostname: hostname.into(), shared_mounts, ..Default::default() };
    agent
        .call("PrepareSandbox", PREPARE_LIMIT, call, |c, ctx, call| async move {
            c.guest.prepare_sandbox(ctx, &call).await
        })
        .await?;
    Ok(())
}
