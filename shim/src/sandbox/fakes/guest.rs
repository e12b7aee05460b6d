//! The guest: an agent that says what it is told to say, and notes what it is asked.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{self, Empty, Status},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim_async::{Task, create_task},
};
use cube_protocol::{guest, guest::probe_response::Outcome, guest_ttrpc, hybrid, ports, version};
use serde_json::Value;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Notify, mpsc, watch},
};
use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

use crate::{sandbox::ProcessId, state::now_ns};

/// What the guest does wrong, by name of the method.
#[derive(Debug, Clone)]
pub(in crate::sandbox) enum Fault {
    /// Never answers.
    Hang,
    /// Answers with this status.
    Refuse(ttrpc::Status),
    /// Reports the exit of the process before it answers.
    ExitFirst(u32),
}

/// The agent.
pub(in crate::sandbox) struct Guest {
    pub(in crate::sandbox) faults: Mutex<HashMap<&'static str, Fault>>,
    pub(in crate::sandbox) calls: Mutex<Vec<String>>,
    /// The spec of each Create.
    pub(in crate::sandbox) specs: Mutex<Vec<Value>>,
    /// What Pids answers.
    pub(in crate::sandbox) pids: Mutex<Vec<u32>>,
    /// Why no container is ready; `None` if all are.
    pub(in crate::sandbox) unready: Mutex<Option<String>>,
    /// What State answers, where that is not a process that runs; `None` for one that is not there.
    pub(in crate::sandbox) states: Mutex<HashMap<ProcessId, Option<(Status, u32)>>>,
    protocol: version::Version,
    events: Mutex<Vec<guest::Event>>,
    news: Notify,
    /// Changes to cut every connection.
    cut: watch::Sender<u32>,
    quiesces: watch::Sender<u32>,
    /// Whether it is at rest.
    pub(in crate::sandbox) quiesced: AtomicBool,
    /// What the last Thaw asked for.
    pub(in crate::sandbox) thaw: Mutex<guest::ThawRequest>,
}

impl Guest {
    pub(in crate::sandbox) fn new() -> Guest {
        Guest::speaking(version::CURRENT)
    }

    pub(in crate::sandbox) fn speaking(protocol: version::Version) -> Guest {
        Guest {
            faults: Mutex::default(),
            calls: Mutex::default(),
            specs: Mutex::default(),
            pids: Mutex::default(),
            unready: Mutex::default(),
            states: Mutex::default(),
            protocol,
            events: Mutex::default(),
            news: Notify::new(),
            cut: watch::Sender::new(0),
            quiesces: watch::Sender::new(0),
            quiesced: AtomicBool::new(false),
            thaw: Mutex::default(),
        }
    }

    pub(in crate::sandbox) fn fault(&self, method: &'static str, fault: Fault) {
        self.faults.lock().unwrap().insert(method, fault);
    }

    pub(in crate::sandbox) fn exit(&self, container: &str, exec: &str, status: u32) {
        self.push(guest::event::Kind::Exit(guest::TaskExit {
            container_id: container.into(),
            exec_id: exec.into(),
            exit_status: status,
            exited_at_ns: now_ns(),
            ..Default::default()
        }));
    }

    pub(in crate::sandbox) fn oom(&self, container: &str) {
        let oom = guest::TaskOom { container_id: container.into(), count: 1, ..Default::default() };
        self.push(guest::event::Kind::Oom(oom));
    }

    pub(in crate::sandbox) fn cut_connections(&self) {
        self.cut.send_modify(|count| *count += 1);
    }

    fn push(&self, kind: guest::event::Kind) {
        let mut events = self.events.lock().unwrap();
        let sequence = events.len() as u64 + 1;
        events.push(guest::Event { sequence, kind: Some(kind), ..Default::default() });
        drop(events);
        self.news.notify_waiters();
    }

    async fn called(&self, method: &'static str, container: &str, exec: &str) -> ttrpc::Result<()> {
        self.calls.lock().unwrap().push(format!("{method} {container} {exec}").trim_end().into());
        let fault = self.faults.lock().unwrap().get(method).cloned();
        match fault {
            None => Ok(()),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Refuse(status)) => Err(ttrpc::Error::RpcStatus(status)),
            Some(Fault::ExitFirst(status)) => {
                // In a call that concerns the whole guest it is the main container that exits.
                let container = if container.is_empty() { "c1" } else { container };
                self.exit(container, exec, status);
                Ok(())
            }
        }
    }

    /// Serves on the hybrid vsock socket `path`.
    pub(in crate::sandbox) fn listen(self: &Arc<Self>, path: &Path) {
        let listener = UnixListener::bind(path).unwrap();
        let (sender, receiver) = mpsc::channel::<UnixStream>(16);
        let connections = futures::stream::unfold(receiver, |mut receiver| async {
            Some((Ok(receiver.recv().await?), receiver))
        });
        let mut services = create_task(Arc::new(Service(self.clone())));
        services.extend(guest_ttrpc::create_guest(Arc::new(Service(self.clone()))));
        let mut server = Server::new().add_listener(Listener::new(connections)).register_service(services);
        let guest = self.clone();
        tokio::spawn(async move {
            server.start().await.unwrap();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let Ok(port) = hybrid::requested_port(&mut stream).await else { continue };
                if port != ports::CONTROL {
                    // Nothing serves the streams: their relays dial again and again.
                    continue;
                }
                hybrid::accept(&mut stream, 1).await.unwrap();
                sender.send(relay(stream, guest.cut.subscribe())).await.unwrap();
            }
        });
    }
}

