//! OCI annotations that Cubebox reads from a container's `config.json`.
//!
//! They are set by whoever creates the container: with `ctr run --annotation`, or by pod authors
//! where containerd's runtime has `pod_annotations` and `container_annotations = ["cube.*"]`.
//! `docs/configuration.md` describes each for users.

/// `true` (default) or `false`: whether the init process's output goes to the log.
pub const LOG_FORWARDING: &str = "cube.container.log_forwarding";

/// `block` (default) or `drop-oldest`: what happens to a writer when nobody takes its output.
pub const LOG_MODE: &str = "cube.container.log_mode";

/// `true` or `false` (default): whether the container may create `AF_VSOCK` sockets.
pub const ALLOW_VSOCK: &str = "cube.container.allow_vsock";

/// Virtual CPUs of the sandbox, 1 to 255; default: from the spec's CPU limit, else the configuration.
pub const VCPUS: &str = "cube.sandbox.vcpus";

/// Memory of the sandbox in MiB; default: from the spec's memory limit, else the configuration.
pub const MEMORY_MIB: &str = "cube.sandbox.memory_mib";

/// `share` (default) or `block`: how directories of the host become the rootfs, over virtiofs or packed
/// into disks of the VM.
pub const ROOTFS_MODE: &str = "cube.rootfs.mode";

/// Size of the writable disk with `cube.rootfs.mode=block`, a number with `Mi` or `Gi`; default `10Gi`.
pub const ROOTFS_SIZE: &str = "cube.rootfs.size";

/// What every annotation of ours begins with. An unknown one is refused by name.
pub const PREFIX: &str = "cube.";

/// Every annotation that this version knows.
pub const KNOWN: [&str; 7] =
    [LOG_FORWARDING, LOG_MODE, ALLOW_VSOCK, VCPUS, MEMORY_MIB, ROOTFS_MODE, ROOTFS_SIZE];
