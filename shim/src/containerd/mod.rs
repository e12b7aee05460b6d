//! What is asked of containerd, through its gRPC API.

mod codec;

use std::{path::PathBuf, time::Duration};

use tokio::time::timeout;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tracing::debug;

pub use self::codec::Messages;
use crate::sandbox::Containers;

#[allow(warnings, clippy::all, clippy::restriction)]
mod api {
    include!(concat!(env!("OUT_DIR"), "/proto/containerd.rs"));
}

const GET: &str = "/containerd.services.containers.v1.Containers/Get";

/// Time that containerd has to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// The containers that containerd knows in one of its namespaces.
#[derive(Debug)]
pub struct Known {
    /// Its socket.
    pub address: PathBuf,
    /// The namespace.
    pub namespace: String,
}

#[async_trait::async_trait]
impl Containers for Known {
    async fn has(&self, id: &str) -> Option<bool> {
        let answer = timeout(LIMIT, self.ask(id)).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(()) => Some(true),
            Err(status) if status.code() == Code::NotFound => Some(false),
            Err(status) => {
                debug!(%status, "containerd does not say whether container {id:?} is there");
                None
            }
        }
    }
}

impl Known {
    async fn ask(&self, id: &str) -> Result<(), Status> {
        let unavailable = |e: tonic::transport::Error| Status::unavailable(e.to_string());
        let address = format!("unix:{}", self.address.display());
        let channel: Channel =
            Endpoint::from_shared(address).map_err(unavailable)?.connect().await.map_err(unavailable)?;
        let namespace = self.namespace.parse();
        let namespace = namespace.map_err(|_| Status::invalid_argument("no namespace of containerd"))?;
        let mut request = Request::new(api::GetContainerRequest { id: id.into(), ..Default::default() });
        request.metadata_mut().insert("containerd-namespace", namespace);
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.map_err(unavailable)?;
        let codec = Messages::<api::GetContainerRequest, api::Nothing>::default();
        grpc.unary(request, PathAndQuery::from_static(GET), codec).await.map(drop)
    }
}
