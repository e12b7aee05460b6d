//! What a VM that runs can be told.

use std::path::Path;

use async_trait::async_trait;
use tokio::task::spawn_blocking;

use super::{
    super::{
        Disk, VmSpec, VmmError,
        access::{self, Shown},
        machine::{CONTROL_LIMIT, Control},
    },
    api::Api,
    config,
    place::Place,
    snapshot,
};

/// The VM behind one API socket.
pub(super) struct Controller {
    api: Api,
    version: String,
    memory_bytes: u64,
    shares: bool,
    shown: Shown,
}

impl Controller {
    pub(super) fn new(
        api: Api,
        version: String,
        spec: &VmSpec,
        memory_bytes: u64,
        shown: Shown,
    ) -> Controller {
        Controller { api, version, memory_bytes, shares: spec.share.is_some(), shown }
    }

    /// Cloud Hypervisor refuses what is done already, as after a request whose answer was lost.
    async fn become_state(&self, request: &'static str, state: &str) -> Result<(), VmmError> {
        let refusal = match self.api.put(request, None, CONTROL_LIMIT).await {
            Err(refusal @ VmmError::Refused { .. }) => refusal,
            other => return other,
        };
        match self.api.get("vm.info", CONTROL_LIMIT).await {
            Ok(info) if info["state"] == state => Ok(()),
            _ => Err(refusal),
        }
    }
}

#[async_trait]
impl Control for Controller {
    async fn pause(&self) -> Result<(), VmmError> {
        self.become_state("vm.pause", "Paused").await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.become_state("vm.resume", "Running").await
    }

    async fn snapshot(&self, dir: &Path) -> Result<(), VmmError> {
        if self.shares {
            return Err(VmmError::CannotSnapshot {
                backend: "cloud-hypervisor",
                reason: "it shares directories of this host with its guest; create it with the annotation \
                         cube.rootfs.mode=block",
            });
        }
        let place = Place { dir: dir.into(), shown: self.shown.clone() };
        let opening = place.clone();
        spawn_blocking(move || opening.open()).await??;
        let asked = snapshot::ask(&self.api, dir, self.memory_bytes).await;
        // Also after an error: nobody but root may change what is there.
        spawn_blocking(move || place.close()).await??;
        asked?;
        snapshot::complete(&self.version, dir, self.memory_bytes, self.shown.user.gid).await
    }

    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError> {
        let (shown, new) = (self.shown.clone(), disk.clone());
        spawn_blocking(move || access::show_disk(&shown, &new)).await??;
        self.api.put("vm.add-disk", Some(&config::disk(disk)), CONTROL_LIMIT).await
    }
}
