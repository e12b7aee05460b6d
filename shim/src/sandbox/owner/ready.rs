//! Readiness, as the owner sees it.

use super::{Container, Owner, SandboxState};
use crate::{
    errors::Error,
    sandbox::{
        Reply,
        process::Phase,
        ready::{Readiness, SandboxReadiness},
    },
    state::now_ns,
};

impl Owner {
    /// Container `id` runs now: it is ready, or its probe begins.
    pub(super) fn watch_ready(&mut self, id: &str) {
        if let (Some(container), Some(guest)) = (self.containers.get_mut(id), self.guest.clone()) {
            container.ready.begin(guest, id.into(), self.owner.clone());
        }
    }

    /// What has come of the probe of container `id`, or why it is not ready.
    pub(super) fn probed(&mut self, id: &str, found: Result<(), String>) {
        if let Some(container) = self.containers.get_mut(id)
            && container.init.phase == Phase::Running
        {
            container.ready.state = match found {
                Ok(()) => Readiness::Since(now_ns()),
                Err(reason) => Readiness::Waiting(reason),
            };
        }
    }

    /// Answers those who wait for the sandbox to be ready, if it is, or never will be.
    pub(super) fn answer_ready(&mut self) {
        // Most have a time limit, and are gone by then.
        self.waiting_ready.retain(|reply| !reply.is_closed());
        if self.waiting_ready.is_empty() || matches!(self.readiness(), Ok(SandboxReadiness::Waiting(_))) {
            return;
        }
        for reply in std::mem::take(&mut self.waiting_ready) {
            drop(reply.send(self.readiness()));
        }
    }

    /// Whether every container is ready. An error if that cannot come any more: the main container has
    /// exited, or another one before it was ready. One of a pod that was ready and has exited has done
    /// its work.
    pub(super) fn readiness(&self) -> Result<SandboxReadiness, Error> {
        match (self.state, self.containers.is_empty()) {
            (SandboxState::Creating, true) => {
                return Ok(SandboxReadiness::Waiting("it has no container yet".into()));
            }
            (SandboxState::Stopping, _) | (_, true) => {
                return Err(self.wrong_state("it has no container that could become ready"));
            }
            _ => {}
        }
        let mut waits_for = None;
        for (id, container) in &self.containers {
            let waiting = match &container.ready.state {
                Readiness::Since(_) => None,
                Readiness::Waiting(reason) => Some(reason),
            };
            if let Some(exit) = container.init.exit()
                && (waiting.is_some() || self.is_main(id))
            {
                return Err(Error::NotReady { id: id.clone(), status: exit.status });
            }
            if let Some(reason) = waiting {
                waits_for.get_or_insert_with(|| self.describe(id, container, reason));
            }
        }
        Ok(waits_for.map_or(SandboxReadiness::Ready, SandboxReadiness::Waiting))
    }

    fn describe(&self, id: &str, container: &Container, reason: &str) -> String {
        match &container.ready.probe {
            _ if self.state.is_pause() => "the sandbox is paused".into(),
            _ if self.check_motion(id).is_err() => format!("container {id:?} is paused"),
            Some(probe) => format!("container {id:?}, {probe}: {reason}"),
            None => format!("container {id:?}: {reason}"),
        }
    }

    /// To be answered when the sandbox is ready, or cannot become so.
    pub(super) fn when_ready(&mut self, reply: Reply<SandboxReadiness>) {
        self.waiting_ready.push(reply);
    }
}
