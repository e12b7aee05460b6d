//! Pausing and resuming a sandbox: the order of the steps, and the way back.
//!
//! ```text
//! pause:  no more polls for events, Quiesce, streams to rest, VMM pauses
//! resume: VMM resumes, polls for events, Thaw, streams flow
//! ```
//!
//! Each step of the way back does nothing where there is nothing to undo. So whichever step of a pause
//! fails, the whole way back is gone.

use std::time::Duration;

use cube_protocol::guest::{QuiesceRequest, ThawRequest};
use tokio::time::timeout;
use tracing::{error, warn};

use super::{job::Guest, steps::Steps};
use crate::{
    errors::{Error, chain},
    state::now_ns,
};

/// Time for the guest to freeze its processes, and how much longer its answer may take.
const QUIESCE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));

/// Time for the streams, and for the last poll of events. A stream that is late, because a disk of the
/// host hangs, keeps its connection: what is on it is still there after the pause.
const REST_LIMIT: Duration = Duration::from_secs(5);

/// Time for the guest to let its processes run again.
const THAW_LIMIT: Duration = Duration::from_secs(10);

/// A pause that failed.
pub(super) struct Failed {
    pub(super) error: Error,
    /// Whether the sandbox runs as before. If not, it stands still, and may be resumed or killed.
    pub(super) runs: bool,
}

/// Brings the sandbox to rest, and stops its VM.
pub(super) async fn pause(guest: &Guest, timeline: u64) -> Result<(), Failed> {
    let mut steps = Steps::begin();
    let paused = async {
        come_to_rest(guest, &mut steps).await?;
        guest.machine.pause().await?;
        steps.done("VM paused");
        Ok(())
    };
    let Err(error) = paused.await else { return Ok(()) };
    match wake(guest, timeline, &mut steps).await {
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

async fn come_to_rest(guest: &Guest, steps: &mut Steps) -> Result<(), Error> {
    guest.agent.hold_events();
    let (limit, margin) = QUIESCE;
    let request = QuiesceRequest { timeout_ms: limit.as_millis() as u32, ..Default::default() };
    guest
        .agent
        .call(
            "Quiesce",
            limit + margin,
            request,
            |c, ctx, call| async move { c.guest.quiesce(ctx, &call).await },
        )
        .await?;
    steps.done("guest quiesced");
    if timeout(REST_LIMIT, guest.flows.rest()).await.is_err() {
        warn!("pausing with streams that do not come to rest: is there a disk that hangs?");
    }
    steps.done("streams at rest");
    if timeout(REST_LIMIT, guest.agent.events_held()).await.is_err() {
        warn!("pausing with a poll for events that the guest does not answer");
    }
    steps.done("events at rest");
    Ok(())
}

async fn wake(guest: &Guest, timeline: u64, steps: &mut Steps) -> Result<(), Error> {
    guest.machine.resume().await?;
    steps.done("VM resumed");
    // First: this is also what connects again if that has to be.
    guest.agent.follow_events();
    let request = ThawRequest { realtime_ns: now_ns(), ..Default::default() };
    guest
        .agent
        .call("Thaw", THAW_LIMIT, request, |c, ctx, call| async move { c.guest.thaw(ctx, &call).await })
        .await?;
    steps.done("guest thawed");
    guest.flows.flow(timeline);
    Ok(())
}
