//! A connection to the shim of a sandbox.

use std::time::Duration;

use cube_shim::{control::sandbox_ttrpc::SandboxClient, log::locate::Name};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
    context::{self, Context},
};

use crate::{error::CliError, sandboxes::Sandbox};

/// The service of one shim.
pub(crate) struct Shim {
    sandbox: Name,
    pid: i32,
    client: SandboxClient,
}

impl Shim {
    pub(crate) async fn connect(sandbox: &Sandbox) -> Result<Shim, CliError> {
        let name = sandbox.name();
        let connected = UnixStream::connect(sandbox.dir.socket()?).await;
        let stream = connected.map_err(|source| CliError::ShimGone { sandbox: name.clone(), source })?;
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or_default();
        Ok(Shim { sandbox: name, pid, client: SandboxClient::new(Client::new(Socket::new(stream))) })
    }

    /// The sandbox's own name.
    pub(crate) fn sandbox(&self) -> Name {
        self.sandbox.clone()
    }

    /// Makes a call that the shim has to answer within `limit`.
    pub(crate) async fn call<T>(
        &self,
        limit: Duration,
        call: impl AsyncFnOnce(&SandboxClient, Context) -> ttrpc::Result<T>,
    ) -> Result<T, CliError> {
        let (sandbox, pid) = (self.sandbox(), self.pid);
        match timeout(limit, call(&self.client, context::with_duration(limit))).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ttrpc::Error::RpcStatus(status))) if status.code() == Code::FAILED_PRECONDITION => {
                Err(CliError::WrongState { sandbox, reason: status.message().to_owned() })
            }
            Ok(Err(source @ ttrpc::Error::RpcStatus(_))) => {
                Err(CliError::ShimRefuses { sandbox, pid, source })
            }
            Ok(Err(_)) | Err(_) => Err(CliError::ShimSilent { sandbox, pid }),
        }
    }
}
