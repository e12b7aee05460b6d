//! `cube.agent.v1.Guest`: translation and checks; the work is in [`crate::guest`].

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use cube_protocol::{
    guest::{
        EventsRequest, EventsResponse, HelloRequest, HelloResponse, InfoRequest, InfoResponse,
        PrepareSandboxRequest, PrepareSandboxResponse, ProbeRequest, ProbeResponse, PutSpecRequest,
        PutSpecResponse, QuiesceRequest, QuiesceResponse, SharedMount, ThawRequest, ThawResponse,
    },
    guest_ttrpc::Guest,
    version,
};
use tokio::{sync::Mutex, task::spawn_blocking};
use ttrpc::asynchronous::TtrpcContext;

use super::{Refused, detached, error::Error, events::Events, ids, probe, rest, specs::Specs, tasks::Tasks};
use crate::{
    boot::process::{HostRun, fd_path},
    guest::{
        identity, info, network, paths,
        quiesce::Quiescence,
        storage::{Mount, StorageError, check_shared_target},
    },
    stdio::Hub,
};

/// What the service tells about.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) boot_id: u64,
    pub(super) ring_budget: u64,
    pub(super) tasks: Arc<Tasks>,
    pub(super) hub: Arc<Hub>,
    pub(super) events: Arc<Events>,
    pub(super) quiescence: Arc<Quiescence>,
    pub(super) refused: Arc<Refused>,
    pub(super) host_run: Option<HostRun>,
    pub(super) specs: Arc<Specs>,
}

/// The service.
#[derive(Debug)]
pub(super) struct GuestService {
    parts: Arc<Parts>,
    /// Locked while a PrepareSandbox is carried out.
    sandbox: Arc<Mutex<Sandbox>>,
}

/// How the host has prepared this guest.
#[derive(Debug, Default)]
struct Sandbox {
    /// The request that was carried out.
    prepared: Option<PrepareSandboxRequest>,
    /// Mounts that are done, for a request that failed later and is repeated.
    mounted: Vec<PathBuf>,
}

impl Parts {
    /// Refuses another timeline than the guest's; 0 is any.
    fn check_timeline(&self, theirs: u64) -> Result<(), Error> {
        match self.hub.timeline() {
            ours if theirs != 0 && theirs != ours => Err(Error::Timeline { ours, theirs }),
            _ => Ok(()),
        }
    }
}

impl GuestService {
    pub(super) fn new(parts: Parts) -> GuestService {
        GuestService { parts: Arc::new(parts), sandbox: Arc::default() }
    }
}

impl Sandbox {
    async fn prepare(&mut self, parts: &Parts, request: PrepareSandboxRequest) -> Result<(), Error> {
        if let Some(prepared) = &self.prepared {
            return if *prepared == request { Ok(()) } else { Err(Error::PreparedOtherwise) };
        }
        for mount in &request.shared_mounts {
            check_shared_target(Path::new(&mount.target))?;
        }
        if !request.hostname.is_empty() {
            identity::set_hostname(&request.hostname)
                .map_err(|source| Error::System { action: "set the host name", source })?;
        }
        let resolv_conf = Path::new(paths::RESOLV_CONF);
        identity::write_resolv_conf(
            resolv_conf,
            &request.dns_servers,
            &request.dns_searches,
            &request.dns_options,
        )
        .map_err(|source| Error::System { action: "write resolv.conf", source })?;
        network::configure(&request.interfaces, &request.routes)?;
        for mount in &request.shared_mounts {
            self.mount(parts, mount).await?;
        }
        self.prepared = Some(request);
        Ok(())
    }

    async fn mount(&mut self, parts: &Parts, shared: &SharedMount) -> Result<(), Error> {
        let target = PathBuf::from(&shared.target);
        if self.mounted.contains(&target) {
            return Ok(());
        }
        let mount = Mount {
            fs_type: shared.fs_type.clone(),
            source: shared.source.clone(),
            options: shared.options.clone(),
        };
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StorageError::Io { action, path, source }
        };
        fs::create_dir_all(&target).map_err(failed("cannot create", &target))?;
        match &parts.host_run {
            Some(host_run) if mount.fs_type == "bind" => {
                let source = Path::new(&mount.source);
                let source = host_run.open(source).map_err(failed("cannot open", source))?;
                mount.apply_from(&fd_path(&source), &target)?;
            }
            _ => {
                let target = target.clone();
                spawn_blocking(move || mount.apply(&target)).await??;
            }
        }
        self.mounted.push(target);
        Ok(())
    }
}

