//! Rollback, as the owner sees it.

use super::{Owner, SandboxState, Waiting, init_of, wrong_phase};
use crate::{
    errors::Error,
    events::TaskEvent,
    sandbox::{
        Exit, ProcessId, Reply,
        job::{Guest, Report},
        pause,
        process::Phase,
        restore,
        rollback::{self, Known, Replaced, Subject, Unreplaced},
    },
    snapshot::Suspended,
    state::PastTimeline,
    stdio::ProcessIo,
};

impl Owner {
    pub(super) fn rollback(&mut self, snapshot: String, reply: Reply<()>) {
        let id = self.main_id();
        match self.admit_rollback(&id) {
            Ok(paused) => {
                // What changes the sandbox is refused from now on. What is under way is awaited.
                self.state = SandboxState::RollingBack;
                self.waiting = Some(Waiting::Rollback { snapshot, id, paused, reply });
                self.begin_waiting();
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// Tells whether it is paused.
    fn admit_rollback(&mut self, id: &str) -> Result<bool, Error> {
        let init = init_of(id);
        let phase = self.known(&init)?.phase;
        let paused = match self.state {
            SandboxState::Running => false,
            SandboxState::Paused => true,
            SandboxState::Suspended => {
                return Err(self.wrong_state("it must be resumed first, and may then be rolled back"));
            }
            _ => return Err(self.wrong_state("it must be running or paused to be rolled back")),
        };
        match phase {
            Phase::Running => Ok(paused),
            _ => Err(wrong_phase(&init, phase, "only a running container can be rolled back")),
        }
    }

    pub(super) fn replace(
        &mut self,
        guest: Guest,
        snapshot: String,
        id: String,
        paused: bool,
        reply: Reply<()>,
    ) {
        let memory = Suspended::new(&self.config.snapshot.dir, &self.identity.run_dir);
        self.disk.suspended = Some(memory.path().into());
        let saved = self.identity.run_dir.save(&self.disk).map_err(Error::from);
        let relaunch = self.way_back().map(|(relaunch, _)| relaunch).ok_or_else(|| self.ended_meanwhile());
        let relaunch = match saved.and(relaunch) {
            Ok(relaunch) => relaunch,
            Err(e) => {
                self.disk.suspended = None;
                self.state = if paused { SandboxState::Paused } else { SandboxState::Running };
                drop(reply.send(Err(e)));
                return self.serve_those_that_waited();
            }
        };
        let restored = self.containers.get(&id).and_then(|container| container.restored.clone());
        let subject = Subject {
            guest,
            namespace: self.identity.namespace.clone(),
            timeline: self.disk.timeline,
            past: self.disk.past_timelines.clone(),
            paused,
            snapshot,
            processes: self.lend_processes(),
            relaunch,
            memory,
            run_dir: self.identity.run_dir.clone(),
            restored,
        };
        self.later(async move {
            let result = rollback::replace(subject).await;
            Report::Replaced { id, paused, result, reply }
        });
    }

    /// Every process, with its stdio, which the job gives back.
    fn lend_processes(&mut self) -> Vec<Known> {
        let containers: Vec<String> = self.containers.keys().cloned().collect();
        let ids: Vec<ProcessId> = containers.iter().flat_map(|id| self.process_ids(id)).collect();
        let lend = |id: ProcessId| {
            let process = self.known(&id).ok()?;
            let started = !matches!(process.phase, Phase::Created);
            let (exited, guest_pid) = (process.is_over(), process.guest_pid);
            Some(Known { started, exited, guest_pid, io: process.io.take(), id })
        };
        ids.into_iter().filter_map(lend).collect()
    }

    fn give_back(&mut self, id: &ProcessId, io: Option<ProcessIo>) {
        let closed = self.waiting_closes.contains(id);
        let Ok(process) = self.known(id) else { return };
        if let Some(io) = &io {
            if process.is_over() {
                io.process_exited();
            }
            if closed {
                io.close_stdin();
            }
        }
        process.io = io;
    }

    /// The VM is another one, or not: then everything is as it was, or has ended.
    pub(super) fn replaced(
        &mut self,
        id: String,
        paused: bool,
        result: Result<Replaced, Box<Unreplaced>>,
        reply: Reply<()>,
    ) {
        match result {
            Ok(replaced) => self.go_on_with(replaced, id, paused, reply),
            Err(unreplaced) => drop(reply.send(self.not_replaced(*unreplaced))),
        }
    }

    fn not_replaced(&mut self, unreplaced: Unreplaced) -> Result<(), Error> {
        let Unreplaced { failed: pause::Failed { error, runs }, processes } = unreplaced;
        for Known { id, io, .. } in processes {
            self.give_back(&id, io);
        }
        self.waiting_closes.clear();
        if self.state == SandboxState::RollingBack {
            self.disk.suspended = None;
            self.save();
            if !runs {
                self.rest.get_or_insert_default();
            }
            self.state = if runs { SandboxState::Running } else { SandboxState::Paused };
        }
        for event in std::mem::take(&mut self.held_events) {
            self.guest_event(event);
        }
        self.serve_those_that_waited();
        Err(error)
    }

    /// Notes the new timeline before anything can happen on it.
    fn go_on_with(&mut self, replaced: Replaced, id: String, paused: bool, reply: Reply<()>) {
        let Replaced { pid, disks, restored, go_on } = replaced;
        let kept: Vec<ProcessId> = go_on.iter().map(|(id, _)| id.clone()).collect();
        for (id, io) in go_on {
            self.give_back(&id, io);
        }
        self.waiting_closes.clear();
        // Of the timeline that is no more; those of the next are not asked for yet.
        self.held_events.clear();
        while self.guest_events.try_recv().is_ok() {}
        let Some(guest) = self.guest.clone().filter(|_| self.state == SandboxState::RollingBack) else {
            self.discard_memory();
            self.serve_those_that_waited();
            return drop(reply.send(Err(self.ended_meanwhile())));
        };
        let past = PastTimeline { timeline: self.disk.timeline, until_ns: None };
        if !self.disk.past_timelines.contains(&past) {
            self.disk.past_timelines.push(past);
        }
        self.disk.timeline = restored.timeline;
        self.disk.suspended = None;
        self.disks = disks;
        if let Some(vm) = &mut self.vm {
            vm.timeline = restored.timeline;
        }
        self.moved_to(pid);
        self.end_all_but(&kept);
        let restored = std::sync::Arc::new(restored);
        if let Some(container) = self.containers.get_mut(&id) {
            container.restored = Some(restored.clone());
        }
        self.later(async move {
            let result = restore::start(&guest, id.clone(), &restored).await;
            if result.is_err() {
                guest.machine.kill().await;
            }
            Report::RolledBack { id, paused, result, reply }
        });
    }

    /// What the snapshot does not have has ended with the VM.
    fn end_all_but(&mut self, kept: &[ProcessId]) {
        let containers: Vec<String> = self.containers.keys().cloned().collect();
        let ids: Vec<ProcessId> = containers.iter().flat_map(|id| self.process_ids(id)).collect();
        for id in ids.into_iter().filter(|id| !kept.contains(id)) {
            self.process_exited(&id, Exit::killed());
        }
    }

    pub(super) fn rolled_back(
        &mut self,
        id: &str,
        paused: bool,
        result: Result<(), Error>,
    ) -> Result<(), Error> {
        let runs = result.is_ok() && self.state == SandboxState::RollingBack;
        if runs {
            self.rest = None;
        }
        // containerd knows it as running already, unless it was paused.
        let event = paused.then(|| TaskEvent::resumed(id));
        // After a failure its end is told already.
        let state = if runs { SandboxState::Running } else { self.state };
        let result = self.settle(SandboxState::RollingBack, state, result, event);
        if runs {
            let containers: Vec<String> = self.containers.keys().cloned().collect();
            containers.iter().for_each(|id| self.watch_ready(id));
        }
        result
    }
}
