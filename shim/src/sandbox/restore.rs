//! Create from a snapshot: the sandbox goes on where the snapshot was taken, once it is started.
//!
//! A guest that was restored is quiesced. It is asked for the offsets of its streams, which are those of the
//! very instant of the snapshot, and nothing of it runs before Start thaws it: with the time, with randomness
//! that no other clone gets, with its own name, and on a timeline of its own.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cube_protocol::{
    guest::{QuiesceResponse, ThawRequest},
    stream::Stream,
};
use tokio::{sync::oneshot, task::spawn_blocking};
use tracing::{info, warn};

use super::{
    clone::Present,
    create::{Booted, Created, Creation, Reached},
    job::{self, Guest, stdio_config},
    machine::Machine,
    pause,
    positions::{Output, Positions},
    size::{self, VmSize},
    steps::Steps,
};
use crate::{
    config,
    errors::{Error, chain},
    snapshot::{Held, Manifest, Store},
    state::{PastTimeline, now_ns},
    stdio::{Flows, ProcessIo, StdioConfig},
    vmm::{self, Disk, VmSpec},
};

/// Time for the guest to let its processes run.
const THAW_LIMIT: Duration = Duration::from_secs(10);

/// Random bytes for the guest's generator, which wants 32 at least.
const ENTROPY: usize = 64;

/// How a container that was restored goes on when it is started.
pub(super) struct Restored {
    /// The timeline that begins then.
    pub(super) timeline: u64,
    /// Number of the last event from before the snapshot.
    last_event: u64,
    /// The part of another sandbox's timeline that it goes on from, if it does.
    pub(super) past: Option<PastTimeline>,
    /// What the container's own spec says.
    present: Present,
    /// Takes the output of processes that nobody here knows, for as long as the container is there.
    _strays: Vec<ProcessIo>,
}

impl Restored {
    /// The same sandbox, whose VM was replaced by one at rest. `before` is how it went on then, if it was
    /// restored; `anew` if it goes back to that very snapshot, which does not have its limits.
    pub(super) fn again(
        before: Option<&Restored>,
        anew: bool,
        timeline: u64,
        last_event: u64,
        strays: Vec<ProcessIo>,
    ) -> Restored {
        let mut present = before.map(|before| before.present.clone()).unwrap_or_default();
        if !anew {
            present.resources = None;
        }
        Restored { timeline, last_event, past: None, present, _strays: strays }
    }
}

impl Creation {
    /// Makes the sandbox from the snapshot `name`. `abort` ends what may take long.
    pub(super) async fn restore(
        &mut self,
        name: &str,
        mut abort: oneshot::Receiver<()>,
    ) -> Result<Created, Error> {
        if self.joins.is_some() {
            return Err(Error::Unimplemented {
                what: "restoring a container into a sandbox that runs".into(),
                hint: ": restore it as a sandbox of its own",
            });
        }
        let policy = self.tenant.is_pod().then_some(&self.config.policy);
        self.most = policy.map(|policy| size::most(&self.plan.spec, policy));
        let spec = std::mem::take(&mut self.plan.spec);
        let present = spawn_blocking(move || Present::of(spec)).await??;
        let (held, disks) = self.open(name, &mut abort).await?;
        tokio::select! {
            created = self.go_on(&held.manifest, present, &held.dir, disks) => created,
            _ = abort => Err(Error::Killed),
        }
    }

