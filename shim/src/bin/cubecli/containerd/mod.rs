//! Containers and tasks, through containerd's gRPC API.

mod codec;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use cube_shim::{config::Config, log::locate::Name, state::RunDir};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::Value;
use tokio::time::timeout;
use tonic::{
    Code, Request, Response, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue},
    transport::{Channel, Endpoint},
};

use self::codec::Messages;
use crate::sandboxes::Sandbox;

#[allow(warnings, clippy::all, clippy::restriction)]
mod api {
    include!(concat!(env!("OUT_DIR"), "/proto/containerd.rs"));
}

/// Type of an OCI spec for containerd, whose value is JSON.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

const CONTAINERS: &str = "containerd.services.containers.v1.Containers";
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// Time for containerd to say whether it is there, and knows a task.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// containerd.v1.types.Status
const STOPPED: u32 = 3;

const TASKS: &str = "containerd.services.tasks.v1.Tasks";

/// What containerd does not do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerdError {
    #[error(
        "cannot reach containerd at {address}: is it running? Its socket is named by --address or CONTAINERD_ADDRESS"
    )]
    Unreachable {
        address: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("{0:?} is no containerd namespace")]
    Namespace(String, #[source] InvalidMetadataValue),
    #[error("containerd cannot {action} {id:?}: {}", .status.message())]
    Refused { action: &'static str, id: String, status: Box<Status> },
    #[error(
        "the sandbox {sandbox} is not one of the containerd at {address}: name the socket of its own with --address or CONTAINERD_ADDRESS"
    )]
    Other { address: PathBuf, sandbox: Name },
    #[error("containerd has no OCI spec of the container {id:?}")]
    Spec {
        id: String,
        #[source]
        source: serde_json::Error,
    },
}

impl ContainerdError {
    /// For a call that took too long.
    fn slow(action: &'static str, id: &str) -> ContainerdError {
        let status = Box::new(Status::deadline_exceeded("it took too long"));
        ContainerdError::Refused { action, id: id.into(), status }
    }

    /// Whether containerd has no such container, task or process.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, ContainerdError::Refused { status, .. } if status.code() == Code::NotFound)
    }

    /// Whether containerd itself is not there, or does not answer.
    pub(crate) fn is_silence(&self) -> bool {
        match self {
            ContainerdError::Unreachable { .. } => true,
            ContainerdError::Refused { status, .. } => {
                matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
            }
            _ => false,
        }
    }
}

/// What containerd knows of a task.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Task {
    /// Of its VMM.
    pub(crate) pid: u32,
    pub(crate) is_stopped: bool,
}

/// A container to be made.
pub(crate) struct Container<'a> {
    pub(crate) id: &'a str,
    /// containerd's name of the runtime.
    pub(crate) runtime: &'a str,
    /// The OCI spec.
    pub(crate) spec: &'a Value,
}

/// A process to be added to a task.
pub(crate) struct Exec {
    pub(crate) id: String,
    /// `process` of an OCI spec.
    pub(crate) spec: Value,
    /// FIFOs.
    pub(crate) stdin: Option<PathBuf>,
    pub(crate) stdout: Option<PathBuf>,
    pub(crate) stderr: Option<PathBuf>,
}

/// A call to containerd with a deadline.
pub(crate) async fn limited<T>(
    limit: Duration,
    action: &'static str,
    id: &str,
    call: impl Future<Output = Result<T, ContainerdError>>,
) -> Result<T, ContainerdError> {
    timeout(limit, call).await.unwrap_or_else(|_| Err(ContainerdError::slow(action, id)))
}

/// containerd, in one of its namespaces. Clones share a connection.
#[derive(Clone)]
pub(crate) struct Containerd {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
}

impl Containerd {
    pub(crate) async fn connect(address: &Path, namespace: &str) -> Result<Containerd, ContainerdError> {
        let unreachable = |source| ContainerdError::Unreachable { address: address.into(), source };
        let endpoint = Endpoint::from_shared(format!("unix:{}", address.display())).map_err(unreachable)?;
        let channel = endpoint.connect().await.map_err(unreachable)?;
        let namespace =
            namespace.parse().map_err(|source| ContainerdError::Namespace(namespace.into(), source))?;
        Ok(Containerd { channel, namespace })
    }

    /// The one whose `sandbox` is: another one on this host may have the same IDs. That it is told by its socket, or
    /// by the pid that it has of the task.
    pub(crate) async fn of(
        config: &Config,
        sandbox: &Sandbox,
        address: &Path,
    ) -> Result<Containerd, ContainerdError> {
        let (state, id) = (&sandbox.state, &sandbox.state.sandbox_id);
        let connecting = Containerd::connect(address, &state.namespace);
        let containerd = limited(ANSWER_LIMIT, "find the sandbox", id, connecting).await?;
        let ttrpc = format!("{}.ttrpc", address.display());
        let is_address = RunDir::of(&config.run_dir, &ttrpc, &state.namespace, id).key() == sandbox.dir.key();
        // Also tells whether somebody serves the socket.
        let is_ours = match limited(ANSWER_LIMIT, "find the sandbox", id, containerd.task(id)).await {
            Ok(task) => is_address || state.vmm_pid != 0 && task.pid == state.vmm_pid,
            Err(e) if e.is_silence() => return Err(e),
            Err(_) => is_address,
        };
        let other = || ContainerdError::Other { address: address.into(), sandbox: sandbox.name() };
        is_ours.then_some(containerd).ok_or_else(other)
    }

