//! What a sandbox needs of its host, so that tests can put something else in its place.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::api::Mount;
use cube_protocol::guest::SharedMount;
use serde_json::Value;
use tracing::warn;

use crate::{
    cgroup::{Hierarchy, Limited, Limits, SandboxCgroup},
    config::Config,
    errors::{Error, chain},
    rootfs::{
        Plan, Prepared, Share,
        block::{self, BlockRequest, SandboxDisks, Staged},
    },
    snapshot::Suspended,
    state::RunDir,
    users,
    vmm::{self, Disk, VmSpec, Vmm},
};

/// How a container's rootfs reaches the guest.
#[derive(Debug, Clone, Default)]
pub struct Rootfs {
    /// Mounts that the agent makes, in order.
    pub guest_mounts: Vec<Mount>,
    /// Block devices that the VM needs.
    pub disks: Vec<Disk>,
    /// Whether the VM needs the sandbox's shared directory.
    pub share: bool,
}

/// What a container's rootfs is made from.
#[derive(Debug, Clone)]
pub struct RootfsRequest {
    /// Run directory of the sandbox.
    pub run_dir: RunDir,
    /// Container id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Mounts that make the rootfs, in order.
    pub mounts: Vec<Mount>,
    /// How to pack directories into disks, if they shall be.
    pub block: Option<BlockRequest>,
}

/// A VMM that has been chosen.
pub struct Selected {
    /// Not booted yet.
    pub vmm: Box<dyn Vmm>,
    /// The backend's name in the configuration.
    pub backend: String,
    /// Why this one.
    pub reason: String,
    /// How the guest mounts the shared directory.
    pub shared_mount: SharedMount,
    /// MiB that it takes beside the memory of the VM; `None` if there is no VM.
    pub overhead_mib: Option<u64>,
}

/// Where the processes of a sandbox are to be.
#[derive(Debug, Clone)]
pub struct Placed {
    /// The cgroup of all but the shim.
    pub cgroup: PathBuf,
    /// The cgroup that the shim is in, if it is to be moved beside that.
    pub shim_home: Option<PathBuf>,
}

/// The host. Every method blocks the thread, for milliseconds if it does not say more.
pub trait Host: Send + Sync + 'static {
    /// The cgroup of the sandbox with `key`, whose spec names the cgroup `path`; makes nothing.
    fn cgroup(&self, key: &str, path: Option<&str>) -> Result<Placed, Error>;

    /// The users of the sandbox with this run directory. Given back by [`Host::destroy`].
    fn claim_user(&self, config: &Config, run_dir: &RunDir) -> Result<u32, Error>;

    /// Makes it, and moves this process beside it.
    fn create_cgroup(&self, cgroup: &Path) -> Result<(), Error>;

    /// Limits it, with this process, as far as that is possible here.
    fn limit(&self, cgroup: &Path, limits: &Limits) -> Result<Limited, Error>;

    /// Makes the rootfs and the bind mounts of a container reachable for the guest, and rewrites
    /// `spec`'s mounts accordingly. Undone by [`Host::release_rootfs`], also after an error. Takes
    /// minutes if it has to pack an image, which [`BlockRequest::cancel`] ends.
    fn prepare_rootfs(&self, request: RootfsRequest, spec: &mut Value) -> Result<Rootfs, Error>;

    /// Makes the disks of a sandbox from those of a snapshot. Undone by [`Host::destroy`]. Takes the time to
    /// copy what guests have written, where the file system cannot share it.
    fn restore_disks(&self, config: &Config, run_dir: &RunDir, snapshot: &[Disk])
    -> Result<Vec<Disk>, Error>;

    /// Copies the disks of a snapshot beside the `current` ones of a sandbox, to take their place. Takes the
    /// time to copy what guests have written, where the file system cannot share it.
    fn stage_disks(
        &self,
        config: &Config,
        run_dir: &RunDir,
        current: &[Disk],
        snapshot: &[Disk],
    ) -> Result<Staged, Error>;

    /// Unmounts and removes what was prepared for container `id`. May be repeated.
    fn release_rootfs(&self, run_dir: &RunDir, id: &str) -> Result<(), Error>;

    /// Chooses a VMM.
    fn select(&self, config: &Config, spec: VmSpec) -> Result<Selected, Error>;

    /// Removes everything of a sandbox: processes in its cgroup, the cgroup, mounts, the run
    /// directory. May be repeated.
    fn destroy(&self, run_dir: &RunDir, cgroup: &Path) -> Result<(), Error>;
}

