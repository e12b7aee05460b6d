//! Putting a sandbox back to a snapshot of its own: another VM takes the place of the one that it has.
//!
//! ```text
//! prepare:  the snapshot is checked, its memory linked, and its disks copied beside the current ones
//! replace:  the sandbox comes to rest, its VM ends, disks are renamed, another VM boots from the snapshot
//! sort:     the guest tells where its streams are; those that go on are put there, the others are closed
//! ```
//!
//! Then the owner notes the new timeline on disk, and the guest is thawed as one that was restored.
//!
//! Until the VM ends, a failure leaves the sandbox as it was. After that it is the sandbox's end: what it was
//! is gone, and half of something else is nothing.

use std::{collections::HashMap, sync::Arc, time::Duration};

use containerd_shim_protos::api::Status;
use cube_protocol::stream::Stream;
use futures::future::join_all;
use tokio::task::spawn_blocking;
use tracing::{info, warn};
use ttrpc::Code;

use super::{
    ProcessId,
    job::{self, Guest, stdio_config},
    pause::{self, Failed},
    positions::{Output, Positions},
    process::Stdio,
    relaunch::Relaunch,
    restore::{self, Restored},
    steps::Steps,
    suspend,
};
use crate::{
    agent::AgentError,
    errors::{Error, chain},
    rootfs::block::Staged,
    snapshot::{Manifest, Store, Suspended, untold},
    state::{PastTimeline, RunDir},
    stdio::{ProcessIo, StdioConfig},
    vmm::VmmExit,
};

/// Time for what is on the host already to get to the readers of processes that do not go on.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// A sandbox that is to be put back.
pub(super) struct Subject {
    pub(super) guest: Guest,
    pub(super) namespace: String,
    /// What it is on, and what led to that.
    pub(super) timeline: u64,
    pub(super) past: Vec<PastTimeline>,
    pub(super) paused: bool,
    pub(super) snapshot: String,
    /// Those that containerd knows and that have not been deleted.
    pub(super) processes: Vec<Known>,
    /// Boots the VM from `memory`, once it has the disks of the snapshot.
    pub(super) relaunch: Relaunch,
    /// Where the snapshot's memory is linked to, for as long as it takes: the store may lose it meanwhile.
    pub(super) memory: Suspended,
    pub(super) run_dir: RunDir,
    /// How the container goes on that was restored, if it was.
    pub(super) restored: Option<Arc<Restored>>,
}

/// A process as containerd knows it.
pub(super) struct Known {
    pub(super) id: ProcessId,
    /// Whether it has been started.
    pub(super) started: bool,
    /// Whether it has exited, also if containerd has not been told yet.
    pub(super) exited: bool,
    /// In the guest; 0 before it is started.
    pub(super) guest_pid: u32,
    pub(super) io: Option<ProcessIo>,
}

/// A sandbox whose guest is at rest in a VM that was made from the snapshot.
pub(super) struct Replaced {
    pub(super) pid: u32,
    /// The disks of the VM.
    pub(super) disks: Vec<crate::vmm::Disk>,
    /// How it goes on.
    pub(super) restored: Restored,
    /// The processes that go on, with their stdio. The others have ended.
    pub(super) go_on: Vec<(ProcessId, Option<ProcessIo>)>,
}

/// A rollback that failed.
pub(super) struct Unreplaced {
    pub(super) failed: Failed,
    /// As they were.
    pub(super) processes: Vec<Known>,
}

/// What has been made ready.
struct Prepared {
    staged: Staged,
    manifest: Manifest,
}

/// Replaces the VM. If that fails with the VM gone, the sandbox has ended.
pub(super) async fn replace(mut subject: Subject) -> Result<Replaced, Box<Unreplaced>> {
    let mut steps = Steps::begin();
    let processes = std::mem::take(&mut subject.processes);
    let prepared = match prepare(&subject, &processes).await {
        Ok(prepared) => prepared,
        Err(error) => {
            suspend::discard(&subject.memory).await;
            let failed = Failed { error, runs: !subject.paused };
            return Err(Box::new(Unreplaced { failed, processes }));
        }
    };
    steps.done("snapshot checked, disks copied");
    if let Err(failed) = leave(&subject, &mut steps).await {
        discard(&subject.memory, prepared.staged).await;
        return Err(Box::new(Unreplaced { failed, processes }));
    }
    let guest = subject.guest.clone();
    let snapshot = subject.snapshot.clone();
    match arrive(subject, prepared, processes, &mut steps).await {
        Ok(replaced) => Ok(replaced),
        Err(error) => {
            let why = chain(&error);
            let description = format!("it was to be put back to the snapshot {snapshot:?}: {why}");
            guest.machine.end(VmmExit { expected: false, description }).await;
            guest.machine.kill().await;
            let failed = Failed { error: Error::RollbackEnded { snapshot, why }, runs: false };
            Err(Box::new(Unreplaced { failed, processes: Vec::new() }))
        }
    }
}