/// Gives a connection that can be cut from outside.
fn relay(mut outer: UnixStream, mut cut: watch::Receiver<u32>) -> UnixStream {
    let (mut near, far) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut outer, &mut near) => {}
            _ = cut.changed() => {}
        }
    });
    far
}

struct Service(Arc<Guest>);

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let options = guest::CreateOptions::parse_from_bytes(&request.options.value).unwrap();
        self.0.specs.lock().unwrap().push(serde_json::from_slice(&options.spec).unwrap());
        self.0.called("Create", &request.id, "").await?;
        Ok(api::CreateTaskResponse { pid: 17, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        self.0.called("Start", &request.id, &request.exec_id).await?;
        Ok(api::StartResponse { pid: 17, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.0.called("Exec", &request.id, &request.exec_id).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        self.0.called("Kill", &request.id, &request.exec_id).await?;
        self.0.exit(&request.id, &request.exec_id, 128 + request.signal);
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.0.called("Delete", &request.id, &request.exec_id).await?;
        Ok(api::DeleteResponse::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.0.called("Update", &request.id, "").await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.0.called("Pause", &request.id, "").await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.0.called("Resume", &request.id, "").await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        self.0.called("Stats", &request.id, "").await?;
        let stats = Any { type_url: "io.containerd.cgroups.v2.Metrics".into(), ..Default::default() };
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        self.0.called("Pids", &request.id, "").await?;
        let pids = self.0.pids.lock().unwrap().clone();
        let info = |pid| api::ProcessInfo { pid, ..Default::default() };
        Ok(api::PidsResponse { processes: pids.into_iter().map(info).collect(), ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        self.0.called("State", &request.id, &request.exec_id).await?;
        let process = ProcessId { container: request.id, exec: request.exec_id };
        match self.0.states.lock().unwrap().get(&process).copied().unwrap_or(Some((Status::RUNNING, 17))) {
            Some((status, pid)) => {
                Ok(api::StateResponse { pid, status: status.into(), ..Default::default() })
            }
            None => {
                Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no such process")))
            }
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.called("Shutdown", "", "").await?;
        Ok(Empty::new())
    }
}

#[async_trait]
impl guest_ttrpc::Guest for Service {
    async fn hello(&self, _: &TtrpcContext, _: guest::HelloRequest) -> ttrpc::Result<guest::HelloResponse> {
        Ok(guest::HelloResponse {
            protocol: MessageField::some(self.0.protocol.into()),
            boot_id: 1,
            timeline: 2,
            quiesced: self.0.quiesced.load(Ordering::Relaxed),
            ..Default::default()
        })
    }

    async fn prepare_sandbox(
        &self,
        _: &TtrpcContext,
        request: guest::PrepareSandboxRequest,
    ) -> ttrpc::Result<guest::PrepareSandboxResponse> {
        self.0.called("PrepareSandbox", &request.hostname, "").await?;
        Ok(guest::PrepareSandboxResponse::new())
    }

    async fn quiesce(
        &self,
        _: &TtrpcContext,
        _: guest::QuiesceRequest,
    ) -> ttrpc::Result<guest::QuiesceResponse> {
        self.0.called("Quiesce", "", "").await?;
        // Waiting polls are answered.
        self.0.quiesces.send_modify(|count| *count += 1);
        self.0.quiesced.store(true, Ordering::Relaxed);
        let last_event = self.0.events.lock().unwrap().len() as u64;
        Ok(guest::QuiesceResponse { last_event, ..Default::default() })
    }

    async fn thaw(
        &self,
        _: &TtrpcContext,
        request: guest::ThawRequest,
    ) -> ttrpc::Result<guest::ThawResponse> {
        self.0.called("Thaw", "", "").await?;
        *self.0.thaw.lock().unwrap() = request;
        self.0.quiesced.store(false, Ordering::Relaxed);
        Ok(guest::ThawResponse::new())
    }

    async fn probe(
        &self,
        _: &TtrpcContext,
        request: guest::ProbeRequest,
    ) -> ttrpc::Result<guest::ProbeResponse> {
        self.0.called("Probe", &request.container_id, "").await?;
        let outcome = match self.0.unready.lock().unwrap().clone() {
            None => Outcome::Ready(guest::Ready::new()),
            Some(reason) => Outcome::NotReady(guest::NotReady { reason, ..Default::default() }),
        };
        Ok(guest::ProbeResponse { outcome: Some(outcome), ..Default::default() })
    }

    async fn info(&self, _: &TtrpcContext, _: guest::InfoRequest) -> ttrpc::Result<guest::InfoResponse> {
        self.0.called("Info", "", "").await?;
        Ok(guest::InfoResponse { memory_total_bytes: 256 << 20, ..Default::default() })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: guest::EventsRequest,
    ) -> ttrpc::Result<guest::EventsResponse> {
        loop {
            let news = self.0.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            let all = self.0.events.lock().unwrap().clone();
            let events: Vec<_> = all.into_iter().filter(|event| event.sequence > request.after).collect();
            if !events.is_empty() {
                return Ok(guest::EventsResponse { events, ..Default::default() });
            }
            let mut quiesces = self.0.quiesces.subscribe();
            tokio::select! {
                biased;
                () = news => {}
                _ = quiesces.changed() => return Ok(guest::EventsResponse::new()),
            }
        }
    }
}
