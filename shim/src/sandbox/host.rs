//! What a sandbox needs of its host, so that tests can put something else in its place.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::api::Mount;
use cube_protocol::guest::SharedMount;
use serde_json::Value;

use crate::{
    cgroup::SandboxCgroup,
    config::Config,
    errors::Error,
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
}

/// The host. Every method blocks the thread, for milliseconds if it does not say more.
pub trait Host: Send + Sync + 'static {
    /// The cgroup of the sandbox with `key`; makes nothing.
    fn cgroup(&self, key: &str) -> Result<PathBuf, Error>;

    /// The users of the sandbox with this run directory. Given back by [`Host::destroy`].
    fn claim_user(&self, config: &Config, run_dir: &RunDir) -> Result<u32, Error>;

    /// Makes it.
    fn create_cgroup(&self, cgroup: &Path) -> Result<(), Error>;

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
pub struct LinuxHost;

/// How long killing a sandbox's processes may take; they are in the hands of the kernel then.
const KILL_LIMIT: Duration = Duration::from_secs(2);

impl Host for LinuxHost {
    fn cgroup(&self, key: &str) -> Result<PathBuf, Error> {
        Ok(SandboxCgroup::for_key(key)?.dir().into())
    }

    fn claim_user(&self, config: &Config, run_dir: &RunDir) -> Result<u32, Error> {
        Ok(users::claim(&config.users, run_dir)?)
    }

    fn create_cgroup(&self, cgroup: &Path) -> Result<(), Error> {
        Ok(SandboxCgroup::at(cgroup).create()?)
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
        Ok(Selected { vmm, backend, reason, shared_mount: share.guest_mount(choice.backend) })
    }

    fn destroy(&self, run_dir: &RunDir, cgroup: &Path) -> Result<(), Error> {
        // Empty: nothing was ever made in it.
        if !cgroup.as_os_str().is_empty() {
            SandboxCgroup::at(cgroup).destroy(KILL_LIMIT)?;
        }
        cube_fault::point("destroy.cgroup_removed");
        Share::of(run_dir.path()).remove()?;
        cube_fault::point("destroy.share_removed");
        if let Some(disks) = SandboxDisks::of(run_dir.path())? {
            disks.remove()?;
        }
        cube_fault::point("destroy.disks_removed");
        Suspended::remove_of(run_dir)?;
        cube_fault::point("destroy.memory_removed");
        if let Ok(Some(state)) = run_dir.load() {
            users::release(state.user, run_dir)?;
        }
        run_dir.remove()?;
        cube_fault::point("destroy.run_dir_removed");
        Ok(())
    }
}
