//! What a VM that runs can be told.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use nix::sys::{
    signal::Signal,
    wait::{Id, WaitPidFlag, WaitStatus, waitid},
};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{
    super::{
        Disk, VmSpec, VmmError,
        access::{self, Shown},
        helper::Helper,
        machine::{CONTROL_LIMIT, Control},
        pidfd,
    },
    disk::Ports,
    qmp::Qmp,
};

/// How often a process is looked at that is about to stop.
const POLL: Duration = Duration::from_millis(1);

/// The VM of one QEMU process.
///
/// It is paused by SIGSTOP, not by QMP's `stop`. That would take the queues away from vhost-device-vsock
/// (0.3.0), which does not survive it: with the first byte or connection that comes from the host before
/// the queues are back, the thread that serves them ends, and no byte ever gets through again. A QEMU
/// that is stopped as a process leaves the daemon its queues; what the host sends waits in them. To the
/// guest the pause is time that passes, so Thaw has less to do.
pub(super) struct Controller {
    qmp: Qmp,
    ports: Ports,
    program: PathBuf,
    process: OwnedFd,
    shown: Shown,
}

impl Controller {
    pub(super) fn new(qmp: Qmp, vmm: &Helper, spec: &VmSpec) -> Result<Controller, VmmError> {
        let program = vmm.program().to_owned();
        let process = vmm.pidfd().try_clone();
        let process = process.map_err(|source| cannot("cannot watch", &program, source))?;
        Ok(Controller { qmp, ports: Ports::default(), program, process, shown: Shown::new(vmm, spec) })
    }

    fn send(&self, signal: Signal) -> Result<(), VmmError> {
        pidfd::send(&self.process, signal).map_err(|source| cannot("cannot signal", &self.program, source))
    }

    /// Resolves when every thread has stopped: the kernel tells of the process no earlier.
    async fn stopped(&self) -> Result<(), VmmError> {
        let looks = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        loop {
            match waitid(Id::PIDFd(self.process.as_fd()), looks) {
                Ok(WaitStatus::Stopped(..)) => return Ok(()),
                Ok(_) => sleep(POLL).await,
                Err(errno) => return Err(cannot("cannot wait for", &self.program, errno.into())),
            }
        }
    }
}

fn cannot(action: &'static str, program: &Path, source: io::Error) -> VmmError {
    VmmError::Io { action, path: program.into(), source }
}

#[async_trait]
impl Control for Controller {
    async fn pause(&self) -> Result<(), VmmError> {
        self.send(Signal::SIGSTOP)?;
        let stopped = timeout(CONTROL_LIMIT, self.stopped()).await;
        stopped.unwrap_or(Err(VmmError::Timeout { what: "the stop of QEMU", limit: CONTROL_LIMIT }))
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.send(Signal::SIGCONT)
    }

    async fn snapshot(&self, _: &Path) -> Result<(), VmmError> {
        Err(VmmError::CannotSnapshot {
            backend: "qemu",
            reason: "a VM with a vhost-user vsock device cannot be saved; set vmm = \"cloud-hypervisor\" on a \
                     host with KVM",
        })
    }

    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError> {
        let (shown, new) = (self.shown.clone(), disk.clone());
        spawn_blocking(move || access::show_disk(&shown, &new)).await??;
        self.ports.plug(&self.qmp, disk).await
    }
}
