//! `cubecli cubebox status`

mod json;
mod people;

use std::{fs::File, io, io::Write, time::Duration};

use cube_shim::{
    config::Config,
    control::{
        sandbox::{StatusRequest, StatusResponse},
        sandbox_ttrpc::SandboxClient,
    },
};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

use crate::{
    args::StatusArgs,
    error::CliError,
    sandboxes::{self, Sandbox},
};

/// Time that a shim has to answer: it gives its guest a second, and answers the rest from memory.
const DEADLINE: Duration = Duration::from_secs(4);

pub(crate) fn run(config: &Config, args: &StatusArgs, mut output: File) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let status = runtime.map_err(CliError::Runtime)?.block_on(ask(&sandbox))?;
    if !args.json {
        return people::print(&status, output).map_err(CliError::Output);
    }
    let text = serde_json::to_string_pretty(&json::value(&status)).map_err(io::Error::from);
    text.and_then(|text| writeln!(output, "{text}")).map_err(CliError::Output)
}

async fn ask(sandbox: &Sandbox) -> Result<StatusResponse, CliError> {
    let name = sandbox.name();
    let connected = UnixStream::connect(sandbox.dir.socket()?).await;
    let stream = connected.map_err(|source| CliError::ShimGone { sandbox: name.clone(), source })?;
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or_default();
    let client = SandboxClient::new(Client::new(Socket::new(stream)));
    let request = StatusRequest::new();
    match timeout(DEADLINE, client.status(context::with_duration(DEADLINE), &request)).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(source @ ttrpc::Error::RpcStatus(_))) => {
            Err(CliError::ShimRefuses { sandbox: name, pid, source })
        }
        Ok(Err(_)) | Err(_) => Err(CliError::ShimSilent { sandbox: name, pid }),
    }
}
