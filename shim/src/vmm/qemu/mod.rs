//! QEMU: for hosts whose KVM cannot be used, by emulation; with KVM where that works.

mod args;
mod control;
mod disk;
mod qmp;
mod vsock;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::Value;
use tokio::{net::UnixListener, task::JoinHandle};

use self::{control::Controller, qmp::Qmp};
use super::{
    VmSpec, VmmError, access,
    console::{GUEST_CONSOLE, Ring},
    helper::{Helper, Launch, give, listening, remove_stale},
    image,
    machine::{Backend, CONTROL_LIMIT, EndReason, Parts, culprit},
    program::{QEMU_HINT, RESTORE_HINT, find},
    virtiofsd,
    wall::{Root, Wall},
};
use crate::{
    cgroup::SandboxCgroup,
    config::{Config, Guest, Tools},
};

/// How long QEMU and its helpers may take until the virtual CPUs run: well below a second, but all
/// of a loaded host's sandboxes may start at once.
const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// How QEMU runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// In hardware.
    Kvm,
    /// By translation: anywhere, and slowly.
    Tcg,
}

fn qmp_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("qmp.sock")
}

/// Where vhost-device-vsock serves the device to QEMU; the host dials another socket.
fn vsock_device_socket(run_dir: &Path) -> PathBuf {
    directory(run_dir).join("device.sock")
}

/// The directory that vhost-device-vsock writes to.
fn directory(run_dir: &Path) -> PathBuf {
    run_dir.join("vsock")
}

/// Where QEMU's own data is, its ROMs for example, whoever has built it.
const DATA: [&str; 5] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/local/share/qemu",
    "/usr/local/share/seabios",
    "/usr/lib/ipxe",
];

/// A VM in QEMU.
#[derive(Debug)]
pub(crate) struct Qemu {
    spec: VmSpec,
    guest: Guest,
    tools: Tools,
    accel: Accel,
}

impl Qemu {
    pub(crate) fn new(config: &Config, spec: VmSpec, accel: Accel) -> Qemu {
        Qemu { spec, guest: config.guest.clone(), tools: config.tools.clone(), accel }
    }

    /// What QEMU sees of the host.
    fn root(&self, program: &Path) -> Result<Root, VmmError> {
        let VmSpec { run_dir, share, .. } = &self.spec;
        let mut root = Root::new(&self.spec.root()).open().program(program);
        root = DATA.iter().fold(root, |root, dir| root.data(dir.as_ref()));
        root = root.read(&self.guest.kernel).read(&self.guest.initrd);
        root = root.write(&qmp_socket(run_dir)).write(&vsock_device_socket(run_dir));
        if share.is_some() {
            root = root.write(&virtiofsd::socket(run_dir));
        }
        access::with_devices_and_disks(root, &self.spec)
    }

    fn cgroup(&self) -> SandboxCgroup {
        SandboxCgroup::at(&self.spec.cgroup)
    }
}

#[async_trait]
impl Backend for Qemu {
    fn spec(&self) -> &VmSpec {
        &self.spec
    }

    async fn start(&self) -> Result<Parts, VmmError> {
        if self.spec.restore.is_some() {
            return Err(VmmError::Unsupported {
                backend: "qemu",
                what: "a start from a snapshot".into(),
                hint: RESTORE_HINT,
            });
        }
        let program = find(&self.tools.qemu, QEMU_HINT)?;
        image::check(&self.guest.kernel, "kernel")?;
        image::check(&self.guest.initrd, "initrd")?;
        let args = args::command_line(&self.spec, &self.guest, self.accel)?;

        let vsock = vsock::launch(&self.spec, &self.tools.vhost_device_vsock)?;
        let mut helpers = Vec::new();
        if let Some(share) = &self.spec.share {
            helpers.push(virtiofsd::launch(&self.spec, share, &self.tools.virtiofsd)?);
        }
        let device = vsock_device_socket(&self.spec.run_dir);
        vsock.until("the start of vhost-device-vsock", BOOT_LIMIT, listening(vsock.pid(), &device)).await?;
        give(&device, self.spec.vmm_user())?;
        tokio::spawn(vsock::publish(vsock.clone(), self.spec.run_dir.clone()));
        helpers.push(vsock);

        let qmp_path = qmp_socket(&self.spec.run_dir);
        remove_stale(&qmp_path)?;
        let listener = UnixListener::bind(&qmp_path).map_err(|source| VmmError::Io {
            action: "cannot listen on",
            path: qmp_path.clone(),
            source,
        })?;
        give(&qmp_path, self.spec.vmm_user())?;
        let console = Ring::new(GUEST_CONSOLE);
        let root = self.root(&program)?;
        let vmm = Helper::launch(Launch {
            program,
            args,
            cgroup: self.cgroup().helpers(),
            fds: Vec::new(),
            wall: Wall::helper(root, self.spec.vmm_user()),
            stdout: Some(console.clone()),
        })?;
        let reason = EndReason::default();
        let running = wait_until_running(listener, qmp_path, reason.clone());
        let (qmp, events) = match vmm.until("the start of QEMU", BOOT_LIMIT, running).await {
            Ok(both) => both,
            Err(error) => return Err(culprit(&helpers, error).await),
        };
        let control = Box::new(Controller::new(qmp, &vmm, &self.spec)?);
        Ok(Parts { vmm, control, helpers, console, reason, events: Some(events) })
    }
}

/// QEMU connects after it has made every device; the answer to the command comes from its main loop,
/// which is entered with the virtual CPUs running.
async fn wait_until_running(
    listener: UnixListener,
    path: PathBuf,
    reason: EndReason,
) -> Result<(Qmp, JoinHandle<()>), VmmError> {
    let (stream, _) = listener.accept().await.map_err(|source| VmmError::Io {
        action: "cannot accept on",
        path: path.clone(),
        source,
    })?;
    let (qmp, events) = Qmp::negotiate(stream, path, reason).await?;
    let status = qmp.execute("query-status", Value::Null, CONTROL_LIMIT).await?;
    match status.get("running").and_then(Value::as_bool) {
        Some(true) => Ok((qmp, events)),
        _ => Err(VmmError::Refused {
            program: "QEMU",
            request: "to run the virtual CPUs".into(),
            reply: status.to_string(),
        }),
    }
}