/// Everything that can fail without harm.
async fn prepare(subject: &Subject, processes: &[Known]) -> Result<Prepared, Error> {
    let store = Store::at(&subject.relaunch.config.snapshot.dir);
    let (name, memory, run_dir) = (subject.snapshot.clone(), subject.memory.clone(), subject.run_dir.clone());
    let opened = spawn_blocking(move || -> Result<_, Error> {
        let held = store.hold(store.resolve(&name)?, &mut untold)?;
        memory.create(&run_dir)?;
        memory.link(&held.dir)?;
        Ok(held)
    });
    let held = opened.await??;
    check(subject, processes, &held.manifest)?;
    let Relaunch { host, config, vm } = subject.relaunch.clone();
    let run_dir = subject.run_dir.clone();
    let disks = held.manifest.disks_in(&held.dir);
    let staged = spawn_blocking(move || host.stage_disks(&config, &run_dir, &vm.disks, &disks));
    Ok(Prepared { staged: staged.await??, manifest: held.manifest })
}

/// Whether the snapshot is one of this sandbox, and no container has begun or ended since.
fn check(subject: &Subject, processes: &[Known], manifest: &Manifest) -> Result<(), Error> {
    let refused = |reason| Err(Error::Rollback { snapshot: manifest.name.clone(), reason });
    let origin = &manifest.origin;
    let own = origin.timeline == subject.timeline;
    if !own && !subject.past.iter().any(|past| past.has(origin.timeline, manifest.created_ns)) {
        let of = format!("{}/{}", origin.namespace, origin.sandbox);
        return refused(format!(
            "it is of another sandbox, {of}: `ctr run --annotation cube.snapshot.restore={}` makes a new one \
             from it",
            manifest.name
        ));
    }
    for Known { id, exited, guest_pid, .. } in processes.iter().filter(|known| known.id.is_init()) {
        let container = &id.container;
        let inside = subject.guest.inside(container.clone());
        match manifest.containers.iter().find(|known| known.id == inside) {
            _ if *exited => {
                return refused(format!("the container {container:?} has exited, and stays so"));
            }
            Some(known) if known.pid == *guest_pid => {}
            _ => return refused(format!("the container {container:?} was not running then")),
        }
    }
    let known = processes.iter().filter(|known| known.id.is_init()).count();
    if known != manifest.containers.len() {
        return refused("a container that was running then has been deleted".into());
    }
    let mut serials: Vec<_> = manifest.disks.iter().map(|disk| (&disk.serial, disk.read_only)).collect();
    let mut current: Vec<_> =
        subject.relaunch.vm.disks.iter().map(|disk| (&disk.serial, disk.read_only)).collect();
    serials.sort();
    current.sort();
    if serials != current {
        return refused("it has other disks".into());
    }
    Ok(())
}

/// Brings the sandbox to rest, and ends its VM, whose memory is free then.
async fn leave(subject: &Subject, steps: &mut Steps) -> Result<(), Failed> {
    let Subject { guest, timeline, paused, .. } = subject;
    if !paused {
        let rested = async {
            pause::come_to_rest(guest, steps).await?;
            steps.done("all at rest");
            pause::sync_logs(guest).await
        };
        if let Err(error) = rested.await {
            let runs = pause::wake_at_last(guest, *timeline, steps).await.is_ok();
            return Err(Failed { error, runs });
        }
    }
    suspend::end_vm(guest).await.map_err(|error| Failed { error, runs: false })?;
    steps.done("VM ended");
    Ok(())
}

