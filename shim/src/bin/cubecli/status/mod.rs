//! `cubecli cubebox status`

mod json;
mod people;

use std::{fs::File, io, io::Write, time::Duration};

use cube_shim::{config::Config, control::sandbox::StatusRequest, text::printable_json};

use crate::{
    args::StatusArgs,
    error::CliError,
    sandboxes,
    shim::{self, Shim},
};

/// Time that a shim has to answer: it gives its guest a second, and answers the rest from memory.
const DEADLINE: Duration = Duration::from_secs(4);

pub(crate) fn run(config: &Config, args: &StatusArgs, mut output: File) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    let status = shim::block_on(async {
        let shim = Shim::connect(&sandbox).await?;
        let request = StatusRequest::new();
        shim.call(DEADLINE, |client, context| async move { client.status(context, &request).await }).await
    })?;
    if !args.json {
        return people::print(&status, output).map_err(CliError::Output);
    }
    let text = serde_json::to_string_pretty(&json::value(&status)).map_err(io::Error::from);
    text.and_then(|text| writeln!(output, "{}", printable_json(&text))).map_err(CliError::Output)
}
