//! Virtual machine monitors behind one small trait.
//!
//! A backend owns the VMM process and its helpers (virtiofsd, vhost-device-vsock). Everything that
//! it starts is put into the sandbox's cgroup before it runs, and every file that it makes is in
//! the sandbox's run directory, so that clean-up needs neither the backend nor this process.

mod access;
mod cloud_hypervisor;
mod console;
mod error;
mod helper;
mod image;
pub mod kvm;
mod lent;
mod machine;
mod pidfd;
mod process;
pub mod program;
mod qemu;
pub mod select;
mod virtiofsd;
mod wall;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;

pub(crate) use self::lent::take_back;
pub use self::{
    cloud_hypervisor::size_in,
    error::{SnapshotDefect, SpawnError, VmmError},
    qemu::Accel,
    select::{Backend, Choice, choose, select},
    wall::keeper,
};
use crate::agent::dial::HybridVsock;

/// What a VM is made of. Host paths are absolute and exist before [`Vmm::boot`].
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// For process names and messages.
    pub sandbox_id: String,
    /// The sandbox's run directory, mode 0700: sockets and logs of the VMM go here.
    pub run_dir: PathBuf,
    /// The sandbox's cgroup v2 directory, created by the caller.
    pub cgroup: PathBuf,
    /// User of the host that the VMM runs as; the next number is that of a helper. 0 for root.
    pub user: u32,
    /// Group of every VMM on this host, which may read what they share.
    pub group: u32,
    /// 1 to 255. A VM made from a snapshot has those that the snapshot has.
    pub vcpus: u32,
    /// At least 64. A VM made from a snapshot has what the snapshot has.
    pub memory_mib: u64,
    /// Directory to export over virtiofs with the tag [`SHARE_TAG`]; `None` starts no virtiofsd.
    pub share: Option<PathBuf>,
    /// Block devices, in order. For a VM made from a snapshot: those of the snapshot, by serial, with
    /// the files that take the place of the original's.
    pub disks: Vec<Disk>,
    /// Appended to the kernel command line, after what the backend and the configuration need.
    pub cmdline: String,
    /// Directory that [`Vmm::snapshot`] wrote: the VM goes on from there, and no kernel is booted.
    /// Nothing in it is written to, and any number of VMs may be made from it at once; it has to stay
    /// until [`Vmm::boot`] returns.
    pub restore: Option<PathBuf>,
}

impl VmSpec {
    fn vmm_user(&self) -> wall::User {
        wall::User { uid: self.user, gid: self.group }
    }

    fn helper_user(&self) -> wall::User {
        let uid = if self.user == 0 { 0 } else { self.user + 1 };
        wall::User { uid, gid: uid }
    }

    /// Where the roots of processes are put together, each in a mount namespace of its own.
    fn root(&self) -> PathBuf {
        self.run_dir.join("root")
    }
}

/// Tag of the virtiofs device and of its mount in the guest, `/run/cube/shared`.
pub const SHARE_TAG: &str = "cube";

/// Name of the hybrid vsock socket in the run directory, with every backend.
/// It is in a directory of its own, which belongs to the process that makes it.
pub const VSOCK_SOCKET: &str = "vsock/vm.vsock";

/// Name of the file in which a VMM that writes a snapshot says who it is, as
/// [`WrittenBy`](crate::snapshot::WrittenBy) in JSON. No other version may be able to read the rest.
pub const WRITTEN_BY: &str = "vmm.json";

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
    ///
    /// With [`VmSpec::restore`] the guest goes on where the snapshot was taken, which is quiesced: it
    /// wants `Guest.Thaw` next. Its old connections are gone, and its agent listens. Takes as long as
    /// it takes to read the memory that the guest had used.
    async fn boot(&mut self) -> Result<(), VmmError>;

    /// Pid on the host of what containerd is told: a process that lives as long as the VMM does, and has
    /// an empty root. 0 before [`boot`](Vmm::boot).
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

    /// Writes memory and device state of the paused VM into `dir`, which exists, is empty and absolute,
    /// and has mode 0700. The files get mode 0600; guest memory is full of secrets. Disks are the
    /// caller's to copy, before [`resume`](Vmm::resume). Nothing is synced to the host's disk.
    ///
    /// The VM stays paused, also after an error; whatever is in `dir` then is the caller's to remove.
    /// Takes as long as it takes to write the memory that the guest has used, and 20 s and a second for
    /// every 32 MiB of the VM's memory at most. A VMM that is still writing when that time is over
    /// answers nothing before it is done.
    ///
    /// Cloud Hypervisor only, and only without [`VmSpec::share`]; otherwise
    /// [`VmmError::CannotSnapshot`].
    async fn snapshot(&self, dir: &Path) -> Result<(), VmmError>;

    /// Gives the running VM one more block device. The guest sees it soon after this returns, and finds
    /// it by its serial, which no other device of this VM may have. A snapshot has it from then on.
    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError>;

    /// Waits at most `grace` for a guest that was told to power off, then kills the VMM.
    async fn shutdown(&self, grace: Duration) -> Result<(), VmmError>;

    /// Ends the VMM and its helpers with SIGKILL, and returns when they are gone.
    async fn kill(&self) -> Result<(), VmmError>;
}