#[async_trait]
impl Guest for GuestService {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        version::Version::from(request.protocol.get_or_default()).check().map_err(Error::from)?;
        tracing::info!(shim = request.shim_version, "the host says hello");
        Ok(HelloResponse {
            protocol: Some(version::CURRENT.into()).into(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.parts.boot_id,
            timeline: self.parts.hub.timeline(),
            kernel_release: identity::kernel_release(),
            quiesced: self.parts.quiescence.is_quiesced(),
            ..Default::default()
        })
    }

    async fn prepare_sandbox(
        &self,
        _: &TtrpcContext,
        request: PrepareSandboxRequest,
    ) -> ttrpc::Result<PrepareSandboxResponse> {
        let (parts, sandbox) = (self.parts.clone(), self.sandbox.clone());
        let pass = parts.quiescence.pass().ok_or(Error::Quiesced { call: "PrepareSandbox" })?;
        detached(pass, async move { sandbox.lock().await.prepare(&parts, request).await }).await?;
        Ok(PrepareSandboxResponse::default())
    }

    async fn events(&self, _: &TtrpcContext, request: EventsRequest) -> ttrpc::Result<EventsResponse> {
        let timeline = self.parts.hub.timeline();
        self.parts.check_timeline(request.timeline)?;
        if request.after > self.parts.events.last() {
            let invalid = Error::Invalid {
                field: "after",
                value: request.after.to_string(),
                reason: "this guest has not had so many events",
            };
            return Err(invalid.into());
        }
        let limit = Duration::from_millis(request.timeout_ms.into());
        // No call may be open when the VM is snapshotted: in a clone nobody would ever hear the answer.
        let events = tokio::select! {
            biased;
            events = self.parts.events.after(request.after, limit) => events,
            () = self.parts.hub.clock().next_hold() => Vec::new(),
        };
        // A Thaw may have begun another since.
        self.parts.check_timeline(timeline)?;
        Ok(EventsResponse { events, ..Default::default() })
    }

    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        let parts = &self.parts;
        let memory =
            info::memory().map_err(|source| Error::System { action: "read the memory figures", source })?;
        let totals = parts.hub.totals();
        let tasks = parts.tasks.all();
        let processes: usize = tasks.iter().map(|task| task.processes().len()).sum();
        Ok(InfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: identity::kernel_release(),
            boot_id: parts.boot_id,
            timeline: parts.hub.timeline(),
            agent_rss_bytes: memory.agent_rss,
            memory_total_bytes: memory.total,
            memory_available_bytes: memory.available,
            ring_budget_bytes: parts.ring_budget,
            ring_used_bytes: totals.ring_bytes as u64,
            containers: u32::try_from(tasks.len()).unwrap_or(u32::MAX),
            processes: u32::try_from(processes).unwrap_or(u32::MAX),
            streams: parts.hub.streams(),
            refused_connections: parts.refused.get() + totals.refused_connections,
            quiesced: parts.quiescence.is_quiesced(),
            ..Default::default()
        })
    }

    async fn quiesce(&self, _: &TtrpcContext, request: QuiesceRequest) -> ttrpc::Result<QuiesceResponse> {
        let parts = self.parts.clone();
        Ok(detached((), async move { rest::quiesce(&parts, &request).await }).await?)
    }

    async fn thaw(&self, _: &TtrpcContext, request: ThawRequest) -> ttrpc::Result<ThawResponse> {
        let parts = self.parts.clone();
        Ok(detached((), async move { rest::thaw(&parts, request).await }).await?)
    }

    async fn probe(&self, _: &TtrpcContext, request: ProbeRequest) -> ttrpc::Result<ProbeResponse> {
        // It changes nothing that would have to be carried out to its end: dropped with its connection, it
        // ends.
        Ok(probe::probe(&self.parts, request).await?)
    }

    async fn put_spec(&self, _: &TtrpcContext, request: PutSpecRequest) -> ttrpc::Result<PutSpecResponse> {
        ids::container(&request.container_id)?;
        let memory =
            info::memory().map_err(|source| Error::System { action: "read the memory figures", source })?;
        self.parts.specs.put(request, memory.available)?;
        Ok(PutSpecResponse::default())
    }
}
