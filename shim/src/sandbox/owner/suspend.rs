//! Pause to disk, and resume from there, as the owner sees them.

use cube_protocol::guest::QuiesceResponse;

use super::{Owner, SandboxState, Waiting, init_of, wrong_phase};
use crate::{
    errors::Error,
    events::TaskEvent,
    sandbox::{
        Reply,
        job::{Guest, Report},
        pause,
        process::Phase,
        relaunch::Relaunch,
        suspend::{self, Loaded, Subject},
    },
    snapshot::Suspended,
    vmm::VmSpec,
};

impl Owner {
    /// Id of the main container, if there is one.
    pub(super) fn main_id(&self) -> String {
        let only = self.containers.keys().next().filter(|_| self.containers.len() == 1);
        only.unwrap_or(&self.identity.id).clone()
    }

    pub(super) fn suspend(&mut self, reply: Reply<()>) {
        let id = self.main_id();
        match self.admit_suspend(&id) {
            Ok(paused) => {
                // What changes the sandbox is refused from now on. What is under way is awaited.
                self.state = SandboxState::Suspending;
                self.waiting = Some(Waiting::Suspend { id, paused, reply });
                self.begin_waiting();
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    /// Tells whether it is paused already.
    fn admit_suspend(&mut self, id: &str) -> Result<bool, Error> {
        let init = init_of(id);
        let phase = self.known(&init)?.phase;
        let paused = match self.state {
            SandboxState::Running => false,
            SandboxState::Paused => true,
            _ => return Err(self.wrong_state("only a running or paused sandbox can be paused to disk")),
        };
        match phase {
            Phase::Running => Ok(paused),
            _ => Err(wrong_phase(&init, phase, "only a running container can be paused")),
        }
    }

    pub(super) fn write_to_disk(&mut self, guest: Guest, id: String, paused: bool, reply: Reply<()>) {
        let suspended = Suspended::new(&self.config.snapshot.dir, &self.identity.run_dir);
        self.disk.suspended = Some(suspended.path().into());
        // Nothing is made that the state file does not know of.
        if let Err(e) = self.identity.run_dir.save(&self.disk) {
            self.disk.suspended = None;
            self.state = if paused { SandboxState::Paused } else { SandboxState::Running };
            drop(reply.send(Err(e.into())));
            return self.serve_those_that_waited();
        }
        let run_dir = self.identity.run_dir.clone();
        let subject = Subject { guest, timeline: self.disk.timeline, paused, suspended, run_dir };
        self.later(async move {
            let result = suspend::to_disk(subject).await;
            Report::Suspended { id, paused, result, reply }
        });
    }

    pub(super) fn suspended(
        &mut self,
        id: &str,
        paused: bool,
        result: Result<QuiesceResponse, pause::Failed>,
    ) -> Result<(), Error> {
        let (state, result) = match result {
            Ok(rest) => {
                self.rest = Some(rest);
                (SandboxState::Suspended, Ok(()))
            }
            Err(pause::Failed { error, runs }) => {
                self.disk.suspended = None;
                self.save();
                if !runs {
                    self.rest.get_or_insert_default();
                }
                (if runs { SandboxState::Running } else { SandboxState::Paused }, Err(error))
            }
        };
        if self.state != SandboxState::Suspending {
            self.discard_memory();
        }
        // containerd knows it as paused already.
        let event = (!paused).then(|| TaskEvent::paused(id));
        self.settle(SandboxState::Suspending, state, result, event)
    }

    /// Removes what a sandbox that has ended has on disk. Its name stays in the state file, for those who
    /// clean up if this comes to nothing.
    pub(super) fn discard_memory(&self) {
        if let Some(suspended) = Suspended::named_by(&self.disk, &self.identity.run_dir) {
            tokio::spawn(async move { suspend::discard(&suspended).await });
        }
    }

    /// What brings the sandbox back from disk, if it is there.
    pub(super) fn way_back(&self) -> Option<(Relaunch, Suspended)> {
        let suspended = Suspended::named_by(&self.disk, &self.identity.run_dir)?;
        let vm = VmSpec {
            sandbox_id: self.identity.id.clone(),
            run_dir: self.identity.run_dir.path().into(),
            cgroup: self.disk.cgroup.clone(),
            user: self.disk.user,
            group: self.config.users.first,
            // Those of the memory on disk are in force.
            vcpus: self.config.vm.vcpus,
            memory_mib: self.config.vm.memory_mib,
            share: None,
            disks: self.disks.clone(),
            cmdline: String::new(),
            restore: Some(suspended.vm_dir()),
        };
        Some((Relaunch { host: self.host.clone(), config: self.config.clone(), vm }, suspended))
    }

    /// Resumes a sandbox that is on disk.
    pub(super) fn load(&mut self, id: String, reply: Reply<()>) {
        let admitted = self.known(&init_of(&id)).map(drop).and_then(|()| self.whole(&id, "resuming"));
        let (Ok(()), Some(guest), Some((relaunch, suspended))) =
            (&admitted, self.guest.clone(), self.way_back())
        else {
            let refused = admitted.and_then(|()| Err(self.ended_meanwhile()));
            return drop(reply.send(refused));
        };
        self.state = SandboxState::Resuming;
        let timeline = self.disk.timeline;
        self.later(async move {
            let result = suspend::from_disk(&guest, timeline, relaunch, &suspended).await;
            Report::Loaded { id, result, reply }
        });
    }

    pub(super) fn loaded(&mut self, id: &str, result: Result<Loaded, Error>) -> Result<(), Error> {
        let (state, result) = match result {
            Ok(Loaded { pid, resumed }) => {
                self.disk.suspended = None;
                self.moved_to(pid);
                match resumed {
                    Ok(()) => {
                        self.rest = None;
                        (SandboxState::Running, Ok(()))
                    }
                    Err(e) => (SandboxState::Paused, Err(e)),
                }
            }
            Err(e) => (SandboxState::Suspended, Err(e)),
        };
        self.settle(SandboxState::Resuming, state, result, Some(TaskEvent::resumed(id)))
    }

    /// Another VMM runs the guest.
    pub(super) fn moved_to(&mut self, pid: u32) {
        self.pid = pid;
        self.disk.vmm_pid = pid;
        if let Some(vm) = &mut self.vm {
            vm.pid = pid;
        }
        self.save();
    }
}
