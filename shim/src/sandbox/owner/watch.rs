//! What happens by itself: exits, the end of the VM, and time.

use std::time::Duration;

use cube_protocol::guest::{TaskExit, TaskOom};
use tokio::time::Instant;
use tracing::{debug, error, info};

use super::{Message, Owner, SandboxState};
use crate::{
    agent::GuestEvent,
    events::TaskEvent,
    sandbox::{
        ProcessId,
        process::{Exit, Phase},
    },
    vmm::VmmExit,
};

/// How long a shim without containers lives: containerd asks for a Create right after `start`, and
/// for a Shutdown right after the last Delete, if it has not crashed in between.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// The same once its directory is gone, and its socket with it. The Shutdown of a containerd that lives is
/// under way then; one that has crashed between Delete and Shutdown cannot reach this shim any more.
const UNREACHABLE_LIMIT: Duration = Duration::from_secs(10);

/// containerd is told at most once in this time that a container is out of memory. The event has no
/// count, and each goes to every client that listens.
const OOM_INTERVAL: Duration = Duration::from_secs(1);

/// How often a shim whose VM has ended looks whether `shim delete` has removed the sandbox.
const ORPHAN_INTERVAL: Duration = Duration::from_secs(2);

impl Owner {
    pub(super) fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Exit(_) | GuestEvent::Oom(_) if self.state == SandboxState::RollingBack => {
                self.held_events.push(event);
            }
            GuestEvent::Exit(exit) => self.told_exit(&exit),
            GuestEvent::Oom(oom) => self.told_oom(&oom),
            GuestEvent::Lost(why) => {
                error!("the guest is lost, killing its VM: {why}");
                if let Some(guest) = self.guest.clone() {
                    tokio::spawn(async move { guest.machine.kill().await });
                }
            }
        }
    }

    /// The id for containerd of what is container `id` in the guest.
    fn outside(&self, id: &str) -> String {
        self.guest.as_ref().map_or_else(|| id.into(), |guest| guest.outside(id))
    }

    fn told_exit(&mut self, exit: &TaskExit) {
        let container = self.outside(&exit.container_id);
        let id = ProcessId { container, exec: exit.exec_id.clone() };
        let created_ns = self.disk.containers.get(&id.container).map(|container| container.created_ns);
        let container = self.containers.get_mut(&id.container);
        let process = container.and_then(|container| container.process(&id.exec));
        match (process, created_ns) {
            (Some(process), Some(created_ns)) if !process.is_over() => {
                self.process_exiting(id, Exit::told(exit, created_ns));
            }
            _ => debug!("exit of the process {id:?}, which is unknown or has exited already"),
        }
    }

    fn told_oom(&mut self, oom: &TaskOom) {
        let id = self.outside(&oom.container_id);
        let Some(container) = self.containers.get_mut(&id) else {
            return debug!("OOM in the unknown container {id:?}");
        };
        if container.oom.is_some_and(|told| told.elapsed() < OOM_INTERVAL) {
            return;
        }
        container.oom = Some(Instant::now());
        info!(container = id, count = oom.count, "out of memory");
        self.publisher.publish(TaskEvent::oom(&id));
    }

    /// The time is up in which a process that got SIGKILL must have exited.
    pub(super) fn kill_overdue(&mut self, id: &ProcessId) {
        let container = self.containers.get_mut(&id.container);
        let lives = container.and_then(|container| container.process(&id.exec)).is_some_and(|p| !p.is_over());
        if let (true, Some(guest)) = (lives, self.guest.clone()) {
            error!(container = id.container, "the guest did not carry out SIGKILL, killing its VM");
            tokio::spawn(async move { guest.machine.kill().await });
        }
    }

    pub(super) fn process_exiting(&mut self, id: ProcessId, exit: Exit) {
        let container = self.containers.get_mut(&id.container);
        let taken = container.and_then(|container| container.process(&id.exec)?.exiting(exit));
        self.tell_when(id, exit, taken);
    }

    /// Tells the exit of a process once its output is `taken`.
    fn tell_when(
        &mut self,
        id: ProcessId,
        exit: Exit,
        taken: Option<impl Future<Output = ()> + Send + 'static>,
    ) {
        let Some(taken) = taken else { return self.process_exited(&id, exit) };
        let owner = self.owner.clone();
        tokio::spawn(async move {
            taken.await;
            // Fails only when the owner has ended, and containerd's interest with it.
            let _ = owner.send(Message::ProcessExited(id, exit)).await;
        });
    }

    pub(super) fn process_exited(&mut self, id: &ProcessId, exit: Exit) {
        let container = self.containers.get_mut(&id.container);
        let Some(process) = container.and_then(|container| container.process(&id.exec)) else {
            return debug!("exit of the unknown process {id:?}");
        };
        if process.exited(exit) {
            self.publish_exit(id, exit);
        }
        if id.is_init() {
            self.forget_motion(&id.container);
        }
    }

    /// Every process has died with the VM, whatever it was doing. Jobs that wait for the guest fail
    /// by themselves, because their connections end.
    pub(super) fn vmm_exited(&mut self, exit: &VmmExit) {
        if exit.expected || self.state == SandboxState::Stopping {
            info!("the VM has ended: {}", exit.description);
        } else {
            error!("the VM has ended unexpectedly: {}", exit.description);
        }
        self.end_of_guest();
        self.discard_memory();
        if self.state != SandboxState::Stopping {
            self.state = SandboxState::Stopped;
        }
        let containers: Vec<String> = self.containers.keys().cloned().collect();
        let processes: Vec<ProcessId> = containers.iter().flat_map(|id| self.process_ids(id)).collect();
        for id in processes {
            let Ok(process) = self.known(&id) else { continue };
            let exit = Exit::killed();
            // What has come of its output is for its readers, if they are quick.
            if process.phase == Phase::Running && process.is_behind() {
                let held = process.is_held();
                let taken = process.exiting(exit);
                process.end_wanted();
                if !held {
                    self.tell_when(id, exit, taken);
                }
                continue;
            }
            let news = match process.phase {
                // It is not going to be started any more; containerd is told the exit all the same,
                // for somebody may wait for it.
                Phase::Starting => process.settle(Phase::Created).is_some() || process.exited(exit),
                _ => process.exited(exit),
            };
            if let (true, Some(exit)) = (news, process.exit()) {
                self.publish_exit(&id, exit);
            }
        }
        self.serve_those_that_waited();
        self.begin_waiting();
    }

    pub(super) fn end_of_guest(&mut self) {
        if let (Some(guest), Some(vm)) = (self.guest.take(), &mut self.vm) {
            vm.end(guest.agent.link());
        }
        if let Some(link) = self.link.take() {
            link.abort();
        }
    }

    pub(super) fn wakeup(&self) -> Option<Instant> {
        self.next_look().into_iter().chain(self.next_build()).min()
    }

    fn next_look(&self) -> Option<Instant> {
        match self.idle_since {
            Some(since) => Some(since + self.idle_limit()),
            None if self.state == SandboxState::Stopped => Some(Instant::now() + ORPHAN_INTERVAL),
            None => None,
        }
    }

    fn idle_limit(&self) -> Duration {
        if self.identity.run_dir.path().exists() { IDLE_LIMIT } else { UNREACHABLE_LIMIT }
    }

    pub(super) fn look_around(&mut self) {
        let idle = self.idle_since.is_some_and(|since| since.elapsed() >= self.idle_limit());
        // `shim delete` removes the directory: containerd has forgotten us.
        let orphaned = self.state == SandboxState::Stopped && !self.identity.run_dir.path().exists();
        if idle || orphaned {
            info!(idle, orphaned, "nobody needs this shim any more");
            self.done = true;
        }
    }
}
