//! No VM: the agent in fresh namespaces of the host. For tests and benchmarks.

use std::path::Path;

use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{
    Disk, VSOCK_SOCKET, VmSpec, VmmError,
    console::{GUEST_CONSOLE, Ring},
    helper::{Helper, Launch, own_dir, remove_stale},
    machine::{Backend, CONTROL_LIMIT, Control, EndReason, Parts},
    program::{AGENT_HINT, RESTORE_HINT, find},
    wall::{User, Wall},
};
use crate::{
    cgroup::SandboxCgroup,
    config::{Config, Tools},
};

/// The agent, as the first process of a pid namespace. It mounts /proc itself, and sees what is mounted on the
/// host later.
#[derive(Debug)]
pub(crate) struct Process {
    spec: VmSpec,
    tools: Tools,
}

impl Process {
    pub(crate) fn new(config: &Config, spec: VmSpec) -> Process {
        Process { spec, tools: config.tools.clone() }
    }
}

#[async_trait]
impl Backend for Process {
    fn spec(&self) -> &VmSpec {
        &self.spec
    }

    async fn start(&self) -> Result<Parts, VmmError> {
        let spec = &self.spec;
        if let Some(disk) = spec.disks.first() {
            return Err(no_disk(disk));
        }
        if spec.restore.is_some() {
            return Err(VmmError::Unsupported {
                backend: "process",
                what: "a start from a snapshot".into(),
                hint: RESTORE_HINT,
            });
        }
        let agent = find(&self.tools.agent, AGENT_HINT)?;
        let cgroup = SandboxCgroup::at(&spec.cgroup);
        let state = spec.run_dir.join("agent");
        std::fs::create_dir_all(&state).map_err(|source| VmmError::Io {
            action: "cannot create",
            path: state.clone(),
            source,
        })?;
        let vsock = spec.run_dir.join(VSOCK_SOCKET);
        own_dir(vsock.parent().unwrap_or(&vsock), User { uid: 0, gid: 0 })?;
        remove_stale(&vsock)?;
        let mut args = vec!["process".into(), "--listen".into(), vsock.into()];
        args.extend(["--cgroup".into(), cgroup.guest().into()]);
        args.extend(["--state".into(), state.into()]);
        let vmm = Helper::launch(Launch {
            program: agent,
            args,
            cgroup: cgroup.helpers(),
            fds: Vec::new(),
            wall: Wall::agent(),
            stdout: None,
        })?;
        let console = Ring::new(GUEST_CONSOLE);
        let control = Box::new(Freezer(cgroup));
        Ok(Parts { vmm, control, helpers: Vec::new(), console, reason: EndReason::default(), events: None })
    }
}

fn no_disk(disk: &Disk) -> VmmError {
    VmmError::Unsupported {
        backend: "process",
        what: format!("the block device {}", disk.path.display()),
        hint: "use a snapshotter that mounts directories, overlayfs for example",
    }
}

/// Stops the agent with its containers, as a VMM stops its guest.
struct Freezer(SandboxCgroup);

impl Freezer {
    async fn set(&self, frozen: bool) -> Result<(), VmmError> {
        let cgroup = self.0.clone();
        match spawn_blocking(move || cgroup.freeze(frozen, CONTROL_LIMIT)).await {
            Ok(result) => Ok(result?),
            Err(error) => Err(error.into()),
        }
    }
}

#[async_trait]
impl Control for Freezer {
    async fn pause(&self) -> Result<(), VmmError> {
        self.set(true).await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.set(false).await
    }

    async fn snapshot(&self, _: &Path) -> Result<(), VmmError> {
        Err(VmmError::CannotSnapshot {
            backend: "process",
            reason: "it has no VM; set vmm = \"cloud-hypervisor\" on a host with KVM",
        })
    }

    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError> {
        Err(no_disk(disk))
    }
}
