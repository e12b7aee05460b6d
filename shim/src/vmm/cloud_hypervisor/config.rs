//! The body of vm.create: `VmConfig` in `vmm/src/api/openapi/cloud-hypervisor.yaml` of its sources.

use serde_json::{Value, json};

use super::super::{Disk, SHARE_TAG, VSOCK_SOCKET, VmSpec, image, virtiofsd};
use crate::config::Guest;

/// Where the guest's entropy comes from.
pub(super) const ENTROPY: &str = "/dev/urandom";

/// A VM that boots a kernel.
pub(super) fn vm(spec: &VmSpec, guest: &Guest) -> Value {
    let mut config = json!({
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus},
        // Shared, for virtiofsd reads guest memory in its own process; and a snapshot of shared memory
        // leaves out the pages that the guest never touched, where of private memory all are written.
        "memory": {"size": spec.memory_mib << 20, "shared": true},
        "payload": {
            "kernel": guest.vmlinux,
            "initramfs": guest.initrd,
            "cmdline": image::cmdline("", &guest.cmdline, &spec.cmdline),
        },
        "rng": {"src": ENTROPY},
        // The guest's console comes out of the VMM's standard output, which the shim reads.
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "vsock": {"cid": 3, "socket": spec.run_dir.join(VSOCK_SOCKET)},
        "disks": spec.disks.iter().map(disk).collect::<Vec<_>>(),
    });
    if spec.share.is_some() {
        config["fs"] = json!([{"tag": SHARE_TAG, "socket": virtiofsd::socket(&spec.run_dir)}]);
    }
    config
}

/// Always raw: a guest could write the header of another format into its own disk.
pub(super) fn disk(disk: &Disk) -> Value {
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
            user: 0,
            group: 0,
            vcpus: 2,
            memory_mib: 256,
            share: None,
            disks: Vec::new(),
            cmdline: "cube.x=1".into(),
            restore: None,
        }
    }

    #[test]
    fn the_configuration_says_size_kernel_and_vsock() {
        let config = vm(&spec(), &Guest::default());
        assert_eq!(config["cpus"], json!({"boot_vcpus": 2, "max_vcpus": 2}));
        assert_eq!(config["memory"], json!({"size": 268_435_456, "shared": true}));
        assert_eq!(config["vsock"]["socket"], "/run/cube/k/vsock/vm.vsock");
        assert_eq!(config["payload"]["kernel"], "/usr/share/cube/guest/vmlinux");
        let cmdline = config["payload"]["cmdline"].as_str().unwrap();
        assert!(cmdline.ends_with(" cube.x=1") && !cmdline.contains("mitigations"), "{cmdline}");
        assert!(config.get("fs").is_none());
    }

    #[test]
    fn a_share_and_disks_are_devices() {
        let disk = Disk { path: "/disk".into(), serial: "rootfs-1".into(), read_only: true };
        let spec = VmSpec { share: Some("/share".into()), disks: vec![disk], ..spec() };
        let config = vm(&spec, &Guest::default());
        assert_eq!(config["fs"], json!([{"tag": "cube", "socket": "/run/cube/k/virtiofsd.sock"}]));
        let expected =
            json!([{"path": "/disk", "readonly": true, "serial": "rootfs-1", "image_type": "Raw"}]);
        assert_eq!(config["disks"], expected);
    }
}
