//! Taking a snapshot of a sandbox: memory, devices and disks at one instant.
//!
//! The sandbox stands still while they are written, and no longer: digests and the rest come afterwards,
//! in [`complete`].

use std::path::PathBuf;

use cube_protocol::guest::QuiesceResponse;
use tokio::{task::spawn_blocking, try_join};
use tracing::warn;

use super::{
    job::Guest,
    pause::{self, Failed},
    spec,
    steps::Steps,
};
use crate::{
    errors::{Error, chain},
    snapshot::{Draft, Listed, Manifest, SnapshotError, Store, StreamPosition, portable_spec, untold},
    vmm::Disk,
};

/// What to take a snapshot of.
pub(super) struct Subject {
    pub(super) guest: Guest,
    pub(super) timeline: u64,
    /// The guest at rest, if it is: then it stays so.
    pub(super) paused: Option<QuiesceResponse>,
    pub(super) disks: Vec<Disk>,
    pub(super) manifest: Manifest,
    /// Of the containers in the manifest, in its order.
    pub(super) bundles: Vec<PathBuf>,
}

/// What was taken, and has no name yet.
pub(super) struct Taken {
    store: Store,
    draft: Draft,
    disks: Vec<Disk>,
    manifest: Manifest,
}

/// Takes the snapshot. The sandbox is then as it was before, paused or not; also after most errors.
pub(super) async fn take(subject: Subject, store: Store) -> Result<Taken, Failed> {
    let Subject { guest, timeline, paused, disks, mut manifest, bundles } = subject;
    let runs = paused.is_none();
    let unchanged = |error| Failed { error, runs };
    let begun = spawn_blocking(move || -> Result<_, Error> {
        for (container, bundle) in manifest.containers.iter_mut().zip(&bundles) {
            container.spec = portable_spec(&spec::load(bundle)?);
        }
        let draft = store.begin(&manifest.name)?;
        Ok((store, draft, manifest))
    });
    let begun = begun.await.map_err(Error::from).and_then(|begun| begun);
    let (store, draft, mut manifest) = begun.map_err(unchanged)?;

    let mut steps = Steps::begin();
    let written = write(&guest, paused, &draft, &disks, &mut steps).await;
    let woken = match &written {
        _ if runs => pause::wake_at_last(&guest, timeline, &mut steps).await,
        // It may still be writing to what is discarded below.
        Err(_) => pause::stand_still_at_last(&guest).await,
        Ok(_) => Ok(()),
    };
    let result = match (written, woken) {
        (Ok(rest), Ok(())) => {
            manifest.last_event = rest.last_event;
            manifest.streams = rest.streams.into_iter().map(position).collect();
            return Ok(Taken { store, draft, disks, manifest });
        }
        (Err(error), Ok(())) => Failed { error, runs },
        (written, Err(error)) => {
            if let Err(e) = written {
                warn!("the snapshot failed: {}", chain(&e));
            }
            Failed { error, runs: false }
        }
    };
    discard(draft).await;
    Err(result)
}

async fn write(
    guest: &Guest,
    paused: Option<QuiesceResponse>,
    draft: &Draft,
    disks: &[Disk],
    steps: &mut Steps,
) -> Result<QuiesceResponse, Error> {
    let rest = match paused {
        Some(rest) => {
            pause::sync_logs(guest).await?;
            steps.done("logs written out");
            rest
        }
        None => {
            pause::come_to_rest(guest, steps).await?;
            steps.done("all at rest");
            let (rest, ()) = try_join!(pause::quiesce(guest, true), pause::sync_logs(guest))?;
            steps.done("disks of the guest and logs written out");
            guest.machine.pause().await?;
            steps.done("VM paused");
            rest
        }
    };
    guest.machine.snapshot(&draft.vm_dir()).await?;
    steps.done("memory and devices written");
    let copies = draft.copies(disks);
    spawn_blocking(move || copies.make()).await??;
    steps.done("disks copied");
    Ok(rest)
}

/// Gives the snapshot its name, once all of it is on disk; then copies it. There is both or none.
pub(super) async fn complete(taken: Taken, copy_to: Option<PathBuf>) -> Result<Listed, Error> {
    let Taken { store, draft, disks, manifest } = taken;
    let finished = spawn_blocking(move || -> Result<_, SnapshotError> {
        let listed = draft.finish(manifest, &disks)?;
        if let Some(dir) = copy_to {
            let name = &listed.manifest.name;
            store.copy_to(name, &dir, &mut untold).inspect_err(|_| {
                if let Err(e) = store.remove(name) {
                    warn!("a snapshot stays of which there is no copy: {}", chain(&e));
                }
            })?;
        }
        Ok(listed)
    });
    Ok(finished.await??)
}

async fn discard(draft: Draft) {
    match spawn_blocking(move || draft.discard()).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => warn!("a part of a snapshot stays: {}", chain(&e)),
        Err(e) => warn!("a part of a snapshot stays: {e}"),
    }
}

fn position(stream: cube_protocol::guest::StreamInfo) -> StreamPosition {
    StreamPosition {
        container: stream.container_id,
        exec: stream.exec_id,
        stream: stream.stream,
        acknowledged: stream.acked_offset,
        end: stream.end_offset,
    }
}