/// The machine that this process runs on.
#[derive(Debug, Default)]
pub struct LinuxHost {
    /// Whether somebody else has placed this process in a cgroup, in which it stays.
    pub shim_stays: bool,
}

/// How long killing a sandbox's processes may take; they are in the hands of the kernel then.
const KILL_LIMIT: Duration = Duration::from_secs(2);

impl Host for LinuxHost {
    fn cgroup(&self, key: &str, path: Option<&str>) -> Result<Placed, Error> {
        let hierarchy = Hierarchy::find()?;
        let cgroup = hierarchy.place(key, path)?.dir().to_owned();
        let shim_home = if self.shim_stays { None } else { hierarchy.own() };
        Ok(Placed { cgroup, shim_home })
    }

    fn claim_user(&self, config: &Config, run_dir: &RunDir) -> Result<u32, Error> {
        Ok(users::claim(&config.users, run_dir)?)
    }

    fn create_cgroup(&self, cgroup: &Path) -> Result<(), Error> {
        let cgroup = SandboxCgroup::at(cgroup);
        match self.shim_stays {
            true => cgroup.create()?,
            false => cgroup.create_with_shim()?,
        }
        Ok(())
    }

    fn limit(&self, cgroup: &Path, limits: &Limits) -> Result<Limited, Error> {
        Ok(SandboxCgroup::at(cgroup).limit(limits)?)
    }

    fn prepare_rootfs(&self, request: RootfsRequest, spec: &mut Value) -> Result<Rootfs, Error> {
        let RootfsRequest { run_dir, id, bundle, mounts, block } = request;
        let plan = Plan::new(&id, &bundle, &mounts, spec, block)?;
        let share = Share::of(run_dir.path());
        share.prepare()?;
        cube_fault::point("create.share_prepared");
        let prepared = plan.prepare(run_dir.path(), &share)?;
        cube_fault::point("create.rootfs_mounted");
        plan.rewrite_spec(spec);
        let Prepared { guest_mounts, disks } = prepared;
        Ok(Rootfs { guest_mounts, disks, share: plan.needs_share() })
    }

    fn restore_disks(
        &self,
        config: &Config,
        run_dir: &RunDir,
        snapshot: &[Disk],
    ) -> Result<Vec<Disk>, Error> {
        Ok(block::restore_disks(&config.rootfs.cache_dir, run_dir.path(), snapshot)?)
    }

    fn stage_disks(
        &self,
        config: &Config,
        run_dir: &RunDir,
        current: &[Disk],
        snapshot: &[Disk],
    ) -> Result<Staged, Error> {
        Ok(Staged::new(&config.rootfs.cache_dir, run_dir.path(), current, snapshot)?)
    }

    fn release_rootfs(&self, run_dir: &RunDir, id: &str) -> Result<(), Error> {
        Share::of(run_dir.path()).remove_container(id)?;
        if let Some(disks) = SandboxDisks::of(run_dir.path())? {
            disks.remove_container(id)?;
        }
        Ok(())
    }

    fn select(&self, config: &Config, spec: VmSpec) -> Result<Selected, Error> {
        let share = Share::of(&spec.run_dir);
        let (vmm, choice) = vmm::select(config, spec);
        let (backend, reason) = (choice.backend.to_string(), choice.reason);
        let overhead_mib = choice.backend.overhead_mib(&config.limits);
        let shared_mount = share.guest_mount(choice.backend);
        Ok(Selected { vmm, backend, reason, shared_mount, overhead_mib })
    }

    fn destroy(&self, run_dir: &RunDir, cgroup: &Path) -> Result<(), Error> {
        // Empty: nothing was ever made in it.
        if !cgroup.as_os_str().is_empty() {
            let home = run_dir.load().ok().flatten().and_then(|state| state.shim_home);
            SandboxCgroup::at(cgroup).destroy(KILL_LIMIT, home.as_deref())?;
        }
        cube_fault::point("destroy.cgroup_removed");
        if let Err(e) = vmm::take_back(run_dir.path()) {
            warn!(error = %chain(&e), "a disk stays with the user of its VMM");
        }
        cube_fault::point("destroy.disks_returned");
        Share::of(run_dir.path()).remove()?;
        cube_fault::point("destroy.share_removed");
        if let Some(disks) = SandboxDisks::of(run_dir.path())? {
            disks.remove()?;
        }
        cube_fault::point("destroy.disks_removed");
        Suspended::remove_of(run_dir)?;
        cube_fault::point("destroy.memory_removed");
        users::release_all(run_dir)?;
        cube_fault::point("destroy.users_released");
        run_dir.remove()?;
        cube_fault::point("destroy.run_dir_removed");
        Ok(())
    }
}
