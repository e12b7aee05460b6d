//! A guest, a VMM and a host in this process, for the tests of the owner.

mod guest;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde_json::Value;
use tokio::sync::watch;

pub(super) use self::guest::{Fault, Guest};
use super::{Host, Placed, Rootfs, RootfsRequest, Selected};
use crate::{
    agent::dial::HybridVsock,
    cgroup::{Limited, Limits},
    config::Config,
    errors::Error,
    rootfs::block::Staged,
    snapshot::Suspended,
    state::RunDir,
    vmm::{Disk, VmSpec, Vmm, VmmError, VmmExit},
};

/// Pid of the fake VMM.
pub(super) const PID: u32 = 4242;

/// The VMM: a switch.
#[derive(Clone)]
pub(super) struct FakeVmm {
    socket: PathBuf,
    /// How many were chosen before it.
    generation: u64,
    /// Generation of the last that was booted, and whether it lives.
    alive: watch::Sender<(u64, bool)>,
    paused: watch::Sender<bool>,
    /// Whether what it may take of the host is limited.
    is_limited: Arc<AtomicBool>,
    /// Whether a pause fails.
    pub(super) sticks: Arc<AtomicBool>,
    /// Whether a snapshot fails.
    pub(super) sticks_in_snapshots: Arc<AtomicBool>,
    /// How often it does not answer when it is to stop or to start its CPUs.
    pub(super) busy: Arc<AtomicU32>,
    /// The same, beginning with a snapshot that fails.
    pub(super) busy_then: Arc<AtomicU32>,
    /// What one does that is booted from a snapshot.
    pub(super) restores: Arc<Mutex<Boot>>,
    /// What it was made from.
    pub(super) spec: Option<VmSpec>,
    boots: bool,
}

/// What a VMM does when it is to boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Boot {
    #[default]
    Works,
    Fails,
    Hangs,
}

impl FakeVmm {
    pub(super) fn die(&self) {
        self.alive.send_modify(|(_, alive)| *alive = false);
    }

    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.borrow().1
    }

    fn answer(&self) -> Result<(), VmmError> {
        if !self.is_alive() {
            return Err(VmmError::Ended { during: "a test", description: "killed by a test".into() });
        }
        let less = |busy: u32| busy.checked_sub(1);
        match self.busy.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            Ok(_) => Err(VmmError::Timeout { what: "vm.resume", limit: Duration::ZERO }),
            Err(_) => Ok(()),
        }
    }
}

#[async_trait]
impl Vmm for FakeVmm {
    async fn boot(&mut self) -> Result<(), VmmError> {
        assert!(self.is_limited.load(Ordering::Relaxed), "a VM has its limits when it begins");
        let restores = self.spec.as_ref().is_some_and(|spec| spec.restore.is_some());
        let fate = *self.restores.lock().unwrap();
        if !self.boots || (restores && fate == Boot::Hangs) {
            std::future::pending::<()>().await;
        }
        if restores && fate == Boot::Fails {
            return Err(VmmError::Timeout { what: "booting", limit: Duration::ZERO });
        }
        self.alive.send_replace((self.generation, true));
        self.paused.send_replace(false);
        Ok(())
    }

    fn pid(&self) -> u32 {
        PID + self.generation as u32
    }

    fn vsock(&self) -> HybridVsock {
        HybridVsock::new(&self.socket)
    }

    async fn wait(&self) -> VmmExit {
        let mine = self.generation;
        let _ = self.alive.subscribe().wait_for(|(current, alive)| !alive || *current != mine).await;
        VmmExit { expected: false, description: "killed by a test".into() }
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.answer()?;
        if self.sticks.load(Ordering::Relaxed) {
            return Err(VmmError::Timeout { what: "pausing", limit: Duration::ZERO });
        }
        self.paused.send_replace(true);
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.answer()?;
        self.paused.send_replace(false);
        Ok(())
    }

    async fn snapshot(&self, dir: &Path) -> Result<(), VmmError> {
        assert!(self.is_paused(), "memory changes while it is written");
        if self.sticks_in_snapshots.load(Ordering::Relaxed) {
            self.busy.fetch_max(self.busy_then.load(Ordering::Relaxed), Ordering::Relaxed);
            let source = VmmError::Timeout { what: "writing", limit: Duration::ZERO };
            return Err(VmmError::Snapshot { dir: dir.into(), source: Box::new(source) });
        }
        std::fs::write(dir.join("memory-ranges"), "memory").unwrap();
        let by = r#"{"name": "fake", "version": "v1.0"}"#;
        std::fs::write(dir.join(crate::vmm::WRITTEN_BY), by).unwrap();
        Ok(())
    }

