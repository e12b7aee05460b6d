//! Pausing one member of a pod: its cgroup is frozen, and the VM runs on.
//!
//! A signal reaches a member that is paused when it is resumed, as the kernel has it; SIGKILL at once. A
//! pause of the whole pod is on top of it, and its resume leaves the member paused.

use super::{Owner, init_of, wrong_phase};
use crate::{
    errors::Error,
    events::TaskEvent,
    sandbox::{
        ProcessId, Reply, Status,
        job::{self, Report},
        process::Phase,
    },
};

/// Whether a container runs, apart from its sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Motion {
    #[default]
    Running,
    /// A job is freezing it.
    Pausing,
    Paused,
    /// A job is letting it go on.
    Resuming,
}

impl Motion {
    /// For sentences, and programs.
    pub(super) fn name(self) -> &'static str {
        match self {
            Motion::Running => "running",
            Motion::Pausing => "being paused",
            Motion::Paused => "paused",
            Motion::Resuming => "being resumed",
        }
    }

    /// Of a process of the container that would run.
    pub(super) fn status(self) -> Status {
        match self {
            Motion::Running => Status::Running,
            Motion::Pausing => Status::Pausing,
            Motion::Paused | Motion::Resuming => Status::Paused,
        }
    }
}

impl Owner {
    /// How it is with container `id`; running if there is none.
    pub(super) fn motion(&self, id: &str) -> Motion {
        self.containers.get(id).map(|container| container.motion).unwrap_or_default()
    }

    /// Checks that no process of container `id` is kept from running by itself.
    pub(super) fn check_motion(&self, id: &str) -> Result<(), Error> {
        match self.motion(id) {
            Motion::Running => Ok(()),
            motion => Err(wrong_motion(id, motion, "it must be resumed first")),
        }
    }

    pub(super) fn pause_member(&mut self, id: String, reply: Reply<()>) {
        let init = init_of(&id);
        let guest = self.check_motion(&id).and_then(|()| self.guest_of(&init));
        match guest {
            Ok(guest) => {
                self.set_motion(&id, Motion::Pausing);
                self.work(async move {
                    let result = job::pause(guest, id.clone()).await;
                    Report::MemberPaused { id, result, reply }
                });
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    pub(super) fn resume_member(&mut self, id: String, reply: Reply<()>) {
        let init = init_of(&id);
        let guest = self.guest_of(&init).and_then(|guest| match self.known(&init)?.phase {
            Phase::Running => Ok(guest),
            phase => Err(wrong_phase(&init, phase, "only a paused container can be resumed")),
        });
        match guest {
            Ok(guest) => {
                self.set_motion(&id, Motion::Resuming);
                self.work(async move {
                    let result = job::resume(guest, id.clone()).await;
                    Report::MemberResumed { id, result, reply }
                });
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    pub(super) fn member_paused(&mut self, id: &str, result: Result<(), Error>) -> Result<(), Error> {
        let to = if result.is_ok() { Motion::Paused } else { Motion::Running };
        self.settle_member(id, to, result, TaskEvent::paused(id))
    }

    pub(super) fn member_resumed(&mut self, id: &str, result: Result<(), Error>) -> Result<(), Error> {
        let to = if result.is_ok() { Motion::Running } else { Motion::Paused };
        self.settle_member(id, to, result, TaskEvent::resumed(id))
    }

    /// Ends a transition. If the container has exited meanwhile, that has been told already.
    fn settle_member(
        &mut self,
        id: &str,
        to: Motion,
        result: Result<(), Error>,
        event: TaskEvent,
    ) -> Result<(), Error> {
        let init = init_of(id);
        let settled = self.known(&init).map(|process| process.phase).and_then(|phase| match phase {
            Phase::Running => {
                self.set_motion(id, to);
                result
            }
            phase => result.and(Err(wrong_phase(&init, phase, "it has ended meanwhile"))),
        });
        if settled.is_ok() {
            self.publisher.publish(event);
        }
        self.serve_those_that_waited();
        settled
    }

    /// Container `id` has exited: nothing of it waits for a resume any more.
    pub(super) fn forget_motion(&mut self, id: &str) {
        self.set_motion(id, Motion::Running);
        self.serve_those_that_waited();
    }

    fn set_motion(&mut self, id: &str, motion: Motion) {
        if let Some(container) = self.containers.get_mut(id) {
            container.motion = motion;
        }
    }

    /// Whether Start of the exec `id` has to wait for the end of a pause, of the sandbox or of its container.
    pub(super) fn must_wait(&mut self, id: &ProcessId) -> bool {
        let at_rest = self.state.is_pause() || self.check_motion(&id.container).is_err();
        at_rest && !id.is_init() && self.known(id).is_ok_and(|process| process.phase == Phase::Created)
    }
}

fn wrong_motion(id: &str, motion: Motion, needed: &'static str) -> Error {
    Error::State { what: "container", id: id.into(), state: motion.name(), needed }
}
