//! Snapshot, as the owner sees it.

use cube_protocol::version;
use jiff::Timestamp;
use serde_json::Value;

use super::{Owner, SandboxState, Waiting, over};
use crate::{
    events::TaskEvent,
    sandbox::{
        Reply, SnapshotRequest,
        job::{Guest, Report},
        pause,
        process::Phase,
        snapshot::{self, Subject, Taken},
    },
    snapshot::{Container, Listed, Manifest, Origin, Store, WrittenBy},
    state::now_ns,
    tenant::Tenant,
};

impl Owner {
    pub(super) fn snapshot(&mut self, request: SnapshotRequest, reply: Reply<Listed>) {
        if let Some(id) = self.over() {
            return drop(reply.send(Err(over(id, "there is nothing to go on from"))));
        }
        match (self.state, &self.guest) {
            (SandboxState::Running | SandboxState::Paused, Some(_)) => match self.template() {
                Some(template) => self.snapshot_build(template.id.clone(), request, reply),
                None => self.begin_snapshot(request, reply),
            },
            (SandboxState::Suspended, _) => {
                drop(
                    reply
                        .send(Err(self.wrong_state("it must be resumed first, and may then be snapshotted"))),
                );
            }
            _ => drop(reply.send(Err(self.wrong_state("it must be running or paused for a snapshot")))),
        }
    }

    pub(super) fn begin_snapshot(&mut self, request: SnapshotRequest, reply: Reply<Listed>) {
        // What changes the sandbox is refused from now on. What is under way is awaited.
        self.state = SandboxState::Snapshotting;
        self.waiting = Some(Waiting::Snapshot(request, reply));
        self.begin_waiting();
    }

    pub(super) fn take_snapshot(&mut self, guest: Guest, request: SnapshotRequest, reply: Reply<Listed>) {
        let name = request.name.clone().unwrap_or_else(|| self.snapshot_name());
        let manifest = self.manifest(&guest, name);
        let subject = Subject {
            guest,
            bundles: self.running().map(|(_, container)| container.bundle.clone()).collect(),
            timeline: self.disk.timeline,
            paused: self.rest.clone(),
            disks: self.disks.clone(),
            manifest,
        };
        let store = Store::at(&self.config.snapshot.dir);
        self.later(async move {
            let result = snapshot::take(subject, store).await;
            Report::Snapshotted { request, result, reply }
        });
    }

    pub(super) fn snapshotted(
        &mut self,
        request: SnapshotRequest,
        result: Result<Taken, pause::Failed>,
        reply: Reply<Listed>,
    ) {
        let runs = match &result {
            Ok(_) => self.rest.is_none(),
            Err(failed) => failed.runs,
        };
        // If the VM has ended meanwhile, that has been told already.
        if self.state == SandboxState::Snapshotting {
            self.state = if runs { SandboxState::Running } else { SandboxState::Paused };
            if !runs {
                self.rest.get_or_insert_default();
            }
        }
        self.serve_those_that_waited();
        let taken = match result {
            Ok(taken) => taken,
            Err(failed) => return drop(reply.send(Err(failed.error))),
        };
        let publisher = self.publisher.clone();
        tokio::spawn(async move {
            let completed = snapshot::complete(taken, request.copy_to).await;
            if let (Ok(_), Some((id, path))) = (&completed, &request.checkpoint) {
                publisher.publish(TaskEvent::checkpointed(id, path));
            }
            drop(reply.send(completed));
        });
    }

    /// A container whose first process has exited, which containerd is not told yet.
    fn over(&self) -> Option<&str> {
        self.containers.iter().find(|(_, container)| container.init.is_held()).map(|(id, _)| id.as_str())
    }

    fn snapshot_name(&self) -> String {
        if let Some(template) = self.template() {
            return template.id.clone();
        }
        let time = Timestamp::now().strftime("%Y%m%d%H%M%S%3f").to_string();
        let id: String = self.identity.id.chars().take(50).collect();
        format!("{}-{time}", id.trim_end_matches(['.', '_', '-']))
    }

    fn running(&self) -> impl Iterator<Item = (&String, &super::Container)> {
        self.containers.iter().filter(|(_, container)| container.init.phase == Phase::Running)
    }

    /// Whose the sandbox is: that of its main container, or of any one if that is gone.
    fn tenant(&self) -> Option<Tenant> {
        let main = self.containers.get(&self.identity.id).or_else(|| self.containers.values().next());
        main.map(|container| container.tenant.clone())
    }

    fn manifest(&self, guest: &Guest, name: String) -> Manifest {
        let vm = self.vm.as_ref();
        Manifest {
            format: Manifest::FORMAT,
            name,
            created_ns: now_ns(),
            cubebox: env!("CARGO_PKG_VERSION").into(),
            agent: vm.map(|vm| vm.agent_version.clone()).unwrap_or_default(),
            protocol: vm.map_or(version::CURRENT, |vm| vm.agent_protocol).to_string(),
            // Those who write it tell.
            vmm: WrittenBy::default(),
            origin: Origin {
                namespace: self.identity.namespace.clone(),
                sandbox: self.identity.id.clone(),
                timeline: self.disk.timeline,
                backend: self.disk.backend.clone(),
            },
            owner: self.tenant(),
            template: self.template().cloned(),
            containers: self
                .running()
                .map(|(id, container)| Container {
                    id: guest.inside(id.clone()),
                    pid: container.init.guest_pid,
                    terminal: container.init.stdio.terminal,
                    execs: container.execs.keys().cloned().collect(),
                    spec: Value::Null,
                })
                .collect(),
            last_event: 0,
            streams: Vec::new(),
            disks: Vec::new(),
            files: Vec::new(),
        }
    }
}
