//! Block devices, at boot and later.

use std::{
    os::unix::fs::FileTypeExt,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};

use super::{
    super::{Disk, VmmError, machine::CONTROL_LIMIT},
    qmp::Qmp,
};

/// PCI Express ports that are empty at boot, each for one disk that comes later: a device can be plugged
/// into a port alone, not into the root bus.
pub(super) const PORTS: usize = 8;

/// Slot of the ports on the root bus, all of them functions of one device.
const SLOT: usize = 0x10;

/// The port with this number, below [`PORTS`].
pub(super) fn port(number: usize) -> Value {
    json!({
        "driver": "pcie-root-port",
        "id": port_name(number),
        "chassis": number + 1,
        "addr": format!("{SLOT:x}.{number:x}"),
        "multifunction": true,
    })
}

fn port_name(number: usize) -> String {
    format!("port{number}")
}

/// The file behind a device. Always raw: a guest could write the header of another format into its own
/// disk.
pub(super) fn node(name: &str, disk: &Disk) -> Result<Value, VmmError> {
    let meta = std::fs::metadata(&disk.path).map_err(|source| VmmError::Io {
        action: "cannot open the disk",
        path: disk.path.clone(),
        source,
    })?;
    let driver = if meta.file_type().is_block_device() { "host_device" } else { "file" };
    Ok(json!({
        "driver": "raw",
        "node-name": name,
        "read-only": disk.read_only,
        "file": {"driver": driver, "filename": disk.path, "read-only": disk.read_only, "discard": "unmap"},
    }))
}

/// The device that the guest sees. An error is for the guest, too: by default, QEMU stops it when the host's
/// disk is full.
pub(super) fn device(node: &str, disk: &Disk) -> Value {
    json!({
        "driver": "virtio-blk-pci",
        "drive": node,
        "serial": disk.serial,
        "werror": "report",
        "rerror": "report",
    })
}

/// Gives the running VM disks.
#[derive(Debug, Default)]
pub(super) struct Ports(AtomicUsize);

impl Ports {
    /// See [`Vmm::add_disk`](super::super::Vmm::add_disk). A port is used once, also if that fails.
    pub(super) async fn plug(&self, qmp: &Qmp, disk: &Disk) -> Result<(), VmmError> {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        if number >= PORTS {
            return Err(VmmError::Unsupported {
                backend: "qemu",
                what: format!("more than {PORTS} disks that are added to a running VM"),
                hint: "use fewer containers in a pod, or Cloud Hypervisor",
            });
        }
        let name = format!("added{number}");
        qmp.execute("blockdev-add", node(&name, disk)?, CONTROL_LIMIT).await?;
        let mut device = device(&name, disk);
        device["bus"] = port_name(number).into();
        let plugged = qmp.execute("device_add", device, CONTROL_LIMIT).await;
        if plugged.is_err() {
            // The file would stay open, and locked.
            let _ = qmp.execute("blockdev-del", json!({"node-name": name}), CONTROL_LIMIT).await;
        }
        plugged.map(drop)
    }
}
