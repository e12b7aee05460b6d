//! Where things are in a guest. The same on the `process` backend, see [`crate::boot::process`].

/// Below it the host may mount what the whole sandbox shares.
pub const CUBE: &str = "/run/cube";

/// The agent's own binary, read-only, from which the init stages are executed.
pub const STAGE: &str = "/run/cube/agent";

/// A directory per container, with its root file system in [`ROOTFS`].
pub const CONTAINERS: &str = "/run/cube/containers";

/// A directory per container, with a proc file system of its pid namespace.
pub const PROC: &str = "/run/cube/proc";

/// In a container's directory.
pub const ROOTFS: &str = "rootfs";

/// The guest's resolv.conf(5). In a VM /etc/resolv.conf links to it.
pub const RESOLV_CONF: &str = "/run/cube/resolv.conf";
