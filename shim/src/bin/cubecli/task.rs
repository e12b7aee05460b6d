//! Asking shims for the state of their tasks.

use std::{io::ErrorKind, path::Path, time::Duration};

use containerd_shim_protos::{
    api::{StateRequest, Status},
    shim_async::TaskClient,
};
use tokio::net::UnixStream;
use ttrpc::r#async::Client;

use crate::error::CliError;

/// Time that a shim has to answer. It answers from memory, so one that needs longer is stuck.
const DEADLINE: Duration = Duration::from_secs(1);

/// Talks to shims, from code that is not async.
pub(crate) struct Tasks {
    runtime: tokio::runtime::Runtime,
}

/// What a shim says of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskState {
    pub(crate) status: Status,
    pub(crate) pid: u32,
}

/// Why a shim says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silent {
    /// Nobody listens on its socket.
    Gone,
    /// It did not answer in time, or with an error.
    NoAnswer,
}

impl Tasks {
    pub(crate) fn new() -> Result<Tasks, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Tasks { runtime: runtime.map_err(CliError::Runtime)? })
    }

    /// The state of container `id` of the sandbox whose shim listens on `socket`.
    pub(crate) fn state(&self, socket: &Path, id: &str) -> Result<TaskState, Silent> {
        self.runtime.block_on(async {
            tokio::time::timeout(DEADLINE, ask(socket, id)).await.unwrap_or(Err(Silent::NoAnswer))
        })
    }

    /// Whether somebody listens on `socket`, be it without accepting.
    pub(crate) fn listens(&self, socket: &Path) -> bool {
        let connected = self.runtime.block_on(async { UnixStream::connect(socket).await });
        let nobody = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
        connected.map_or_else(|e| !nobody.contains(&e.kind()), |_| true)
    }
}

async fn ask(socket: &Path, id: &str) -> Result<TaskState, Silent> {
    let address = format!("unix://{}", socket.display());
    let client = Client::connect(&address).await.map_err(|_| Silent::Gone)?;
    let client = TaskClient::new(client);
    let request = StateRequest { id: id.into(), ..Default::default() };
    let timeout = i64::try_from(DEADLINE.as_nanos()).unwrap_or(i64::MAX);
    let answer = client.state(ttrpc::context::with_timeout(timeout), &request).await;
    let answer = answer.map_err(|_| Silent::NoAnswer)?;
    Ok(TaskState { status: answer.status.enum_value_or_default(), pid: answer.pid })
}
