//! Create, as the owner sees it.

use std::{collections::HashMap, path::Path, sync::Arc};

use containerd_shim_protos::{events::task as message, protobuf::MessageField};
use cube_protocol::annotations::{SNAPSHOT_RESTORE, TEMPLATE_ID};
use tokio::sync::oneshot;

use super::{Container, Motion, Owner, SandboxState, init_of, not_found};
use crate::{
    annotations::{self, AnnotationError},
    errors::Error,
    events::TaskEvent,
    sandbox::{
        Placed, Plan, Reply, VmStatus,
        create::{Booted, Created, Creation},
        job::Report,
        process::{Phase, Process, Stdio},
        ready::Ready,
        spec::{self, Pod},
    },
    snapshot::Template,
    state::{ContainerState, now_ns},
    stdio::LogConfig,
    tenant::Tenant,
};

impl Owner {
    pub(super) fn create(&mut self, plan: Plan, reply: Reply<u32>) {
        let id = plan.request.id.clone();
        match self.admit(plan) {
            Ok((creation, aborted)) => self.work(async move {
                let result = creation.run(aborted).await;
                Report::Created { id, result, reply }
            }),
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// Checks whether the container may be created now, and notes it in memory and on disk: nothing
    /// is made before the state file knows of it.
    pub(super) fn admit(&mut self, mut plan: Plan) -> Result<(Creation, oneshot::Receiver<()>), Error> {
        let tenant = self.permit(&mut plan)?;
        let id = &plan.request.id;
        if self.containers.contains_key(id) {
            return Err(Error::AlreadyExists { what: "container", id: id.clone() });
        }
        self.check_template(&plan)?;
        let joins = match (self.state, &self.guest) {
            (SandboxState::Creating, _) if self.containers.is_empty() => None,
            (SandboxState::Running, Some(guest)) => Some((guest.clone(), self.pod())),
            _ => return Err(self.wrong_state("it must be running or new to take a container")),
        };
        if joins.is_none() {
            let path = spec::cgroups_path(&plan.spec)?;
            let Placed { cgroup, shim_home } = self.host.cgroup(self.identity.run_dir.key(), path)?;
            (self.disk.cgroup, self.disk.shim_home) = (cgroup, shim_home);
            self.identity.run_dir.create()?;
            self.disk.user = self.host.claim_user(&self.config, &self.identity.run_dir)?;
        }
        let log = self.log_config(&plan);
        let bundle = plan.request.bundle.clone();
        let log_dir = log.as_ref().map(|log| log.dir.clone());
        let on_disk =
            ContainerState { bundle: bundle.clone(), log_dir, created_ns: now_ns(), guest_id: None };
        self.disk.containers.insert(id.clone(), on_disk);
        if let Err(e) = self.identity.run_dir.create().and_then(|()| self.identity.run_dir.save(&self.disk)) {
            self.disk.containers.remove(id);
            return Err(e.into());
        }
        cube_fault::point("create.state_saved");
        let (abort, aborted) = oneshot::channel();
        let container = Container {
            bundle,
            rootfs: plan.request.rootfs.clone(),
            init: Process::new(plan.request.stdio.clone()),
            execs: HashMap::new(),
            early_execs: Vec::new(),
            stats: None,
            oom: None,
            ready: Ready::new(plan.annotations.ready.clone()),
            motion: Motion::default(),
            tenant: tenant.clone(),
            template: plan
                .annotations
                .template
                .as_deref()
                .map(|id| Template::of(id, &plan.spec, &plan.request.rootfs)),
            abort: Some(abort),
            restored: None,
        };
        self.containers.insert(id.clone(), container);
        self.idle_since = None;
        let creation = Creation {
            identity: self.identity.clone(),
            config: self.config.clone(),
            host: self.host.clone(),
            plan,
            tenant,
            most: None,
            log,
            state: self.disk.clone(),
            joins,
            owner: self.owner.clone(),
            events: self.events.clone(),
        };
        Ok((creation, aborted))
    }

    /// Whose the container is, if that may ask for what the plan says.
    fn permit(&self, plan: &mut Plan) -> Result<Tenant, Error> {
        let tenant = Tenant::of(&self.identity.namespace, &plan.spec);
        if tenant.is_pod() {
            let policy = &self.config.policy;
            let names = spec::annotations(&plan.spec)?.into_iter().map(|(name, _)| name);
            // A checkpoint that is restored names a snapshot just as the annotation does.
            let restore = plan.restore.as_ref().map(|_| SNAPSHOT_RESTORE);
            annotations::permit(names.chain(restore), policy)?;
            plan.annotations.clamp(policy);
        }
        Ok(tenant)
    }

    /// A template is what becomes of one container, and has its log.
    fn check_template(&self, plan: &Plan) -> Result<(), Error> {
        let builds = plan.annotations.template.is_some();
        let pod = spec::sandbox_id(&plan.spec).is_some() || !self.containers.is_empty();
        if pod && (builds || self.template().is_some()) {
            let hint = ": a template is built in a sandbox with a single container";
            return Err(Error::Unimplemented { what: format!("{TEMPLATE_ID} for a pod"), hint });
        }
        if builds && plan.request.stdio.terminal {
            return Err(AnnotationError::Template { other: "a terminal" }.into());
        }
        Ok(())
    }

    pub(super) fn pod(&self) -> Pod {
        let guest_pid =
            self.containers.get(&self.identity.id).map(|main| main.init.guest_pid).unwrap_or_default();
        Pod { reported_pid: self.pid, guest_pid }
    }

    pub(super) fn log_config(&self, plan: &Plan) -> Option<LogConfig> {
        if plan.request.stdio.terminal || !plan.annotations.log_forwarding {
            return None;
        }
        let log = &self.config.log;
        if !log.pods && spec::sandbox_id(&plan.spec).is_some() {
            return None;
        }
        let template = plan.annotations.template.as_deref();
        let dir = match template {
            Some(template) => log.template_dir.join(template),
            None if log.dir == Path::new("bundle") => plan.request.bundle.clone(),
            None => log.dir.join(&self.identity.namespace).join(&plan.request.id),
        };
        let (segment_bytes, segments) = (log.segment_bytes, log.segments);
        Some(LogConfig { dir, exclusive: template.is_some(), segment_bytes, segments })
    }

    pub(super) fn created(&mut self, id: &str, result: Result<Created, Error>) -> Result<u32, Error> {
        let Created { io, guest_pid, booted, restored } = match result {
            Ok(created) => created,
            Err(e) => {
                self.forget_container(id);
                if self.guest.is_none() {
                    self.state = SandboxState::Stopped;
                }
                return Err(e);
            }
        };
        if let Some(Booted { guest, pid, backend, reason, hello, link, disks, limited }) = booted {
            self.disks = disks;
            self.disk.vmm_pid = pid;
            self.disk.past_timelines.extend(restored.as_ref().and_then(|restored| restored.past));
            self.disk.timeline = restored.as_ref().map_or(hello.timeline, |restored| restored.timeline);
            if let (Some(alias), Some(container)) = (&guest.alias, self.disk.containers.get_mut(id)) {
                container.guest_id = Some(alias.1.clone());
            }
            self.disk.backend = backend.clone();
            self.vm = Some(VmStatus::new(backend, reason, pid, &hello, limited));
            (self.pid, self.guest, self.link) = (pid, Some(guest), Some(link));
            self.state = SandboxState::Running;
            self.save();
            cube_fault::point("create.pid_saved");
        }
        let pid = self.pid;
        let Some(container) = self.containers.get_mut(id) else { return Err(not_found("container", id)) };
        container.init.guest_pid = guest_pid;
        container.abort = None;
        container.init.io = Some(io);
        container.restored = restored.map(Arc::new);
        let Stdio { terminal, stdin, stdout, stderr } = container.init.stdio.clone();
        let stdio = message::TaskIO { stdin, stdout, stderr, terminal, ..Default::default() };
        self.publisher.publish(TaskEvent::create(&message::TaskCreate {
            container_id: id.into(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            rootfs: container.rootfs.clone(),
            io: MessageField::some(stdio),
            pid,
            ..Default::default()
        }));
        if let Some(exit) = container.init.settle(Phase::Created) {
            self.publish_exit(&init_of(id), exit);
        }
        Ok(pid)
    }
}
