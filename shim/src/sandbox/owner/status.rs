//! Status, as the owner sees it.

use super::{Motion, Owner};
use crate::{
    agent::printable,
    sandbox::{
        process::{Phase, Process},
        ready::Ready,
        status::{ProcessStatus, ReadyStatus, SandboxStatus},
    },
    stdio::{ProcessIo, StreamStatus},
};

impl Owner {
    pub(super) fn status(&self) -> SandboxStatus {
        let agent = self.guest.as_ref().map(|guest| guest.agent.clone());
        let mut vm = self.vm.clone();
        if let (Some(vm), Some(agent)) = (&mut vm, &agent) {
            vm.link = agent.link();
        }
        let agent = agent.filter(|_| !self.state.is_pause());
        let processes = self.process_statuses();
        let live = processes.iter().map(|process| refused(&process.streams)).fold(0, u64::saturating_add);
        SandboxStatus {
            namespace: self.identity.namespace.clone(),
            id: self.identity.id.clone(),
            state: self.state.label(),
            created_ns: self.disk.created_ns,
            vm,
            agent,
            events: self.publisher.status(),
            processes,
            refused: self.refused.saturating_add(live),
        }
    }

    fn process_statuses(&self) -> Vec<ProcessStatus> {
        let mut all = Vec::new();
        for (id, container) in &self.containers {
            let begin = all.len();
            all.push(ProcessStatus {
                ready: ready(&container.ready),
                ..process_status(id, "", &container.init)
            });
            let mut execs: Vec<_> = container.execs.iter().collect();
            execs.sort_by_key(|(exec, _)| *exec);
            all.extend(execs.into_iter().map(|(exec, process)| process_status(id, exec, process)));
            if container.motion == Motion::Paused {
                let running =
                    all.iter_mut().skip(begin).filter(|process| process.state == Phase::Running.label());
                running.for_each(|process| process.state = Motion::Paused.name());
            }
        }
        all
    }
}

fn process_status(container: &str, exec: &str, process: &Process) -> ProcessStatus {
    ProcessStatus {
        container: container.into(),
        exec: exec.into(),
        state: process.phase.label(),
        guest_pid: process.guest_pid,
        terminal: process.stdio.terminal,
        exit: process.exit(),
        streams: process.io.as_ref().map(ProcessIo::status).unwrap_or_default(),
        ready: None,
    }
}

fn ready(ready: &Ready) -> Option<ReadyStatus> {
    let probe = printable(&ready.probe.as_ref()?.to_string());
    Some(ReadyStatus { probe, state: ready.state.clone() })
}

/// Connections closed because the guest broke the protocol.
pub(super) fn refused(streams: &[StreamStatus]) -> u64 {
    streams.iter().map(|stream| stream.refused).fold(0, u64::saturating_add)
}
