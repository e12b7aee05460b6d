//! `cubecli cubebox rollback`

use std::time::Duration;

use cube_shim::{config::Config, control::sandbox::RollbackRequest};

use crate::{
    args::RollbackArgs,
    error::CliError,
    progress::during,
    sandboxes,
    shim::{self, Shim},
};

/// Time for the whole of it: the shim has deadlines for each step, by the size of memory and disks.
const DEADLINE: Duration = Duration::from_secs(3600);

pub(crate) fn run(config: &Config, args: &RollbackArgs) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    shim::block_on(async {
        let shim = Shim::connect(&sandbox).await?;
        let request = RollbackRequest { snapshot: args.name.clone(), ..Default::default() };
        let call =
            shim.call(DEADLINE, |client, context| async move { client.rollback(context, &request).await });
        during("rolling back", call).await
    })?;
    Ok(())
}