async fn arrive(
    subject: Subject,
    prepared: Prepared,
    processes: Vec<Known>,
    steps: &mut Steps,
) -> Result<Replaced, Error> {
    let Subject { guest, namespace, snapshot, mut relaunch, memory, restored, past, .. } = subject;
    let Prepared { staged, manifest } = prepared;
    let disks = spawn_blocking(move || staged.commit()).await??;
    relaunch.vm.disks = disks.clone();
    let pid = relaunch.run(&guest, steps).await?;
    suspend::discard(&memory).await;
    let rest = pause::quiesce(&guest, false).await?;
    let timeline = restore::new_timeline()?;
    let positions = Positions::of(&rest);
    let go_on = sort(&guest, processes, &positions, timeline).await?;
    steps.done("processes sorted");
    let strays = strays(&guest, &namespace, &go_on, &positions);
    info!(snapshot, created_ns = manifest.created_ns, strays = strays.len(), "put back");
    let (origin, taken) = (&manifest.origin, manifest.created_ns);
    let anew = past.iter().any(|past| past.until_ns.is_some() && past.has(origin.timeline, taken));
    let restored = Restored::again(restored.as_deref(), anew, timeline, rest.last_event, strays);
    Ok(Replaced { pid, disks, restored, go_on })
}

/// Puts the streams of those processes that the guest has to where they are, and closes the others.
async fn sort(
    guest: &Guest,
    processes: Vec<Known>,
    positions: &Positions,
    timeline: u64,
) -> Result<Vec<(ProcessId, Option<ProcessIo>)>, Error> {
    let (mut go_on, mut ended) = (Vec::new(), Vec::new());
    for Known { id, started, exited, guest_pid, io } in processes {
        let inside = guest.inside(id.container.clone());
        if exited || !lives(guest, &inside, &id.exec, started, guest_pid).await? {
            ended.extend(io.map(|io| (id, io)));
            continue;
        }
        let begin = positions.begin(&inside, &id.exec);
        go_on.push((id, io, begin));
    }
    join_all(ended.into_iter().map(|(id, io)| async move {
        io.process_exited();
        let left = io.finish(CLOSE_LIMIT).await.discarded_bytes;
        if left > 0 {
            let ProcessId { container, exec } = id;
            warn!(container, exec, bytes = left, "a rollback discarded output that its reader had not taken");
        }
    }))
    .await;
    let rewound = go_on.into_iter().map(|(id, io, begin)| async move {
        let Some(mut io) = io else { return (id, None) };
        if let Err(e) = io.rewind(begin, timeline).await {
            warn!(container = id.container, exec = id.exec, "a log waits for its disk: {}", chain(&e));
        }
        (id, Some(io))
    });
    Ok(join_all(rewound).await)
}

/// Whether the guest has this very process, and as far as it had come.
async fn lives(
    guest: &Guest,
    inside: &str,
    exec: &str,
    started: bool,
    guest_pid: u32,
) -> Result<bool, AgentError> {
    let state = match job::state(&guest.agent, inside, exec).await {
        Ok(state) => state,
        Err(AgentError::Refused { status, .. }) if status.code() == Code::NOT_FOUND => return Ok(false),
        Err(e) => return Err(e),
    };
    Ok(match state.status.enum_value_or_default() {
        Status::CREATED => !started,
        // One that came later may have its id.
        Status::RUNNING | Status::PAUSED | Status::PAUSING => started && state.pid == guest_pid,
        Status::STOPPED | Status::UNKNOWN => false,
    })
}

/// What takes the output of processes that nobody here knows.
fn strays(
    guest: &Guest,
    namespace: &str,
    go_on: &[(ProcessId, Option<ProcessIo>)],
    positions: &Positions,
) -> Vec<ProcessIo> {
    let mut taken = HashMap::new();
    for (id, io) in go_on {
        let Some(io) = io else { continue };
        taken.insert((guest.inside(id.container.clone()), id.exec.clone()), io.wanted());
    }
    let is_taken = |output: &Output| {
        let key = (output.container.clone(), output.exec.clone());
        taken.get(&key).is_some_and(|wanted| match output.stream {
            Stream::STDERR => wanted.stderr,
            _ => wanted.stdout,
        })
    };
    let mut strays = Vec::new();
    for output in positions.outputs().iter().filter(|output| !is_taken(output)) {
        let Output { container: inside, exec, stream } = output.clone();
        let begin = positions.begin(&inside, &exec);
        let process = ProcessId { container: guest.outside(&inside), exec };
        let config = stdio_config(namespace, &process, inside, &Stdio::default(), None);
        let mut stray = ProcessIo::discard(StdioConfig { begin, ..config }, &[stream]);
        stray.start(guest.dial.clone(), &guest.flows);
        strays.push(stray);
    }
    strays
}

async fn discard(memory: &Suspended, staged: Staged) {
    suspend::discard(memory).await;
    if let Err(e) = spawn_blocking(move || staged.discard()).await {
        warn!("copies of disks stay: {e}");
    }
}
