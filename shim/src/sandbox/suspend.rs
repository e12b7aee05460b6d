//! Pausing a sandbox to disk, and back: the order of the steps, and the way back.
//!
//! ```text
//! to disk:    as for a pause, with the guest's disks written out; memory to a file; the VMM ends
//! from disk:  another VMM reads it; from there as for a resume; the file goes
//! ```
//!
//! There is one continuation only, so the timeline stays. The file is of use until a guest that was read
//! from it runs: what that writes to its disks is nothing that the memory in the file knows of.

use cube_protocol::guest::QuiesceResponse;
use tokio::task::spawn_blocking;
use tracing::{error, info, warn};

use super::{
    job::Guest,
    pause::{self, Failed},
    relaunch::Relaunch,
    steps::Steps,
};
use crate::{
    errors::{Error, chain},
    snapshot::{SnapshotError, Suspended},
    state::RunDir,
    vmm::VmmExit,
};

/// A sandbox that is to be paused to disk.
pub(super) struct Subject {
    pub(super) guest: Guest,
    pub(super) timeline: u64,
    /// Whether it is paused already.
    pub(super) paused: bool,
    /// Where its memory goes.
    pub(super) suspended: Suspended,
    pub(super) run_dir: RunDir,
}

/// A sandbox whose memory was on disk, and is in a VM again.
pub(super) struct Loaded {
    /// Of the new VMM.
    pub(super) pid: u32,
    /// Whether the sandbox runs; if not, it is paused, and may be resumed or killed.
    pub(super) resumed: Result<(), Error>,
}

/// Writes the sandbox's memory out, and ends its VM. After an error the sandbox is as it was before, if its
/// VM lives, and nothing is left of the file.
pub(super) async fn to_disk(subject: Subject) -> Result<QuiesceResponse, Failed> {
    let mut steps = Steps::begin();
    let error = match write(&subject, &mut steps).await {
        Ok(rest) => match end_vm(&subject.guest).await {
            Ok(()) => {
                steps.done("VM ended");
                return Ok(rest);
            }
            Err(e) => e,
        },
        Err(e) => e,
    };
    discard(&subject.suspended).await;
    let Subject { guest, timeline, paused, .. } = subject;
    if paused {
        if let Err(e) = pause::stand_still_at_last(&guest).await {
            warn!("the VM of a paused sandbox runs: {}", chain(&e));
        }
        return Err(Failed { error, runs: false });
    }
    let runs = match pause::wake_at_last(&guest, timeline, &mut steps).await {
        Ok(()) => true,
        Err(e) => {
            error!("a pause to disk failed, and the sandbox cannot be set going again: {}", chain(&e));
            false
        }
    };
    Err(Failed { error, runs })
}

async fn write(subject: &Subject, steps: &mut Steps) -> Result<QuiesceResponse, Error> {
    let Subject { guest, paused, suspended, run_dir, .. } = subject;
    let (making, run_dir) = (suspended.clone(), run_dir.clone());
    blocking(move || making.create(&run_dir)).await?;
    if *paused {
        // Its processes stay frozen; but its disks may have requests under way, which no file would have.
        guest.machine.resume().await?;
    }
    pause::come_to_rest(guest, steps).await?;
    steps.done("all at rest");
    let rest = pause::quiesce(guest, true).await?;
    steps.done("disks of the guest written out");
    guest.machine.pause().await?;
    steps.done("VM paused");
    pause::sync_logs(guest).await?;
    steps.done("logs written out");
    guest.machine.snapshot(&suspended.vm_dir()).await?;
    steps.done("memory and devices written");
    let written = suspended.clone();
    blocking(move || written.sync()).await?;
    steps.done("memory on disk");
    Ok(rest)
}

pub(super) async fn end_vm(guest: &Guest) -> Result<(), Error> {
    if let Err(e) = guest.machine.retire().await {
        // Another VMM must never write to its disks beside it. Does nothing if it has ended by itself.
        let description = format!("it could not be ended after its memory was written: {}", chain(&e));
        guest.machine.end(VmmExit { expected: false, description }).await;
        return Err(e.into());
    }
    guest.agent.disconnect();
    Ok(())
}

/// Boots a VM from the file, and lets it run. After an error the sandbox is on disk as before, and this may
/// be repeated; or it has been killed.
pub(super) async fn from_disk(
    guest: &Guest,
    timeline: u64,
    relaunch: Relaunch,
    suspended: &Suspended,
) -> Result<Loaded, Error> {
    let pid = relaunch.run(guest, &mut Steps::begin()).await?;
    let resumed = pause::resume(guest, timeline).await;
    // A resume that failed may have let it run.
    discard(suspended).await;
    if resumed.is_ok() {
        info!("a sandbox goes on that was paused to disk");
    }
    Ok(Loaded { pid, resumed })
}

/// Removes the file.
pub(super) async fn discard(suspended: &Suspended) {
    let doomed = suspended.clone();
    if let Err(e) = blocking(move || doomed.remove()).await {
        warn!("the memory of a sandbox stays on disk: {}", chain(&e));
    }
}

async fn blocking(work: impl FnOnce() -> Result<(), SnapshotError> + Send + 'static) -> Result<(), Error> {
    Ok(spawn_blocking(work).await??)
}
