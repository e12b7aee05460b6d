//! Snapshots of template builds, which wait until the sandbox is ready.

use std::time::Duration;

use tokio::time::Instant;

use super::{Owner, SandboxState};
use crate::{
    errors::Error,
    sandbox::{Reply, SnapshotRequest, ready::SandboxReadiness},
    snapshot::{Listed, Template},
};

/// How long a snapshot waits for its template to be ready. What is built may have to fetch and compile
/// before it serves; what takes longer is waited for with `cubecli cubebox wait --ready`.
const READY_LIMIT: Duration = Duration::from_secs(600);

/// A snapshot that waits. Nothing is frozen meanwhile, and nothing refused.
pub(super) struct Waiting {
    template: String,
    request: SnapshotRequest,
    reply: Reply<Listed>,
    deadline: Instant,
}

impl Owner {
    /// The template that this sandbox is built for.
    pub(super) fn template(&self) -> Option<&Template> {
        self.containers.values().find_map(|container| container.template.as_ref())
    }

    /// Takes the snapshot, or has it wait. A paused sandbox never becomes ready: containerd's client, which
    /// pauses before it checkpoints, would wait in vain.
    pub(super) fn snapshot_build(&mut self, id: String, request: SnapshotRequest, reply: Reply<Listed>) {
        match self.readiness() {
            Ok(SandboxReadiness::Ready) => self.begin_snapshot(request, reply),
            Ok(SandboxReadiness::Waiting(_)) if self.state == SandboxState::Paused => {
                let waits_for = "it is paused, and must be resumed to become ready: wait for it with \
                                 `cubecli cubebox wait --ready`"
                    .into();
                drop(reply.send(Err(Error::TemplateNotReady { id, after: String::new(), waits_for })));
            }
            Ok(SandboxReadiness::Waiting(_)) => {
                let deadline = Instant::now() + READY_LIMIT;
                self.waiting_builds.push(Waiting { template: id, request, reply, deadline });
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// When the next of them has waited long enough.
    pub(super) fn next_build(&self) -> Option<Instant> {
        // One whose time is up, and that is still here, waits for the end of a pause.
        let now = Instant::now();
        self.waiting_builds.iter().map(|build| build.deadline).filter(|deadline| *deadline > now).min()
    }

    /// Goes on with the snapshots that wait, as far as something has come of it.
    pub(super) fn look_at_builds(&mut self) {
        for build in std::mem::take(&mut self.waiting_builds) {
            // Whoever asked may have gone away.
            if !build.reply.is_closed() {
                self.look_at(build);
            }
        }
    }

    fn look_at(&mut self, build: Waiting) {
        let Waiting { template: id, request, reply, deadline } = build;
        match self.readiness() {
            Err(e) => drop(reply.send(Err(e))),
            Ok(SandboxReadiness::Ready)
                if matches!(self.state, SandboxState::Running | SandboxState::Paused) =>
            {
                self.begin_snapshot(request, reply);
            }
            Ok(SandboxReadiness::Waiting(waits_for)) if Instant::now() >= deadline => {
                let after = format!(" after {READY_LIMIT:?}");
                drop(reply.send(Err(Error::TemplateNotReady { id, after, waits_for })));
            }
            // Also if it is ready, and just being paused, resumed or snapshotted: that has an end.
            Ok(_) => self.waiting_builds.push(Waiting { template: id, request, reply, deadline }),
        }
    }
}