    async fn add_disk(&self, _: &Disk) -> Result<(), VmmError> {
        Ok(())
    }

    async fn shutdown(&self, _: Duration) -> Result<(), VmmError> {
        self.die();
        Ok(())
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.die();
        Ok(())
    }
}

/// The host: remembers what it was asked.
pub(super) struct FakeHost {
    pub(super) vmm: FakeVmm,
    pub(super) guest: Arc<Guest>,
    pub(super) released: Mutex<Vec<String>>,
    pub(super) size: Mutex<(u32, u64)>,
    /// What its cgroup was limited to.
    pub(super) limits: Mutex<Vec<Limits>>,
    /// What each VM was made from.
    pub(super) chosen: Mutex<Vec<VmSpec>>,
    runtime: tokio::runtime::Handle,
}

impl FakeHost {
    pub(super) fn new(guest: Guest, socket: PathBuf, boots: bool) -> FakeHost {
        FakeHost {
            vmm: FakeVmm {
                socket,
                generation: 0,
                alive: watch::Sender::new((0, true)),
                paused: watch::Sender::new(false),
                is_limited: Arc::default(),
                sticks: Arc::default(),
                sticks_in_snapshots: Arc::default(),
                busy: Arc::default(),
                busy_then: Arc::default(),
                restores: Arc::default(),
                spec: None,
                boots,
            },
            guest: Arc::new(guest),
            released: Mutex::default(),
            size: Mutex::default(),
            limits: Mutex::default(),
            chosen: Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
        }
    }
}

impl Host for FakeHost {
    fn cgroup(&self, key: &str, _: Option<&str>) -> Result<Placed, Error> {
        Ok(Placed { cgroup: Path::new("/cgroup").join(key), shim_home: None })
    }

    fn limit(&self, cgroup: &Path, limits: &Limits) -> Result<Limited, Error> {
        self.vmm.is_limited.store(true, Ordering::Relaxed);
        self.limits.lock().unwrap().push(limits.clone());
        Ok(Limited { cgroup: cgroup.into(), memory_bytes: Some(limits.memory_bytes), ..Default::default() })
    }

    fn create_cgroup(&self, _: &Path) -> Result<(), Error> {
        Ok(())
    }

    fn prepare_rootfs(&self, request: RootfsRequest, _: &mut Value) -> Result<Rootfs, Error> {
        // What is made is known to the state file before.
        assert!(request.run_dir.load()?.unwrap().containers.contains_key(&request.id));
        Ok(Rootfs { share: true, ..Default::default() })
    }

    fn restore_disks(&self, _: &Config, _: &RunDir, snapshot: &[Disk]) -> Result<Vec<Disk>, Error> {
        Ok(snapshot.to_vec())
    }

    fn stage_disks(&self, _: &Config, _: &RunDir, _: &[Disk], _: &[Disk]) -> Result<Staged, Error> {
        Ok(Staged::default())
    }

    fn release_rootfs(&self, _: &RunDir, id: &str) -> Result<(), Error> {
        self.released.lock().unwrap().push(id.into());
        Ok(())
    }

    fn select(&self, _: &Config, spec: VmSpec) -> Result<Selected, Error> {
        *self.size.lock().unwrap() = (spec.vcpus, spec.memory_mib);
        let _context = self.runtime.enter();
        // The guest of one that was before is the same, and has its socket.
        if !self.vmm.socket.exists() {
            self.guest.listen(&self.vmm.socket);
        }
        let mut chosen = self.chosen.lock().unwrap();
        let generation = chosen.len() as u64;
        let vmm = Box::new(FakeVmm { generation, spec: Some(spec.clone()), ..self.vmm.clone() });
        chosen.push(spec);
        let (backend, reason) = ("fake".into(), "test".into());
        Ok(Selected { vmm, backend, reason, shared_mount: Default::default(), overhead_mib: Some(100) })
    }

    fn claim_user(&self, _: &Config, _: &RunDir) -> Result<u32, Error> {
        Ok(1001)
    }

    fn destroy(&self, run_dir: &RunDir, _: &Path) -> Result<(), Error> {
        self.vmm.die();
        Suspended::remove_of(run_dir)?;
        Ok(run_dir.remove()?)
    }
}
