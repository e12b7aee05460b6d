//! Pausing and resuming a sandbox: the order of the steps, and the way back.
//!
//! ```text
//! pause:  no more polls for events, Quiesce with the streams to rest, VMM pauses
//! resume: VMM resumes, polls for events, Thaw, streams flow
//! ```
//!
//! Each step of the way back does nothing where there is nothing to undo. So whichever step of a pause
//! fails, the whole way back is gone.

use std::time::Duration;

use cube_protocol::guest::{QuiesceRequest, QuiesceResponse, ThawRequest};
use tokio::{
    time::{sleep, timeout},
    try_join,
};
use tracing::{error, warn};

use super::{job::Guest, restore, steps::Steps};
use crate::{
    errors::{Error, chain},
    state::now_ns,
    vmm::VmmError,
};

/// Time for the guest to freeze its processes, and how much longer its answer may take.
const QUIESCE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));

/// The same for a guest that also writes out its disks.
const SYNC: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1));

/// Time for the disks of the host to write out the logs. As much as the guest has for its own.
const LOG_SYNC_LIMIT: Duration = SYNC.0;

/// Time for the streams, and for the last poll of events. A stream that is late, because a disk of the
/// host hangs, keeps its connection: what is on it is still there after the pause.
const REST_LIMIT: Duration = Duration::from_secs(5);

/// Time for the guest to let its processes run again.
const THAW_LIMIT: Duration = Duration::from_secs(10);

/// Time between questions to a VMM that does not answer.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A pause that failed.
pub(super) struct Failed {
    pub(super) error: Error,
    /// Whether the sandbox runs as before. If not, it stands still, and may be resumed or killed.
    pub(super) runs: bool,
}

/// Brings the sandbox to rest, and stops its VM.
pub(super) async fn pause(guest: &Guest, timeline: u64) -> Result<QuiesceResponse, Failed> {
    let mut steps = Steps::begin();
    let paused = async {
        let rest = come_to_rest(guest, &steps).await?;
        steps.done("all at rest");
        guest.machine.pause().await?;
        steps.done("VM paused");
        Ok(rest)
    };
    let error = match paused.await {
        Ok(rest) => return Ok(rest),
        Err(error) => error,
    };
    match wake_at_last(guest, timeline, &mut steps).await {
        Ok(()) => Err(Failed { error, runs: true }),
        Err(e) => {
            error!("a pause failed, and the sandbox cannot be set going again: {}", chain(&e));
            Err(Failed { error, runs: false })
        }
    }
}

/// Sets a paused sandbox going again. If that fails, it is still paused.
pub(super) async fn resume(guest: &Guest, timeline: u64) -> Result<(), Error> {
    let woken = wake(guest, timeline, &mut Steps::begin()).await;
    if woken.is_err() {
        guest.agent.hold_events();
        if let Err(e) = guest.machine.pause().await {
            warn!("the VM of a sandbox that cannot be resumed runs: {}", chain(&e));
        }
    }
    woken
}

/// Lets nothing run in the guest, and with `sync` has it write out its disks. Can be repeated.
pub(super) async fn quiesce(guest: &Guest, sync: bool) -> Result<QuiesceResponse, Error> {
    let (limit, margin) = if sync { SYNC } else { QUIESCE };
    let request = QuiesceRequest { sync, timeout_ms: limit.as_millis() as u32, ..Default::default() };
    let answer = guest.agent.call("Quiesce", limit + margin, request, |c, ctx, call| async move {
        c.guest.quiesce(ctx, &call).await
    });
    Ok(answer.await?)
}

/// Has the host write out the logs of streams at rest: what they have acknowledged the guest has no more, and
/// is in no snapshot. For whoever keeps the guest on disk.
pub(super) async fn sync_logs(guest: &Guest) -> Result<(), Error> {
    Ok(guest.flows.sync_logs(LOG_SYNC_LIMIT).await?)
}

/// Freezes the guest while the streams come to rest. Neither needs the other: what processes write once
/// their streams have stopped is kept by the guest. An agent that has no output to send has its one thread
/// free for Quiesce, and the processes of a full pipe stand still by themselves.
///
/// The offsets in the answer may be from before the streams have stopped. Undone by [`wake`], also after an
/// error.
pub(super) async fn come_to_rest(guest: &Guest, steps: &Steps) -> Result<QuiesceResponse, Error> {
    guest.agent.hold_events();
    let quiesced = async {
        let rest = quiesce(guest, false).await?;
        steps.reached("guest quiesced");
        Ok(rest)
    };
    let (rest, (), ()) = try_join!(quiesced, streams_to_rest(guest, steps), events_to_rest(guest, steps))?;
    Ok(rest)
}

async fn streams_to_rest(guest: &Guest, steps: &Steps) -> Result<(), Error> {
    if timeout(REST_LIMIT, guest.flows.rest()).await.is_err() {
        warn!("pausing with streams that do not come to rest: is there a disk that hangs?");
    }
    steps.reached("streams at rest");
    Ok(())
}

async fn events_to_rest(guest: &Guest, steps: &Steps) -> Result<(), Error> {
    if timeout(REST_LIMIT, guest.agent.events_held()).await.is_err() {
        warn!("pausing with a poll for events that the guest does not answer");
    }
    steps.reached("events at rest");
    Ok(())
}

/// Sets everything going again that [`come_to_rest`] and the VMM have stopped.
pub(super) async fn wake(guest: &Guest, timeline: u64, steps: &mut Steps) -> Result<(), Error> {
    guest.machine.resume().await?;
    steps.done("VM resumed");
    // First: this is also what connects again if that has to be.
    guest.agent.follow_events();
    let request = ThawRequest { realtime_ns: now_ns(), entropy: restore::entropy()?, ..Default::default() };
    guest
        .agent
        .call("Thaw", THAW_LIMIT, request, |c, ctx, call| async move { c.guest.thaw(ctx, &call).await })
        .await?;
    steps.done("guest thawed");
    guest.flows.flow(timeline);
    Ok(())
}

/// [`wake`], as often as it takes until the VMM answers: one that is asked to write memory answers nothing else
/// before it is done, however slow the disk is. Its end, and a kill, are an answer as well.
pub(super) async fn wake_at_last(guest: &Guest, timeline: u64, steps: &mut Steps) -> Result<(), Error> {
    let mut told = false;
    loop {
        match wake(guest, timeline, steps).await {
            Err(Error::Vmm(e @ VmmError::Timeout { .. })) => ask_again(&e, &mut told).await,
            woken => return woken,
        }
    }
}

/// The same for a VM that is to stand still, and does: returns once its VMM answers.
pub(super) async fn stand_still_at_last(guest: &Guest) -> Result<(), Error> {
    let mut told = false;
    loop {
        match guest.machine.pause().await {
            Err(e @ VmmError::Timeout { .. }) => ask_again(&e, &mut told).await,
            paused => return Ok(paused?),
        }
    }
}

async fn ask_again(error: &VmmError, told: &mut bool) {
    if !std::mem::replace(told, true) {
        warn!(
            "the VMM is busy and does not answer: the sandbox goes on as soon as it does: {}",
            chain(error)
        );
    }
    sleep(ASK_AGAIN).await;
}