    /// Reads the snapshot, and makes what the sandbox needs on the host. `abort` ends what may take long, and
    /// only that, as in `prepare`.
    async fn open(&self, name: &str, abort: &mut oneshot::Receiver<()>) -> Result<(Held, Vec<Disk>), Error> {
        let aborted = Arc::new(AtomicBool::new(false));
        let seen = aborted.clone();
        let go_on = move |_, _| match seen.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        };
        let store = Store::at(&self.config.snapshot.dir);
        let (host, config, cgroup) = (self.host.clone(), self.config.clone(), self.state.cgroup.clone());
        let (name, run_dir) = (name.to_owned(), self.identity.run_dir.clone());
        let tenant = self.tenant.clone();
        let mut opened = spawn_blocking(move || -> Result<_, Error> {
            let mut go_on = go_on;
            let held = store.hold_for(&tenant, store.resolve(&name)?, &mut go_on)?;
            host.create_cgroup(&cgroup)?;
            let disks = host.restore_disks(&config, &run_dir, &held.manifest.disks_in(&held.dir))?;
            Ok((held, disks))
        });
        tokio::select! {
            opened = &mut opened => opened?,
            _ = abort => {
                aborted.store(true, Ordering::Relaxed);
                let _ = opened.await;
                Err(Error::Killed)
            }
        }
    }

    async fn go_on(
        &self,
        manifest: &Manifest,
        present: Present,
        dir: &Path,
        disks: Vec<Disk>,
    ) -> Result<Created, Error> {
        let [container] = &manifest.containers[..] else {
            let count = manifest.containers.len();
            let what = format!("a snapshot with {count} containers");
            return Err(Error::Unimplemented { what, hint: ": one that runs is needed" });
        };
        let stdio = &self.plan.request.stdio;
        if container.terminal != stdio.terminal {
            let needed = if container.terminal { "with a terminal" } else { "without a terminal" };
            let reason = format!("the snapshot {:?} must be restored {needed}", manifest.name);
            return Err(Error::Restore { reason });
        }
        let mut steps = Steps::begin();
        // Those of the snapshot are in force.
        let size = vmm::size_in(&dir.join("vm")).map(|(vcpus, memory_mib)| VmSize { vcpus, memory_mib });
        self.check_size(&manifest.name, size)?;
        let config::Vm { vcpus, memory_mib } = self.config.vm;
        let size = size.unwrap_or(VmSize { vcpus, memory_mib });
        let vm = VmSpec {
            sandbox_id: self.identity.id.clone(),
            run_dir: self.identity.run_dir.path().into(),
            cgroup: self.state.cgroup.clone(),
            user: self.state.user,
            group: self.config.users.first,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            share: None,
            disks: disks.clone(),
            cmdline: String::new(),
            restore: Some(dir.join("vm")),
        };
        let Reached { vmm, backend, reason, dial, agent, link, hello, limited, .. } =
            self.reach(vm, &mut steps).await?;
        if !hello.quiesced {
            let reason = format!("the guest of the snapshot {:?} was not at rest", manifest.name);
            return Err(Error::Restore { reason });
        }
        agent.hold_events();
        let pid = vmm.pid();
        let machine = Machine::watch(vmm, self.owner.clone());
        let id = self.plan.request.id.clone();
        let alias = Some(Arc::new((id, container.id.clone())));
        let guest = Guest { agent, machine, dial, flows: Flows::at_rest(), alias };
        let rest = pause::quiesce(&guest, false).await?;
        let guest_pid = job::state(&guest.agent, &container.id, "").await?.pid;
        steps.done("guest asked where it is");

        let (io, strays) = self.streams(&guest, &container.id, &rest).await?;
        let past = PastTimeline { timeline: manifest.origin.timeline, until_ns: Some(manifest.created_ns) };
        let restored = Restored {
            timeline: new_timeline()?,
            last_event: rest.last_event,
            past: Some(past),
            present,
            _strays: strays,
        };
        steps.done("stdio prepared");
        info!(snapshot = manifest.name, of = manifest.origin.sandbox, "restored");
        let link = link.run(self.events.clone());
        let booted = Some(Booted { guest, pid, backend, reason, hello, link, disks, limited });
        Ok(Created { io, guest_pid, booted, restored: Some(restored) })
    }

    /// Checks that a pod may have a VM of this size, which cannot be changed any more.
    fn check_size(&self, name: &str, size: Option<VmSize>) -> Result<(), Error> {
        match (self.most, size) {
            (Some(most), Some(size)) if size.vcpus > most.vcpus || size.memory_mib > most.memory_mib => {
                let reason = format!(
                    "the VM of the snapshot {name:?} has {} CPUs and {} MiB, and this pod may have {} and {}",
                    size.vcpus, size.memory_mib, most.vcpus, most.memory_mib
                );
                Err(Error::Restore { reason })
            }
            _ => Ok(()),
        }
    }

    /// The stdio of the container, from where the guest is, and what takes the output of all others.
    async fn streams(
        &self,
        guest: &Guest,
        inside: &str,
        rest: &QuiesceResponse,
    ) -> Result<(ProcessIo, Vec<ProcessIo>), Error> {
        let process = self.process();
        let stdio = &self.plan.request.stdio;
        let namespace = &self.identity.namespace;
        let config = stdio_config(namespace, &process, inside.to_owned(), stdio, self.log.clone());
        let positions = Positions::of(rest);
        let begin = positions.begin(inside, "");
        let mut io = ProcessIo::prepare(StdioConfig { begin, ..config.clone() }).await?;
        io.start(guest.dial.clone(), &guest.flows);
        let wanted = io.wanted();
        let mut strays = Vec::new();
        for output in positions.outputs() {
            let Output { container: guest_container_id, exec: exec_id, stream } = output.clone();
            let ours = guest_container_id == inside && exec_id.is_empty();
            let taken = if stream == Stream::STDERR { wanted.stderr } else { wanted.stdout };
            if ours && taken {
                continue;
            }
            let begin = positions.begin(&guest_container_id, &exec_id);
            let config = StdioConfig { guest_container_id, exec_id, begin, log: None, ..config.clone() };
            let mut stray = ProcessIo::discard(config, &[stream]);
            stray.start(guest.dial.clone(), &guest.flows);
            strays.push(stray);
        }
        Ok((io, strays))
    }
}

