//! What a VM that runs can be told.

use std::path::Path;

use async_trait::async_trait;

use super::{
    super::{
        Disk, VmSpec, VmmError,
        machine::{CONTROL_LIMIT, Control},
    },
    api::Api,
    config, snapshot,
};

/// The VM behind one API socket.
pub(super) struct Controller {
    api: Api,
    version: String,
    memory_bytes: u64,
    shares: bool,
}

impl Controller {
    pub(super) fn new(api: Api, version: String, spec: &VmSpec, memory_bytes: u64) -> Controller {
        Controller { api, version, memory_bytes, shares: spec.share.is_some() }
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
        snapshot::write(&self.api, &self.version, dir, self.memory_bytes).await
    }

    async fn add_disk(&self, disk: &Disk) -> Result<(), VmmError> {
        self.api.put("vm.add-disk", Some(&config::disk(disk)), CONTROL_LIMIT).await
    }
}
