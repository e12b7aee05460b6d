//! Kill and Delete, as the owner sees them.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::{
    Message, Owner, SandboxState, answer_later, gone, init_of, not_found, status::refused, wrong_phase,
};
use crate::{
    errors::{Error, chain},
    events::TaskEvent,
    sandbox::{
        Deleted, KillRequest, ProcessId, Reply,
        job::{self, Guest, Removal, Report},
        pause,
        process::{Exit, Phase},
        suspend,
    },
    stdio::ProcessIo,
};

/// How long after SIGKILL the guest may take to tell the exit of the sandbox's main process.
const EXIT_LIMIT: Duration = Duration::from_secs(10);

impl Owner {
    pub(super) fn kill(&mut self, request: KillRequest, reply: Reply<()>) {
        let id = &request.process;
        if request.signal == libc::SIGKILL as u32
            && let Some(abort) = self.containers.get_mut(&id.container).and_then(|c| c.abort.take())
        {
            // The creation fails with it.
            let _ = abort.send(());
            drop(reply.send(Ok(())));
            return;
        }
        if self.known(id).is_ok_and(|process| process.is_held()) {
            return self.kill_held(request, reply);
        }
        let last_resort = id.is_init() && self.is_main(&id.container);
        let sigkill = request.signal == libc::SIGKILL as u32;
        let alive = self.known(id).and_then(|process| match process.exit() {
            Some(_) => Err(gone(id)),
            None => Ok(()),
        });
        match alive.and_then(|()| self.guest_to_kill_in()) {
            Ok(_) if self.state.is_pause() && !(sigkill && last_resort) => {
                self.waiting_kills.push((request, reply));
            }
            Ok(guest) if self.has_deaf_guest() => {
                answer_later(reply, async move {
                    guest.machine.kill().await;
                    Ok(())
                });
            }
            Ok(guest) => {
                if let Ok(process) = self.known(id) {
                    process.signalled(request.signal);
                }
                if last_resort && sigkill {
                    self.expect_exit(request.process.clone());
                }
                answer_later(reply, job::kill(guest, request, last_resort));
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// The process has exited, and its exit waits for a reader. A signal that asks for its end is the end of
    /// that wait; no other does anything.
    fn kill_held(&mut self, request: KillRequest, reply: Reply<()>) {
        if let Ok(process) = self.known(&request.process) {
            process.signalled(request.signal);
        }
        let guest = self.guest.clone().filter(|_| request.all && !self.state.is_pause());
        answer_later(reply, async move {
            if let Some(guest) = guest {
                // What else may live in its container.
                if let Err(e) = job::kill(guest, request, false).await {
                    debug!("a signal to all of a container whose first process has exited: {}", chain(&e));
                }
            }
            Ok(())
        });
    }

    /// Whether it is known that no signal would reach the guest.
    fn has_deaf_guest(&self) -> bool {
        match self.state {
            SandboxState::Paused
            | SandboxState::Suspending
            | SandboxState::Suspended
            | SandboxState::RollingBack
            | SandboxState::Snapshotting => true,
            SandboxState::Resuming => self.disk.suspended.is_some(),
            _ => false,
        }
    }

    fn guest_to_kill_in(&self) -> Result<Guest, Error> {
        self.guest.clone().ok_or_else(|| self.wrong_state("its VM must be running"))
    }

    /// A guest that takes a SIGKILL and does not carry it out is as good as hung.
    fn expect_exit(&self, id: ProcessId) {
        let owner = self.owner.clone();
        tokio::spawn(async move {
            sleep(EXIT_LIMIT).await;
            // Fails only when the owner has ended, and the VM with it.
            let _ = owner.send(Message::KillOverdue(id)).await;
        });
    }

    pub(super) fn is_main(&self, id: &str) -> bool {
        id == self.identity.id || self.containers.len() == 1
    }

    pub(super) fn delete(&mut self, id: ProcessId, reply: Reply<Deleted>) {
        let (phase, held) = match self.known(&id) {
            Ok(process) => (process.phase, process.is_held()),
            Err(e) => return drop(reply.send(Err(e))),
        };
        match phase {
            Phase::Stopped(_) | Phase::Created => {}
            // Another client was first. Refused, this one would leave its container behind.
            Phase::Deleting(exit) => {
                return self.joined_deletes.push((id, Deleted { pid: self.pid, exit }, reply));
            }
            // It has exited, and nobody waits for its reader any more.
            Phase::Running if held => {}
            Phase::Creating | Phase::Starting | Phase::Running => {
                let needed = "it must have exited to be deleted";
                return drop(reply.send(Err(wrong_phase(&id, phase, needed))));
            }
        }
        // A paused guest has output that the log has not: it goes on first.
        let still = matches!(self.state, SandboxState::Paused | SandboxState::Suspended);
        let paused = still && id.is_init() && self.is_main(&id.container);
        let way_back = self.way_back().filter(|_| self.state == SandboxState::Suspended);
        if self.state.is_pause() && !paused {
            // Refused, it would not come again: ctr and CRI delete an exec once, whatever the answer.
            return self.waiting_deletes.push((id, reply));
        }
        let Some(exit) = self.begin_delete(&id) else {
            return drop(reply.send(Err(not_found("container", &id.container))));
        };
        let deleted = Deleted { pid: self.pid, exit };
        let mut removal = self.removal(&id);
        self.serve_those_that_waited();
        let (host, run_dir) = (self.host.clone(), self.identity.run_dir.clone());
        let resume = self.guest.clone().filter(|_| paused);
        let timeline = self.disk.timeline;
        self.work(async move {
            if let Some(guest) = resume {
                let (resumed, has_vm) = match way_back {
                    None => (pause::resume(&guest, timeline).await, true),
                    Some((relaunch, memory)) => {
                        match suspend::from_disk(&guest, timeline, relaunch, &memory).await {
                            Ok(loaded) => (loaded.resumed, true),
                            Err(e) => (Err(e), false),
                        }
                    }
                };
                if let Err(e) = resumed {
                    warn!("deleting a paused sandbox that cannot be resumed: {}", chain(&e));
                }
                removal.guest = removal.guest.filter(|_| has_vm);
            }
            job::remove(removal, host, run_dir).await;
            Report::Deleted { process: id, deleted, reply }
        });
    }

    pub(super) fn begin_delete(&mut self, id: &ProcessId) -> Option<Exit> {
        let (exit, news) = self.known(id).ok()?.delete();
        if news {
            self.publish_exit(id, exit);
        }
        Some(exit)
    }

    /// Collects what goes with process `id`: an exec alone; a container with its execs; the main
    /// container with every member of its pod, for containerd 2 deletes none of them by itself.
    pub(super) fn removal(&mut self, id: &ProcessId) -> Removal {
        let guest = self.guest.clone();
        if !id.is_init() {
            let io = self.take_io(id);
            return Removal {
                processes: vec![(id.clone(), io)],
                containers: Vec::new(),
                guest,
                sandbox: None,
            };
        }
        let everything = self.is_main(&id.container);
        let containers: Vec<String> = if everything {
            self.state = SandboxState::Stopping;
            self.containers.keys().cloned().collect()
        } else {
            vec![id.container.clone()]
        };
        let mut processes = Vec::new();
        for container in &containers {
            for process in self.process_ids(container) {
                if process != *id {
                    self.begin_delete(&process);
                }
                let io = self.take_io(&process);
                processes.push((process, io));
            }
        }
        let sandbox = everything.then(|| self.disk.cgroup.clone());
        Removal { processes, containers, guest, sandbox }
    }

    fn take_io(&mut self, id: &ProcessId) -> Option<ProcessIo> {
        let io = self.known(id).ok()?.io.take()?;
        self.refused = self.refused.saturating_add(refused(&io.status()));
        Some(io)
    }

    /// Every process of a container, init last.
    pub(super) fn process_ids(&self, container: &str) -> Vec<ProcessId> {
        let execs = self.containers.get(container).into_iter().flat_map(|c| c.execs.keys());
        let exec = |exec: &String| ProcessId { container: container.into(), exec: exec.clone() };
        execs.map(exec).chain([init_of(container)]).collect()
    }

    pub(super) fn deleted(&mut self, id: &ProcessId, deleted: Deleted) {
        if !id.is_init() {
            if let Some(container) = self.containers.get_mut(&id.container) {
                container.execs.remove(&id.exec);
            }
            return;
        }
        let gone: Vec<String> = match self.state {
            SandboxState::Stopping => self.containers.keys().cloned().collect(),
            _ => vec![id.container.clone()],
        };
        for container in gone {
            let exit = self.known(&init_of(&container)).ok().and_then(|init| init.exit());
            let Exit { status, at_ns } = exit.unwrap_or(deleted.exit);
            self.forget_container(&container);
            self.publisher.publish(TaskEvent::delete(&container, deleted.pid, status, at_ns));
        }
        if self.state == SandboxState::Stopping {
            self.state = SandboxState::Stopped;
            self.end_of_guest();
        } else {
            self.save();
        }
    }

    /// Answers those who came while somebody else's Delete was under way that has ended now.
    pub(super) fn answer_joined_deletes(&mut self) {
        for (id, deleted, reply) in std::mem::take(&mut self.joined_deletes) {
            match self.known(&id) {
                Ok(_) => self.joined_deletes.push((id, deleted, reply)),
                Err(_) => drop(reply.send(Ok(deleted))),
            }
        }
    }

    pub(super) fn forget_container(&mut self, id: &str) {
        self.containers.remove(id);
        self.disk.containers.remove(id);
        if self.containers.is_empty() {
            self.idle_since = Some(Instant::now());
        }
    }
}
