//! Cloud Hypervisor, the VMM for production. Its own seccomp filters stay on.

mod api;
mod events;

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Value, json};

use self::api::Api;
use super::{
    Disk, SHARE_TAG, VSOCK_SOCKET, VmSpec, VmmError,
    console::{GUEST_CONSOLE, Ring},
    helper::{Helper, Launch, listen},
    image,
    machine::{Backend, CONTROL_LIMIT, Control, EndReason, Parts, culprit},
    program::{CLOUD_HYPERVISOR_HINT, find},
    virtiofsd,
};
use crate::{
    cgroup::SandboxCgroup,
    config::{Config, Guest, Tools},
};

/// How long a request may take. vm.boot is the longest: it reads the kernel and makes every device,
/// and on nested virtualization takes seconds.
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
        image::check(&self.guest.vmlinux, "vmlinux")?;
        image::check(&self.guest.initrd, "initrd")?;
        let cgroup = SandboxCgroup::at(&self.spec.cgroup);
        let mut helpers = Vec::new();
        if let Some(share) = &self.spec.share {
            helpers.push(virtiofsd::launch(&self.spec, share, &self.tools.virtiofsd)?);
        }

        let socket = api_socket(&self.spec.run_dir);
        let listener = OwnedFd::from(listen(&socket)?);
        let (events, events_write_end) = events::pipe()?;
        let console = Ring::new(GUEST_CONSOLE);
        let vmm = Helper::launch(Launch {
            program,
            args: vec![
                "--api-socket".into(),
                format!("fd={}", listener.as_raw_fd()).into(),
                "--event-monitor".into(),
                format!("fd={}", events_write_end.as_raw_fd()).into(),
            ],
            cgroup: cgroup.helpers(),
            fds: vec![listener, events_write_end],
            own_network: true,
            stdout: Some(console.clone()),
        })?;
        let reason = EndReason::default();
        let events = tokio::spawn(events::follow(events, reason.clone(), cgroup));

        let api = Api::new(socket);
        let config = vm_config(&self.spec, &self.guest);
        let boot = async {
            api.put("vm.create", Some(&config), REQUEST_LIMIT).await?;
            api.put("vm.boot", None, REQUEST_LIMIT).await
        };
        match vmm.until("the start of Cloud Hypervisor", 2 * REQUEST_LIMIT, boot).await {
            Ok(()) => {
                let control = Box::new(api);
                Ok(Parts { vmm, control, helpers, console, reason, events: Some(events) })
            }
            Err(error) => Err(culprit(&helpers, error).await),
        }
    }
}

#[async_trait]
impl Control for Api {
    async fn pause(&self) -> Result<(), VmmError> {
        become_state(self, "vm.pause", "Paused").await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        become_state(self, "vm.resume", "Running").await
    }
}

/// Cloud Hypervisor refuses what is done already, as after a request whose answer was lost.
async fn become_state(api: &Api, request: &'static str, state: &str) -> Result<(), VmmError> {
    let refusal = match api.put(request, None, CONTROL_LIMIT).await {
        Err(refusal @ VmmError::Refused { .. }) => refusal,
        other => return other,
    };
    match api.get("vm.info", CONTROL_LIMIT).await {
        Ok(info) if info["state"] == state => Ok(()),
        _ => Err(refusal),
    }
}

/// The body of vm.create: `VmConfig` in `vmm/src/api/openapi/cloud-hypervisor.yaml` of its sources.
fn vm_config(spec: &VmSpec, guest: &Guest) -> Value {
    let mut config = json!({
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus},
        // Shared, for virtiofsd reads guest memory in its own process.
        "memory": {"size": spec.memory_mib << 20, "shared": true},
        "payload": {
            "kernel": guest.vmlinux,
            "initramfs": guest.initrd,
            "cmdline": image::cmdline("", &guest.cmdline, &spec.cmdline),
        },
        "rng": {"src": "/dev/urandom"},
        // The guest's console comes out of the VMM's standard output, which the shim reads.
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "vsock": {"cid": 3, "socket": spec.run_dir.join(VSOCK_SOCKET)},
        "disks": spec.disks.iter().map(disk_config).collect::<Vec<_>>(),
    });
    if spec.share.is_some() {
        config["fs"] = json!([{"tag": SHARE_TAG, "socket": virtiofsd::socket(&spec.run_dir)}]);
    }
    config
}

/// Always raw: a guest could write the header of another format into its own disk.
fn disk_config(disk: &Disk) -> Value {
    json!({"path": disk.path, "readonly": disk.read_only, "serial": disk.serial, "image_type": "Raw"})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            sandbox_id: "s".into(),
            run_dir: "/run/cube/k".into(),
            cgroup: "/nonexistent".into(),
            vcpus: 2,
            memory_mib: 256,
            share: None,
            disks: Vec::new(),
            cmdline: "cube.x=1".into(),
        }
    }

    #[test]
    fn the_configuration_says_size_kernel_and_vsock() {
        let config = vm_config(&spec(), &Guest::default());
        assert_eq!(config["cpus"], json!({"boot_vcpus": 2, "max_vcpus": 2}));
        assert_eq!(config["memory"], json!({"size": 268_435_456, "shared": true}));
        assert_eq!(config["vsock"]["socket"], "/run/cube/k/vm.vsock");
        assert_eq!(config["payload"]["kernel"], "/usr/share/cube/guest/vmlinux");
        let cmdline = config["payload"]["cmdline"].as_str().unwrap();
        assert!(cmdline.ends_with(" cube.x=1") && !cmdline.contains("mitigations"), "{cmdline}");
        assert!(config.get("fs").is_none());
    }

    #[test]
    fn a_share_and_disks_are_devices() {
        let disk = Disk { path: "/disk".into(), serial: "rootfs-1".into(), read_only: true };
        let spec = VmSpec { share: Some("/share".into()), disks: vec![disk], ..spec() };
        let config = vm_config(&spec, &Guest::default());
        assert_eq!(config["fs"], json!([{"tag": "cube", "socket": "/run/cube/k/virtiofsd.sock"}]));
        let expected =
            json!([{"path": "/disk", "readonly": true, "serial": "rootfs-1", "image_type": "Raw"}]);
        assert_eq!(config["disks"], expected);
    }
}
