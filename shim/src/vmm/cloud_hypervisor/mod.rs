//! Cloud Hypervisor, the VMM for production. Its own seccomp filters stay on.

mod api;
mod config;
mod control;
mod events;
mod place;
mod restore;
mod snapshot;
pub(super) mod version;

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::Value;

use self::{api::Api, control::Controller};
use super::{
    VSOCK_SOCKET, VmSpec, VmmError,
    access::{self, Shown},
    console::{GUEST_CONSOLE, Ring},
    helper::{Helper, Launch, listen, own_dir, remove_stale},
    image,
    machine::{Backend, EndReason, Parts, culprit},
    program::{CLOUD_HYPERVISOR_HINT, find},
    virtiofsd,
    wall::{Root, Wall},
};
use crate::{
    cgroup::SandboxCgroup,
    config::{Config, Guest, Tools},
};

pub use self::restore::size_in;

/// How long a request may take that moves no memory. vm.boot is the longest: it reads the kernel and makes
/// every device, and on nested virtualization takes seconds.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// A VM in Cloud Hypervisor.
#[derive(Debug)]
pub(crate) struct CloudHypervisor {
    spec: VmSpec,
    guest: Guest,
    tools: Tools,
}

impl CloudHypervisor {
    pub(crate) fn new(config: &Config, spec: VmSpec) -> CloudHypervisor {
        CloudHypervisor { spec, guest: config.guest.clone(), tools: config.tools.clone() }
    }
}

/// What a VM begins with.
enum Origin {
    /// A kernel, and vm.create's body that names it.
    Kernel { config: Value, memory_bytes: u64 },
    /// A snapshot.
    Snapshot { dir: PathBuf, url: String, memory_bytes: u64 },
}

impl CloudHypervisor {
    /// What Cloud Hypervisor sees of the host.
    fn root(&self, program: &Path, origin: &Origin) -> Result<Root, VmmError> {
        let VmSpec { run_dir, share, group, .. } = &self.spec;
        let vsock = run_dir.join(VSOCK_SOCKET);
        let mut root = Root::new(&self.spec.root()).open().program(program).proc();
        root = root.write(vsock.parent().unwrap_or(&vsock));
        if share.is_some() {
            root = root.write(&virtiofsd::socket(run_dir));
        }
        root = match origin {
            Origin::Kernel { .. } => root.read(&self.guest.vmlinux).read(&self.guest.initrd),
            Origin::Snapshot { .. } => restore::files(&self.spec)?.iter().try_fold(root, |root, path| {
                access::let_group_read(path, *group)?;
                Ok::<_, VmmError>(root.read(path))
            })?,
        };
        access::with_devices_and_disks(root, &self.spec)
    }

    fn origin(&self) -> Result<Origin, VmmError> {
        match &self.spec.restore {
            Some(dir) => {
                let source = restore::prepare(&self.spec, dir)?;
                let (url, memory_bytes) = (snapshot::url(&source.dir)?, source.memory_bytes);
                Ok(Origin::Snapshot { dir: dir.clone(), url, memory_bytes })
            }
            None => {
                image::check(&self.guest.vmlinux, "vmlinux")?;
                image::check(&self.guest.initrd, "initrd")?;
                let config = config::vm(&self.spec, &self.guest);
                Ok(Origin::Kernel { config, memory_bytes: self.spec.memory_mib << 20 })
            }
        }
    }
}

impl Origin {
    /// Makes the VM in Cloud Hypervisor `version`, and lets its virtual CPUs run.
    async fn run(&self, api: &Api, version: &str) -> Result<(), VmmError> {
        match self {
            Origin::Kernel { config, .. } => {
                api.put("vm.create", Some(config), self.limit()).await?;
                api.put("vm.boot", None, self.limit()).await
            }
            Origin::Snapshot { dir, url, .. } => {
                restore::check_version(dir, version)?;
                api.put("vm.restore", Some(&restore::request(url)), self.limit()).await?;
                api.put("vm.resume", None, self.limit()).await
            }
        }
    }

    fn memory_bytes(&self) -> u64 {
        match self {
            Origin::Kernel { memory_bytes, .. } | Origin::Snapshot { memory_bytes, .. } => *memory_bytes,
        }
    }

    /// How long a request may take.
    fn limit(&self) -> Duration {
        match self {
            Origin::Kernel { .. } => REQUEST_LIMIT,
            Origin::Snapshot { memory_bytes, .. } => REQUEST_LIMIT + snapshot::limit(*memory_bytes),
        }
    }
}

fn api_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("api.sock")
}

#[async_trait]
impl Backend for CloudHypervisor {
    fn spec(&self) -> &VmSpec {
        &self.spec
    }

    async fn start(&self) -> Result<Parts, VmmError> {
        let program = find(&self.tools.cloud_hypervisor, CLOUD_HYPERVISOR_HINT)?;
        let origin = self.origin()?;
        let cgroup = SandboxCgroup::at(&self.spec.cgroup);
        let mut helpers = Vec::new();
        if let Some(share) = &self.spec.share {
            helpers.push(virtiofsd::launch(&self.spec, share, &self.tools.virtiofsd)?);
        }

        let vsock = self.spec.run_dir.join(VSOCK_SOCKET);
        own_dir(vsock.parent().unwrap_or(&vsock), self.spec.vmm_user())?;
        remove_stale(&vsock)?;
        let socket = api_socket(&self.spec.run_dir);
        let listener = OwnedFd::from(listen(&socket)?);
        let (events, events_write_end) = events::pipe()?;
        let console = Ring::new(GUEST_CONSOLE);
        let vmm = Helper::launch(Launch {
            program: program.clone(),
            args: vec![
                "--api-socket".into(),
                format!("fd={}", listener.as_raw_fd()).into(),
                "--event-monitor".into(),
                format!("fd={}", events_write_end.as_raw_fd()).into(),
            ],
            cgroup: cgroup.helpers(),
            fds: vec![listener, events_write_end],
            wall: Wall::helper(self.root(&program, &origin)?, self.spec.vmm_user()),
            stdout: Some(console.clone()),
        })?;
        let reason = EndReason::default();
        let events = tokio::spawn(events::follow(events, reason.clone(), cgroup));

        let api = Api::new(socket);
        let run = async {
            let version = version::check_running(&api, &program, REQUEST_LIMIT).await?;
            origin.run(&api, &version).await?;
            Ok(version)
        };
        match vmm.until("the start of Cloud Hypervisor", 2 * origin.limit(), run).await {
            Ok(version) => {
                let control = Box::new(Controller::new(
                    api,
                    version,
                    &self.spec,
                    origin.memory_bytes(),
                    Shown::new(&vmm, &self.spec),
                ));
                Ok(Parts { vmm, control, helpers, console, reason, events: Some(events) })
            }
            Err(error) => Err(culprit(&helpers, error).await),
        }
    }
}
