//! Where things are in a guest. The same on the `process` backend, see [`crate::boot::process`].

/// Below it the host may mount what the whole sandbox shares.
pub const CUBE: &str = "/run/cube";

/// A directory per container, with its root file system in [`ROOTFS`].
pub const CONTAINERS: &str = "/run/cube/containers";

/// In a container's directory.
pub const ROOTFS: &str = "rootfs";

/// The guest's resolv.conf(5). In a VM /etc/resolv.conf links to it.
pub const RESOLV_CONF: &str = "/run/cube/resolv.conf";
