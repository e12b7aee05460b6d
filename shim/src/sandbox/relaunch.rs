//! Another VMM for a sandbox whose own is gone: it goes on from what that has written to a directory, with
//! the same run directory, cgroup and socket, and the same connection to the agent.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::{Host, Selected, job::Guest, steps::Steps};
use crate::{
    config::Config,
    errors::{Error, chain},
    vmm::{VmSpec, Vmm, VmmError},
};

/// Time for the agent to answer once the VM runs. It listens already; emulation on a busy host is slow.
const REACH_LIMIT: Duration = Duration::from_secs(60);

/// What a VMM is booted with.
#[derive(Clone)]
pub(super) struct Relaunch {
    pub(super) host: Arc<dyn Host>,
    pub(super) config: Arc<Config>,
    /// [`VmSpec::restore`] is what it goes on from.
    pub(super) vm: VmSpec,
}

impl Relaunch {
    /// Boots the VMM in the vacant place of `guest`'s. Its guest is at rest then, and connected to, but asked
    /// for no events. Gives its pid.
    ///
    /// After an error the place is vacant as before, or the sandbox has ended; and nothing runs.
    pub(super) async fn run(self, guest: &Guest, steps: &mut Steps) -> Result<u32, Error> {
        let Relaunch { host, config, vm } = self;
        let dir = vm.restore.clone().unwrap_or_default();
        let Selected { mut vmm, .. } = spawn_blocking(move || host.select(&config, vm)).await??;
        let up = tokio::select! {
            up = boot(&mut *vmm, guest, &dir, steps) => up,
            () = guest.machine.ended() => Err(killed()),
        };
        let vmm = Arc::<dyn Vmm>::from(vmm);
        let result = match up {
            Ok(()) if guest.machine.occupy(vmm.clone()) => return Ok(vmm.pid()),
            Ok(()) => Err(killed()),
            Err(e) => Err(e),
        };
        guest.agent.disconnect();
        if let Err(e) = vmm.kill().await {
            warn!("what was to be the new VM cannot be ended: {}", chain(&e));
        }
        result
    }
}

async fn boot(vmm: &mut dyn Vmm, guest: &Guest, dir: &Path, steps: &mut Steps) -> Result<(), Error> {
    vmm.boot().await?;
    steps.done("VMM started");
    let hello = tokio::select! {
        hello = guest.agent.renew(&*guest.dial, REACH_LIMIT) => hello?,
        exit = vmm.wait() => {
            return Err(ended(exit.description));
        }
    };
    steps.done("agent reached");
    if !hello.quiesced {
        let reason = format!("the guest in {} was not at rest", dir.display());
        return Err(Error::Restore { reason });
    }
    info!(from = %dir.display(), pid = vmm.pid(), "the guest is in another VM");
    Ok(())
}

fn killed() -> Error {
    ended("the sandbox was killed".into())
}

fn ended(description: String) -> Error {
    VmmError::Ended { during: "the start from memory on disk", description }.into()
}
