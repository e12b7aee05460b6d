//! `cubecli cubebox pause` and `cubecli cubebox resume`

use std::time::Duration;

use cube_shim::{
    config::Config,
    control::sandbox::{PauseRequest, ResumeRequest},
};

use crate::{
    args::{PauseArgs, ResumeArgs},
    error::CliError,
    progress::during,
    sandboxes,
    shim::{self, Shim},
};

/// Time for the whole of it: the shim has deadlines for each step, by the size of the memory.
const DEADLINE: Duration = Duration::from_secs(3600);

pub(crate) fn pause(config: &Config, args: &PauseArgs) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    let to_disk = args.to_disk;
    let what = if to_disk { "writing the memory to disk" } else { "pausing" };
    shim::block_on(async {
        let shim = Shim::connect(&sandbox).await?;
        let request = PauseRequest { to_disk, ..Default::default() };
        let call =
            shim.call(DEADLINE, |client, context| async move { client.pause(context, &request).await });
        during(what, call).await
    })?;
    Ok(())
}

pub(crate) fn resume(config: &Config, args: &ResumeArgs) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    shim::block_on(async {
        let shim = Shim::connect(&sandbox).await?;
        let request = ResumeRequest::default();
        let call =
            shim.call(DEADLINE, |client, context| async move { client.resume(context, &request).await });
        during("resuming", call).await
    })?;
    Ok(())
}
