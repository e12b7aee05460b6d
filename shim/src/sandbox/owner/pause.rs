//! Pause and Resume, as the owner sees them.

use cube_protocol::guest::QuiesceResponse;

use super::{Motion, Owner, SandboxState, Waiting, init_of, wrong_phase};
use crate::{
    errors::Error,
    events::TaskEvent,
    sandbox::{
        Reply,
        job::{Guest, Report},
        pause,
        process::Phase,
    },
};

impl Owner {
    pub(super) fn pause(&mut self, id: String, reply: Reply<()>) {
        match self.admit_pause(&id) {
            Ok(()) if !self.is_main(&id) => self.pause_member(id, reply),
            Ok(()) => {
                // What changes the sandbox is refused from now on. What is under way is awaited.
                self.state = SandboxState::Pausing;
                self.waiting = Some(Waiting::Pause(id, reply));
                self.begin_waiting();
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// Begins what was asked for, once nothing else is under way.
    pub(super) fn begin_waiting(&mut self) {
        if self.working > 0 {
            return;
        }
        let Some(waiting) = self.waiting.take() else { return };
        let guest = self.guest.clone().filter(|_| self.state.is_pause());
        match (waiting, guest) {
            (Waiting::Pause(id, reply), Some(guest)) => {
                let timeline = self.disk.timeline;
                self.later(async move {
                    let result = pause::pause(&guest, timeline).await;
                    Report::Paused { id, result, reply }
                });
            }
            (Waiting::Suspend { id, paused, reply }, Some(guest)) => {
                self.write_to_disk(guest, id, paused, reply);
            }
            (Waiting::Rollback { snapshot, id, paused, reply }, Some(guest)) => {
                self.replace(guest, snapshot, id, paused, reply);
            }
            (Waiting::Snapshot(request, reply), Some(guest)) => self.take_snapshot(guest, request, reply),
            (
                Waiting::Pause(_, reply) | Waiting::Suspend { reply, .. } | Waiting::Rollback { reply, .. },
                None,
            ) => drop(reply.send(Err(self.ended_meanwhile()))),
            (Waiting::Snapshot(_, reply), None) => drop(reply.send(Err(self.ended_meanwhile()))),
        }
    }

    pub(super) fn ended_meanwhile(&self) -> Error {
        self.wrong_state("its VM has ended meanwhile")
    }

    fn admit_pause(&mut self, id: &str) -> Result<(), Error> {
        let init = init_of(id);
        self.guest_of(&init)?;
        let phase = self.known(&init)?.phase;
        if phase != Phase::Running {
            return Err(wrong_phase(&init, phase, "only a running container can be paused"));
        }
        // One that is left of its pod may be so by itself.
        self.check_motion(id)
    }

    /// Checks that what is asked for container `id` can be done to its whole sandbox.
    pub(super) fn whole(&self, id: &str, what: &str) -> Result<(), Error> {
        if self.is_main(id) {
            return Ok(());
        }
        let hint = ": it can be done to the whole pod, by the id of its sandbox";
        Err(Error::Unimplemented { what: format!("{what} a single member of a pod"), hint })
    }

    pub(super) fn paused(
        &mut self,
        id: &str,
        result: Result<QuiesceResponse, pause::Failed>,
    ) -> Result<(), Error> {
        let (state, result) = match result {
            Ok(rest) => {
                self.rest = Some(rest);
                (SandboxState::Paused, Ok(()))
            }
            Err(pause::Failed { error, runs: true }) => (SandboxState::Running, Err(error)),
            Err(pause::Failed { error, runs: false }) => {
                self.rest.get_or_insert_default();
                (SandboxState::Paused, Err(error))
            }
        };
        self.settle(SandboxState::Pausing, state, result, Some(TaskEvent::paused(id)))
    }

    pub(super) fn resume(&mut self, id: String, reply: Reply<()>) {
        if self.state == SandboxState::Suspended {
            return self.load(id, reply);
        }
        if self.state == SandboxState::Running && self.motion(&id) == Motion::Paused {
            return self.resume_member(id, reply);
        }
        let guest = match self.admit_resume(&id) {
            Ok(guest) => guest,
            Err(e) => return drop(reply.send(Err(e))),
        };
        self.state = SandboxState::Resuming;
        let timeline = self.disk.timeline;
        self.later(async move {
            let result = pause::resume(&guest, timeline).await;
            Report::Resumed { id, result, reply }
        });
    }

    fn admit_resume(&mut self, id: &str) -> Result<Guest, Error> {
        let phase = self.known(&init_of(id))?.phase;
        match (self.state, &self.guest) {
            (SandboxState::Paused, Some(guest)) if self.is_main(id) => Ok(guest.clone()),
            (SandboxState::Paused, Some(_)) => {
                Err(self
                    .wrong_state("a member cannot be resumed before the whole pod, by the id of its sandbox"))
            }
            (SandboxState::Running, Some(_)) if !self.is_main(id) => {
                self.check_motion(id)?;
                Err(wrong_phase(&init_of(id), phase, "only a paused container can be resumed"))
            }
            _ => Err(self.wrong_state("only a paused sandbox can be resumed")),
        }
    }

    pub(super) fn resumed(&mut self, id: &str, result: Result<(), Error>) -> Result<(), Error> {
        let state = if result.is_ok() { SandboxState::Running } else { SandboxState::Paused };
        if result.is_ok() {
            self.rest = None;
        }
        self.settle(SandboxState::Resuming, state, result, Some(TaskEvent::resumed(id)))
    }

    /// Ends a transition; `event` says that it has succeeded. If the VM has ended meanwhile, that has been
    /// told already.
    pub(super) fn settle(
        &mut self,
        from: SandboxState,
        to: SandboxState,
        result: Result<(), Error>,
        event: Option<TaskEvent>,
    ) -> Result<(), Error> {
        if self.state == from {
            self.state = to;
            if let (Ok(()), Some(event)) = (&result, event) {
                self.publisher.publish(event);
            }
        } else if result.is_ok() {
            return Err(self.ended_meanwhile());
        }
        self.serve_those_that_waited();
        result
    }

    /// Carries out what came during a pause, as far as it has to wait no longer.
    pub(super) fn serve_those_that_waited(&mut self) {
        if !self.state.is_pause() {
            for (process, reply) in std::mem::take(&mut self.waiting_starts) {
                self.start(process, reply);
            }
            for (request, reply) in std::mem::take(&mut self.waiting_kills) {
                self.kill(request, reply);
            }
        }
        for (process, reply) in std::mem::take(&mut self.waiting_deletes) {
            self.delete(process, reply);
        }
    }
}
