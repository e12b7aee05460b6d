//! Virtual machine monitors behind one small trait.
//!
//! A backend owns the VMM process and its helpers (virtiofsd, vhost-device-vsock). Everything that
//! it starts is put into the sandbox's cgroup before it runs, and every file that it makes is in
//! the sandbox's run directory, so that clean-up needs neither the backend nor this process.

mod cloud_hypervisor;
mod console;
mod helper;
mod image;
pub mod kvm;
mod machine;
mod process;
pub mod program;
mod qemu;
pub mod select;
mod virtiofsd;

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;

pub use self::{
    qemu::Accel,
    select::{Backend, Choice, choose, select},
};
use crate::{agent::dial::HybridVsock, cgroup::CgroupError};

/// What a VM is made of. Host paths are absolute and exist before [`Vmm::boot`].
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// For process names and messages.
    pub sandbox_id: String,
    /// The sandbox's run directory, mode 0700: sockets and logs of the VMM go here.
    pub run_dir: PathBuf,
    /// The sandbox's cgroup v2 directory, created by the caller.
    pub cgroup: PathBuf,
    /// 1 to 255.
    pub vcpus: u32,
    /// At least 64.
    pub memory_mib: u64,
    /// Directory to export over virtiofs with the tag [`SHARE_TAG`]; `None` starts no virtiofsd.
    pub share: Option<PathBuf>,
    /// Block devices, in order.
    pub disks: Vec<Disk>,
    /// Appended to the kernel command line, after what the backend and the configuration need.
    pub cmdline: String,
}

/// Tag of the virtiofs device and of its mount in the guest, `/run/cube/shared`.
pub const SHARE_TAG: &str = "cube";

/// Name of the hybrid vsock socket in the run directory, with every backend.
pub const VSOCK_SOCKET: &str = "vm.vsock";

/// A block device of a VM.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Block device or raw image file.
    pub path: PathBuf,
    /// At most 20 ASCII characters, unique in the VM; the guest finds the device by it.
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmExit {
    /// Whether the guest powered off by itself or [`Vmm::shutdown`] did it.
    pub expected: bool,
    /// For operators: the exit status or signal, and the last lines of the VMM's and the guest's
    /// console if the end was not expected.
    pub description: String,
}

/// One VM. Made by [`select()`]; used by the sandbox's owner task and its jobs only.
///
/// Order of calls: [`boot`](Vmm::boot) once; then any; [`shutdown`](Vmm::shutdown) or
/// [`kill`](Vmm::kill) at the end, also while another call is under way. Dropping it leaves the VM
/// running.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts the helpers and the VM. Returns when the VMM runs the virtual CPUs, which is before
    /// the agent listens. On an error nothing is left running.
    async fn boot(&mut self) -> Result<(), VmmError>;

    /// Pid on the host of the VMM; what containerd is told. 0 before [`boot`](Vmm::boot).
    fn pid(&self) -> u32;

    /// Where the agent is dialled. Valid before [`boot`](Vmm::boot).
    fn vsock(&self) -> HybridVsock;

    /// Resolves when the VMM process has ended. Cancel safe; may be awaited repeatedly.
    async fn wait(&self) -> VmmExit;

    /// Stops the virtual CPUs; when it returns, the guest executes nothing. Does nothing if they are
    /// stopped. Takes milliseconds, and 10 s at most; after an error they may be stopped or not.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Lets the virtual CPUs run again, with every connection to the guest as it was. Does nothing if
    /// they run. Same times and same doubt as [`pause`](Vmm::pause).
    async fn resume(&self) -> Result<(), VmmError>;

    /// Waits at most `grace` for a guest that was told to power off, then kills the VMM.
    async fn shutdown(&self, grace: Duration) -> Result<(), VmmError>;

    /// Ends the VMM and its helpers with SIGKILL, and returns when they are gone.
    async fn kill(&self) -> Result<(), VmmError>;
}

/// What a VMM backend can fail with. The texts name the file or program and what to do.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A program that the backend needs is not installed.
    #[error("{program} was not found: {hint}")]
    MissingProgram {
        /// As configured in `[tools]`.
        program: PathBuf,
        /// How to get it.
        hint: &'static str,
    },
    /// A file that the guest boots from does not exist.
    #[error(
        "the guest image file {path} does not exist: make it with `rootfs-scripts/build-guest`, or set guest.{key} in the configuration file"
    )]
    MissingImage {
        /// The file.
        path: PathBuf,
        /// The key of the `[guest]` table.
        key: &'static str,
    },
    /// A program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A program ended before it was ready.
    #[error("{program} ended with {status} before it was ready: {output}")]
    Died {
        /// The program.
        program: PathBuf,
        /// Exit status or signal.
        status: String,
        /// The last lines it printed.
        output: String,
    },
    /// A program did what it was asked too slowly.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was awaited.
        what: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The VMM refused a request.
    #[error("{program} refused {request}: {reply}")]
    Refused {
        /// The VMM.
        program: &'static str,
        /// Request and path, or QMP command.
        request: String,
        /// Its answer.
        reply: String,
    },
    /// A file or socket operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The sandbox's processes could not be ended or frozen.
    #[error("cannot end or freeze the processes of the sandbox")]
    Cgroup(#[from] CgroupError),
    /// The backend cannot do this.
    #[error("the {backend} backend does not support {what}: {hint}")]
    Unsupported {
        /// The backend's name in the configuration.
        backend: &'static str,
        /// What was asked.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
}
