//! What a sandbox needs of its host, so that tests can put something else in its place.

use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use cube_protocol::guest::SharedMount;
use serde_json::Value;

use crate::{
    config::Config,
    errors::Error,
    state::RunDir,
    vmm::{Disk, VmSpec, Vmm},
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

/// The host. Every method blocks the thread, for milliseconds.
pub trait Host: Send + Sync + 'static {
    /// The cgroup of the sandbox with `key`; makes nothing.
    fn cgroup(&self, key: &str) -> Result<PathBuf, Error>;

    /// Makes it.
    fn create_cgroup(&self, cgroup: &Path) -> Result<(), Error>;

    /// Makes the rootfs and the bind mounts of container `id` reachable for the guest, and rewrites
    /// `spec`'s mounts accordingly. Undone by [`Host::release_rootfs`], also after an error.
    fn prepare_rootfs(
        &self,
        run_dir: &RunDir,
        id: &str,
        bundle: &Path,
        mounts: &[Mount],
        spec: &mut Value,
    ) -> Result<Rootfs, Error>;

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

fn missing<T>(what: &str) -> Result<T, Error> {
    Err(Error::Unimplemented { what: what.into(), hint: "" })
}

impl Host for LinuxHost {
    fn cgroup(&self, _: &str) -> Result<PathBuf, Error> {
        missing("a cgroup for the sandbox")
    }

    fn create_cgroup(&self, _: &Path) -> Result<(), Error> {
        missing("a cgroup for the sandbox")
    }

    fn prepare_rootfs(
        &self,
        _: &RunDir,
        _: &str,
        _: &Path,
        _: &[Mount],
        _: &mut Value,
    ) -> Result<Rootfs, Error> {
        missing("a rootfs")
    }

    fn release_rootfs(&self, _: &RunDir, _: &str) -> Result<(), Error> {
        Ok(())
    }

    fn select(&self, _: &Config, _: VmSpec) -> Result<Selected, Error> {
        missing("a VMM")
    }

    fn destroy(&self, run_dir: &RunDir, _: &Path) -> Result<(), Error> {
        Ok(run_dir.remove()?)
    }
}
