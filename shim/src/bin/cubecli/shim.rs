//! Asking the shim of a sandbox for what containerd's Task API has no call for.

use std::time::Duration;

use containerd_shim_protos::shim_async::TaskClient;
use cube_shim::{control::sandbox_ttrpc::SandboxClient, log::locate::Name};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::{self, Context},
};

use crate::{error::CliError, sandboxes::Sandbox};

/// A shim that listens.
pub(crate) struct Shim {
    sandbox: Name,
    pid: i32,
    client: SandboxClient,
    tasks: TaskClient,
}

impl Shim {
    /// Connects to the shim of `sandbox`.
    pub(crate) async fn connect(sandbox: &Sandbox) -> Result<Shim, CliError> {
        let name = sandbox.name();
        let connected = UnixStream::connect(sandbox.dir.socket()?).await;
        let stream = connected.map_err(|source| CliError::ShimGone { sandbox: name.clone(), source })?;
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or_default();
        let client = Client::new(Socket::new(stream));
        let (client, tasks) = (SandboxClient::new(client.clone()), TaskClient::new(client));
        Ok(Shim { sandbox: name, pid, client, tasks })
    }

    /// Makes the call that `send` makes; it must be answered within `limit`.
    pub(crate) async fn call<T, F>(
        &self,
        limit: Duration,
        send: impl FnOnce(SandboxClient, Context) -> F,
    ) -> Result<T, CliError>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.answer(limit, send(self.client.clone(), context::with_duration(limit))).await
    }

    /// What is said of it when it does not answer.
    pub(crate) fn silent(&self) -> CliError {
        CliError::ShimSilent { sandbox: self.sandbox.clone(), pid: self.pid }
    }

    /// As [`Shim::call`], of containerd's Task API.
    pub(crate) async fn task<T, F>(
        &self,
        limit: Duration,
        send: impl FnOnce(TaskClient, Context) -> F,
    ) -> Result<T, CliError>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.answer(limit, send(self.tasks.clone(), context::with_duration(limit))).await
    }

    async fn answer<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, CliError> {
        let (sandbox, pid) = (self.sandbox.clone(), self.pid);
        match timeout(limit, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ttrpc::Error::RpcStatus(status))) if status.code() == ttrpc::Code::UNIMPLEMENTED => {
                let source = ttrpc::Error::RpcStatus(status);
                Err(CliError::ShimRefuses { sandbox, pid, source })
            }
            Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                Err(CliError::Refused { sandbox, code: status.code(), text: status.message().to_owned() })
            }
            Ok(Err(_)) | Err(_) => Err(CliError::ShimSilent { sandbox, pid }),
        }
    }
}

/// Runs what talks to shims.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(CliError::Runtime)?.block_on(work)
}