    /// Makes a container without an image.
    pub(crate) async fn create_container(&self, container: Container<'_>) -> Result<(), ContainerdError> {
        let Container { id, runtime, spec } = container;
        let spec = Any { type_url: SPEC_TYPE.into(), value: spec.to_string().into(), ..Default::default() };
        let runtime = api::container::Runtime { name: runtime.into(), ..Default::default() };
        let container = api::Container {
            id: id.into(),
            runtime: MessageField::some(runtime),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        let request =
            api::CreateContainerRequest { container: MessageField::some(container), ..Default::default() };
        self.tell(CONTAINERS, "Create", request, "make the container", id).await
    }

    pub(crate) async fn delete_container(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::DeleteContainerRequest { id: id.into(), ..Default::default() };
        self.tell(CONTAINERS, "Delete", request, "remove the container", id).await
    }

    /// The OCI spec of a container, which may be anything.
    pub(crate) async fn spec(&self, id: &str) -> Result<Value, ContainerdError> {
        let request = api::GetContainerRequest { id: id.into(), ..Default::default() };
        let answer: api::GetContainerResponse =
            self.call(CONTAINERS, "Get", request, "find the container", id).await?;
        let spec = answer.container.spec.value.as_slice();
        serde_json::from_slice(spec).map_err(|source| ContainerdError::Spec { id: id.into(), source })
    }

    /// Makes the task of a container. It does not run yet.
    pub(crate) async fn create_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::CreateTaskRequest { container_id: id.into(), ..Default::default() };
        self.tell(TASKS, "Create", request, "make a task of the container", id).await
    }

    pub(crate) async fn start_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::StartRequest { container_id: id.into(), ..Default::default() };
        self.tell(TASKS, "Start", request, "start the task", id).await
    }

    /// What containerd knows of a task.
    pub(crate) async fn task(&self, id: &str) -> Result<Task, ContainerdError> {
        let request = api::GetRequest { container_id: id.into(), ..Default::default() };
        let answer: api::GetResponse = self.call(TASKS, "Get", request, "find the task", id).await?;
        Ok(Task { pid: answer.process.pid, is_stopped: answer.process.status == STOPPED })
    }

    pub(crate) async fn kill_task(&self, id: &str, signal: u32) -> Result<(), ContainerdError> {
        let request = api::KillRequest { container_id: id.into(), signal, ..Default::default() };
        self.tell(TASKS, "Kill", request, "kill the task", id).await
    }

    /// Adds a process to the task `id`.
    pub(crate) async fn exec(&self, id: &str, exec: &Exec) -> Result<(), ContainerdError> {
        let spec =
            Any { type_url: PROCESS_TYPE.into(), value: exec.spec.to_string().into(), ..Default::default() };
        let path =
            |path: &Option<PathBuf>| path.as_ref().map_or_else(String::new, |p| p.display().to_string());
        let request = api::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.id.clone(),
            stdin: path(&exec.stdin),
            stdout: path(&exec.stdout),
            stderr: path(&exec.stderr),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.tell(TASKS, "Exec", request, "run a process in the container", id).await
    }

    pub(crate) async fn start_exec(&self, id: &str, exec: &str) -> Result<(), ContainerdError> {
        let request =
            api::StartRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.tell(TASKS, "Start", request, "start a process in the container", id).await
    }

    /// No more is written to the stdin of an exec.
    pub(crate) async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), ContainerdError> {
        let request = api::CloseIORequest {
            container_id: id.into(),
            exec_id: exec.into(),
            stdin: true,
            ..Default::default()
        };
        self.tell(TASKS, "CloseIO", request, "end the input of a process in the container", id).await
    }

    pub(crate) async fn kill_exec(&self, id: &str, exec: &str, signal: u32) -> Result<(), ContainerdError> {
        let (container_id, exec_id) = (id.into(), exec.into());
        let request = api::KillRequest { container_id, exec_id, signal, ..Default::default() };
        self.tell(TASKS, "Kill", request, "kill a process in the container", id).await
    }

    /// The exit status of an exec, when it has exited.
    pub(crate) async fn wait_for_exec(&self, id: &str, exec: &str) -> Result<u32, ContainerdError> {
        let request =
            api::WaitRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        let action = "wait for a process in the container";
        let answer: api::WaitResponse = self.call(TASKS, "Wait", request, action, id).await?;
        Ok(answer.exit_status)
    }

    pub(crate) async fn delete_exec(&self, id: &str, exec: &str) -> Result<(), ContainerdError> {
        let request =
            api::DeleteProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.tell(TASKS, "DeleteProcess", request, "remove a process of the container", id).await
    }

    /// Returns when the task has exited, however long that takes.
    pub(crate) async fn wait_for_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::WaitRequest { container_id: id.into(), ..Default::default() };
        self.tell(TASKS, "Wait", request, "wait for the task", id).await
    }

    pub(crate) async fn delete_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::DeleteTaskRequest { container_id: id.into(), ..Default::default() };
        self.tell(TASKS, "Delete", request, "remove the task", id).await
    }

    /// A call whose answer says nothing more.
    async fn tell<M: protobuf::Message>(
        &self,
        service: &str,
        method: &str,
        message: M,
        action: &'static str,
        id: &str,
    ) -> Result<(), ContainerdError> {
        self.call::<M, api::Nothing>(service, method, message, action, id).await.map(drop)
    }

    async fn call<M: protobuf::Message, A: protobuf::Message>(
        &self,
        service: &str,
        method: &str,
        message: M,
        action: &'static str,
        id: &str,
    ) -> Result<A, ContainerdError> {
        let refused = |status| ContainerdError::Refused { action, id: id.into(), status: Box::new(status) };
        let path = PathAndQuery::try_from(format!("/{service}/{method}"))
            .map_err(|e| refused(Status::internal(e.to_string())))?;
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|e| refused(Status::unavailable(e.to_string())))?;
        let codec = Messages::<M, A>::default();
        grpc.unary(request, path, codec).await.map(Response::into_inner).map_err(refused)
    }
}