/// Lets a guest that was restored run, with the limits that its container `id` has now. If that fails, it may
/// be repeated.
pub(super) async fn start(guest: &Guest, id: String, restored: &Restored) -> Result<(), Error> {
    thaw(guest, restored).await?;
    // Not before: nothing of a guest at rest can be changed.
    match restored.present.resources.clone() {
        Some(resources) => job::update(guest.clone(), id, resources).await,
        None => Ok(()),
    }
}

async fn thaw(guest: &Guest, restored: &Restored) -> Result<(), Error> {
    let Restored { timeline, last_event, present, .. } = restored;
    let request = ThawRequest {
        realtime_ns: now_ns(),
        entropy: entropy()?,
        hostname: present.hostname.clone(),
        environment: present.environment.clone(),
        timeline: *timeline,
        ..Default::default()
    };
    guest
        .agent
        .call("Thaw", THAW_LIMIT, request, |c, ctx, call| async move { c.guest.thaw(ctx, &call).await })
        .await
        .inspect_err(|e| warn!("the restored guest does not run: {}", chain(e)))?;
    guest.agent.follow_events_of(*timeline, *last_event);
    guest.flows.flow(*timeline);
    Ok(())
}

/// For the guest's generator: others may have gone on from the same memory.
pub(super) fn entropy() -> Result<Vec<u8>, Error> {
    let mut entropy = vec![0; ENTROPY];
    getrandom::fill(&mut entropy).map_err(|e| Error::Restore { reason: no_randomness(e) })?;
    Ok(entropy)
}

/// Random, and not 0, which stands for none.
pub(super) fn new_timeline() -> Result<u64, Error> {
    let random = getrandom::u64().map_err(|e| Error::Restore { reason: no_randomness(e) })?;
    Ok(random.max(1))
}

fn no_randomness(error: getrandom::Error) -> String {
    format!("the host has no random bytes: {error}")
}
