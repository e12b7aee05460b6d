//! Containers and tasks, through containerd's gRPC API.

use std::path::{Path, PathBuf};

use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::Value;
use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{Ascii, MetadataValue, errors::InvalidMetadataValue},
    transport::{Channel, Endpoint},
};

use cube_shim::containerd::Messages;

#[allow(warnings, clippy::all, clippy::restriction)]
mod api {
    include!(concat!(env!("OUT_DIR"), "/proto/containerd.rs"));
}

/// Type of an OCI spec for containerd, whose value is JSON.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

const CONTAINERS: &str = "containerd.services.containers.v1.Containers";
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
}

/// A container to be made.
pub(crate) struct Container<'a> {
    pub(crate) id: &'a str,
    /// containerd's name of the runtime.
    pub(crate) runtime: &'a str,
    /// The OCI spec.
    pub(crate) spec: &'a Value,
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
        self.call(CONTAINERS, "Create", request, "make the container", id).await
    }

    pub(crate) async fn delete_container(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::DeleteContainerRequest { id: id.into(), ..Default::default() };
        self.call(CONTAINERS, "Delete", request, "remove the container", id).await
    }

    /// Makes the task of a container. It does not run yet.
    pub(crate) async fn create_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::CreateTaskRequest { container_id: id.into(), ..Default::default() };
        self.call(TASKS, "Create", request, "make a task of the container", id).await
    }

    pub(crate) async fn start_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::StartRequest { container_id: id.into(), ..Default::default() };
        self.call(TASKS, "Start", request, "start the task", id).await
    }

    pub(crate) async fn kill_task(&self, id: &str, signal: u32) -> Result<(), ContainerdError> {
        let request = api::KillRequest { container_id: id.into(), signal, ..Default::default() };
        self.call(TASKS, "Kill", request, "kill the task", id).await
    }

    /// Returns when the task has exited, however long that takes.
    pub(crate) async fn wait_for_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::WaitRequest { container_id: id.into(), ..Default::default() };
        self.call(TASKS, "Wait", request, "wait for the task", id).await
    }

    pub(crate) async fn delete_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = api::DeleteTaskRequest { container_id: id.into(), ..Default::default() };
        self.call(TASKS, "Delete", request, "remove the task", id).await
    }

    async fn call<M: protobuf::Message>(
        &self,
        service: &str,
        method: &str,
        message: M,
        action: &'static str,
        id: &str,
    ) -> Result<(), ContainerdError> {
        let refused = |status| ContainerdError::Refused { action, id: id.into(), status: Box::new(status) };
        let path = PathAndQuery::try_from(format!("/{service}/{method}"))
            .map_err(|e| refused(Status::internal(e.to_string())))?;
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|e| refused(Status::unavailable(e.to_string())))?;
        let codec = Messages::<M, api::Nothing>::default();
        grpc.unary(request, path, codec).await.map(drop).map_err(refused)
    }
}
