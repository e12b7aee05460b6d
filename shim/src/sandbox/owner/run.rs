//! Start and Exec, as the owner sees them.

use super::{Owner, init_of, not_found, over, wrong_phase};
use crate::{
    errors::Error,
    events::TaskEvent,
    sandbox::{
        ExecRequest, ProcessId, Reply,
        job::{self, Guest, Report},
        process::{Phase, Process},
        restore,
    },
    stdio::ProcessIo,
};

impl Owner {
    pub(super) fn start(&mut self, id: ProcessId, reply: Reply<u32>) {
        // Refused, it would hang its client: containerd's waits for the end of the FIFOs when a start has
        // failed, before it deletes the exec. Only who comes with a new exec is refused.
        if self.must_wait(&id) {
            return self.waiting_starts.push((id, reply));
        }
        let guest = self.guest_of(&id).and_then(|guest| {
            let process = self.known(&id)?;
            if process.phase != Phase::Created {
                return Err(wrong_phase(&id, process.phase, "only a created process can be started"));
            }
            process.phase = Phase::Starting;
            Ok(guest)
        });
        match guest {
            Ok(guest) => {
                let restored = self.containers.get(&id.container).and_then(|c| c.restored.clone());
                let restored = restored.filter(|_| id.is_init());
                let guest_pid = self.known(&id).map_or(0, |process| process.guest_pid);
                self.work(async move {
                    let result = match restored {
                        Some(restored) => {
                            let inside = id.container.clone();
                            restore::start(&guest, inside, &restored).await.map(|()| guest_pid)
                        }
                        None => job::start(guest, id.clone()).await,
                    };
                    Report::Started { process: id, result, reply }
                })
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    pub(super) fn started(&mut self, id: &ProcessId, result: Result<u32, Error>) -> Result<u32, Error> {
        let result = self.settle_start(id, result);
        if result.is_ok() && id.is_init() {
            self.watch_ready(&id.container);
        }
        let early = match self.containers.get_mut(&id.container) {
            Some(container) if id.is_init() => std::mem::take(&mut container.early_execs),
            _ => Vec::new(),
        };
        for (request, reply) in early {
            self.exec(request, reply);
        }
        result
    }

    fn settle_start(&mut self, id: &ProcessId, result: Result<u32, Error>) -> Result<u32, Error> {
        let pid = self.pid;
        let process = self.known(id)?;
        if process.phase != Phase::Starting {
            // The VM has ended meanwhile, which has been told already.
            return Err(wrong_phase(id, process.phase, "it ended before it was started"));
        }
        match &result {
            Ok(guest_pid) => {
                process.guest_pid = *guest_pid;
                let exit = process.run();
                self.publisher.publish(if id.is_init() {
                    TaskEvent::start(&id.container, pid)
                } else {
                    TaskEvent::exec_started(&id.container, &id.exec, pid)
                });
                if let Some(exit) = exit {
                    self.process_exiting(id.clone(), exit);
                }
            }
            Err(_) => {
                if let Some(exit) = process.settle(Phase::Created) {
                    self.publish_exit(id, exit);
                }
            }
        }
        result.map(|_| pid)
    }

    pub(super) fn exec(&mut self, request: ExecRequest, reply: Reply<()>) {
        let container = self.containers.get_mut(&request.process.container);
        if let Some(container) = container.filter(|container| container.init.phase == Phase::Starting) {
            return container.early_execs.push((request, reply));
        }
        match self.admit_exec(&request) {
            Ok(guest) => {
                let namespace = self.identity.namespace.clone();
                self.work(async move {
                    let process = request.process.clone();
                    let result = job::exec(guest, namespace, request).await;
                    Report::Execed { process, result, reply }
                });
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    pub(super) fn admit_exec(&mut self, request: &ExecRequest) -> Result<Guest, Error> {
        let init = init_of(&request.process.container);
        let guest = self.guest_of(&init)?;
        let phase = self.known(&init)?.phase;
        if phase != Phase::Running {
            return Err(wrong_phase(&init, phase, "it must be running for an exec"));
        }
        if self.known(&init)?.is_held() {
            return Err(over(&init.container, "it must be running for an exec"));
        }
        self.check_motion(&init.container)?;
        let exec = &request.process.exec;
        let container = self.containers.get_mut(&init.container);
        let container = container.ok_or_else(|| not_found("container", &init.container))?;
        if container.execs.contains_key(exec) {
            return Err(Error::AlreadyExists { what: "exec", id: exec.clone() });
        }
        container.execs.insert(exec.clone(), Process::new(request.stdio.clone()));
        Ok(guest)
    }

    pub(super) fn execed(&mut self, id: &ProcessId, result: Result<ProcessIo, Error>) -> Result<(), Error> {
        let container = self.containers.get_mut(&id.container);
        let container = container.ok_or_else(|| not_found("container", &id.container))?;
        match result {
            Ok(io) => {
                let process = container.execs.get_mut(&id.exec).ok_or_else(|| not_found("exec", &id.exec))?;
                process.io = Some(io);
                let exit = process.settle(Phase::Created);
                self.publisher.publish(TaskEvent::exec_added(&id.container, &id.exec));
                if let Some(exit) = exit {
                    self.publish_exit(id, exit);
                }
                Ok(())
            }
            Err(e) => {
                container.execs.remove(&id.exec);
                Err(e)
            }
        }
    }
}
