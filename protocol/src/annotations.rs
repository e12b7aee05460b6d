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

/// The container is ready when a GET is answered with a status from 200 to 399: `8080/healthz`.
pub const READY_HTTP: &str = "cube.ready.http";

/// The container is ready when a connection is taken: `5432`.
pub const READY_TCP: &str = "cube.ready.tcp";

/// The container is ready when a program in it ends with 0: `["/bin/check","-q"]`.
pub const READY_EXEC: &str = "cube.ready.exec";

/// Name of a snapshot below `snapshot.dir`, or its path there: the sandbox goes on from it, and its rootfs is
/// that of the snapshot.
pub const SNAPSHOT_RESTORE: &str = "cube.snapshot.restore";

/// Id of the template that the sandbox is built for: names its log, and its snapshot.
pub const TEMPLATE_ID: &str = "cube.template.id";

/// What every annotation of ours begins with. An unknown one is refused by name.
pub const PREFIX: &str = "cube.";

/// Every annotation that this version knows.
pub const KNOWN: [&str; 12] = [
    LOG_FORWARDING,
    LOG_MODE,
    ALLOW_VSOCK,
    VCPUS,
    MEMORY_MIB,
    ROOTFS_MODE,
    ROOTFS_SIZE,
    SNAPSHOT_RESTORE,
    READY_HTTP,
    READY_TCP,
    READY_EXEC,
    TEMPLATE_ID,
];
