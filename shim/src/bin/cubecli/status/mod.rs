//! `cubecli cubebox status`

mod json;
mod people;

use std::{fs::File, io, io::Write, time::Duration};

use cube_shim::{
    config::Config,
    control::sandbox::{StatusRequest, StatusResponse},
};

use crate::{
    args::StatusArgs,
    error::CliError,
    sandboxes::{self, Sandbox},
    shim::Shim,
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
    let request = StatusRequest::new();
    let shim = Shim::connect(sandbox).await?;
    shim.call(DEADLINE, async |client, context| client.status(context, &request).await).await
}
