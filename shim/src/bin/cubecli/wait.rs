//! `cubecli cubebox wait`

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use cube_shim::{
    config::Config,
    control::sandbox::{WaitReadyRequest, WaitReadyResponse},
    log::locate::Name,
    text::printable,
};

use crate::{
    args::WaitArgs,
    error::CliError,
    sandboxes,
    shim::{self, Shim},
};

/// How long the shim holds a question back at most. Somebody who watches is told twice a second what it
/// waits for; otherwise it is told at the end.
const POLL: Duration = Duration::from_secs(10);
const POLL_WATCHED: Duration = Duration::from_millis(500);

/// How much longer its answer may take.
const MARGIN: Duration = Duration::from_secs(4);

pub(crate) fn run(config: &Config, args: &WaitArgs) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    shim::block_on(async {
        let shim = Shim::connect(&sandbox).await?;
        until_ready(&shim, &sandbox.name(), args.timeout.map(Duration::from_secs)).await
    })
}

async fn until_ready(shim: &Shim, sandbox: &Name, limit: Option<Duration>) -> Result<(), CliError> {
    let begun = Instant::now();
    let watched = io::stderr().is_terminal();
    let poll = if watched { POLL_WATCHED } else { POLL };
    let mut told = String::new();
    loop {
        let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
        let answer = ask(shim, left.map_or(poll, |left| left.min(poll))).await?;
        if answer.ready {
            return Ok(());
        }
        if let Some(limit) = limit.filter(|limit| begun.elapsed() >= *limit) {
            return Err(CliError::NotReady { sandbox: sandbox.clone(), limit, waits_for: answer.waits_for });
        }
        if watched && told != answer.waits_for {
            eprintln!("waiting: {}", printable(&answer.waits_for));
            told = answer.waits_for;
        }
    }
}

async fn ask(shim: &Shim, limit: Duration) -> Result<WaitReadyResponse, CliError> {
    // Rounded up: an answer that comes too early would have to be asked for again.
    let timeout_ms = limit.as_micros().div_ceil(1000) as u32;
    let request = WaitReadyRequest { timeout_ms, ..Default::default() };
    shim.call(limit + MARGIN, |client, context| async move { client.wait_ready(context, &request).await })
        .await
}
