//! Pause and Resume, as the owner sees them.

use super::{Owner, SandboxState, init_of, wrong_phase};
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
            Ok(()) => {
                // What changes the sandbox is refused from now on. What is under way is awaited.
                self.state = SandboxState::Pausing;
                self.waiting_pause = Some((id, reply));
                self.begin_pause();
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// Begins the pause that was asked for, once nothing else is under way.
    pub(super) fn begin_pause(&mut self) {
        if self.working > 0 {
            return;
        }
        let Some((id, reply)) = self.waiting_pause.take() else { return };
        let (SandboxState::Pausing, Some(guest)) = (self.state, self.guest.clone()) else {
            return drop(reply.send(Err(self.wrong_state("its VM has ended meanwhile"))));
        };
        let timeline = self.disk.timeline;
        self.later(async move {
            let result = pause::pause(&guest, timeline).await;
            Report::Paused { id, result, reply }
        });
    }

    fn admit_pause(&mut self, id: &str) -> Result<(), Error> {
        let init = init_of(id);
        self.guest_of(&init)?;
        let phase = self.known(&init)?.phase;
        if phase != Phase::Running {
            return Err(wrong_phase(&init, phase, "only a running container can be paused"));
        }
        self.whole(id, "pausing")
    }

    /// Checks that what is asked for container `id` can be done to its whole sandbox.
    fn whole(&self, id: &str, what: &str) -> Result<(), Error> {
        if self.is_main(id) {
            return Ok(());
        }
        let hint = ": it can be done to the whole pod, by the id of its sandbox";
        Err(Error::Unimplemented { what: format!("{what} a single member of a pod"), hint })
    }

    pub(super) fn paused(&mut self, id: &str, result: Result<(), pause::Failed>) -> Result<(), Error> {
        let (state, result) = match result {
            Ok(()) => (SandboxState::Paused, Ok(())),
            Err(pause::Failed { error, runs: true }) => (SandboxState::Running, Err(error)),
            Err(pause::Failed { error, runs: false }) => (SandboxState::Paused, Err(error)),
        };
        self.settle(SandboxState::Pausing, state, result, TaskEvent::paused(id))
    }

    pub(super) fn resume(&mut self, id: String, reply: Reply<()>) {
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
        self.known(&init_of(id))?;
        match (self.state, &self.guest) {
            (SandboxState::Paused, Some(guest)) => {
                self.whole(id, "resuming")?;
                Ok(guest.clone())
            }
            _ => Err(self.wrong_state("only a paused sandbox can be resumed")),
        }
    }

    pub(super) fn resumed(&mut self, id: &str, result: Result<(), Error>) -> Result<(), Error> {
        let state = if result.is_ok() { SandboxState::Running } else { SandboxState::Paused };
        self.settle(SandboxState::Resuming, state, result, TaskEvent::resumed(id))
    }

    /// Ends a transition. If the VM has ended meanwhile, that has been told already.
    fn settle(
        &mut self,
        from: SandboxState,
        to: SandboxState,
        result: Result<(), Error>,
        event: TaskEvent,
    ) -> Result<(), Error> {
        if self.state == from {
            self.state = to;
            if result.is_ok() {
                self.publisher.publish(event);
            }
        } else if result.is_ok() {
            return Err(self.wrong_state("its VM has ended meanwhile"));
        }
        self.kill_those_that_waited();
        result
    }

    /// Carries out the kills that came during a pause, if it is over.
    pub(super) fn kill_those_that_waited(&mut self) {
        if !self.state.is_pause() {
            for (request, reply) in std::mem::take(&mut self.waiting_kills) {
                self.kill(request, reply);
            }
        }
    }
}
