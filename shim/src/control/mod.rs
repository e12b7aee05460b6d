//! `cube.shim.v1.Sandbox`, our own service on the shim's socket: what containerd's Task API has no call
//! for. `proto/sandbox.proto` is its documentation.

mod guest;
mod status;

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use tracing::info;
use ttrpc::asynchronous::{Service, TtrpcContext};

use self::sandbox::{
    PauseRequest, PauseResponse, ResumeRequest, ResumeResponse, RollbackRequest, RollbackResponse,
    StatusRequest, StatusResponse, WaitReadyRequest, WaitReadyResponse,
};
use crate::sandbox::{Sandbox, SandboxReadiness, SnapshotRequest};

/// Longest time that a caller may wait for a sandbox to be ready.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Messages of `proto/sandbox.proto`.
#[allow(warnings, clippy::all, clippy::restriction)]
pub mod sandbox {
    include!(concat!(env!("OUT_DIR"), "/proto/sandbox.rs"));
}

/// Client and server of the service of `proto/sandbox.proto`.
#[allow(warnings, clippy::all, clippy::restriction)]
pub mod sandbox_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/proto/sandbox_ttrpc.rs"));
}

/// Serves one sandbox.
pub struct SandboxService {
    sandbox: Sandbox,
}

impl SandboxService {
    /// The ttrpc service, by name, to be registered with a server beside the Task service.
    pub fn services(sandbox: Sandbox) -> HashMap<String, Service> {
        sandbox_ttrpc::create_sandbox(Arc::new(SandboxService { sandbox }))
    }
}

#[async_trait]
impl sandbox_ttrpc::Sandbox for SandboxService {
    async fn status(&self, _: &TtrpcContext, _: StatusRequest) -> ttrpc::Result<StatusResponse> {
        let status = self.sandbox.status().await?;
        let guest = guest::ask(status.agent.as_ref()).await;
        Ok(status::response(status, guest))
    }

    async fn wait_ready(
        &self,
        _: &TtrpcContext,
        request: WaitReadyRequest,
    ) -> ttrpc::Result<WaitReadyResponse> {
        let limit = Duration::from_millis(request.timeout_ms.into()).min(WAIT_MAX);
        let (ready, waits_for) = match self.sandbox.wait_ready(limit).await? {
            SandboxReadiness::Ready => (true, String::new()),
            SandboxReadiness::Waiting(what) => (false, what),
        };
        Ok(WaitReadyResponse { ready, waits_for, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<PauseResponse> {
        info!(to_disk = request.to_disk, "pause");
        if request.to_disk {
            self.sandbox.pause_to_disk().await?;
        } else {
            self.sandbox.pause_all().await?;
        }
        Ok(PauseResponse::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<ResumeResponse> {
        info!("resume");
        self.sandbox.resume_all().await?;
        Ok(ResumeResponse::new())
    }

    async fn rollback(&self, _: &TtrpcContext, request: RollbackRequest) -> ttrpc::Result<RollbackResponse> {
        info!(snapshot = request.snapshot, "rollback");
        self.sandbox.rollback(request.snapshot).await?;
        Ok(RollbackResponse::new())
    }

    async fn snapshot(
        &self,
        _: &TtrpcContext,
        request: sandbox::SnapshotRequest,
    ) -> ttrpc::Result<sandbox::SnapshotResponse> {
        info!(name = request.name, "snapshot");
        let name = Some(request.name).filter(|name| !name.is_empty());
        let taken = self.sandbox.snapshot(SnapshotRequest { name, ..Default::default() }).await?;
        Ok(sandbox::SnapshotResponse {
            name: taken.manifest.name,
            disk_bytes: taken.disk_bytes,
            ..Default::default()
        })
    }
}
