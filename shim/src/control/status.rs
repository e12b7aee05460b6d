//! A status as messages of `proto/sandbox.proto`.

use std::{fs, path::Path};

use containerd_shim_protos::protobuf::MessageField;
use cube_protocol::version;

use super::{guest::Figures, sandbox as api};
use crate::{
    agent::LinkStatus,
    sandbox::{Exit, ProcessStatus, Readiness, ReadyStatus, SandboxStatus, VmStatus},
    stdio::{LogStatus, Obstacle, StreamStatus},
};

/// What the shim knows and what the guest says, together.
pub(super) fn response(status: SandboxStatus, figures: Result<Figures, String>) -> api::StatusResponse {
    let link = status.vm.as_ref().map(|vm| vm.link).unwrap_or_default();
    let known = figures.as_ref().ok();
    let processes = status.processes.into_iter().map(|p| process(p, known)).collect();
    let (guest, guest_error) = match figures {
        Ok(figures) => (Some(figures.guest), String::new()),
        Err(reason) => (None, reason),
    };
    api::StatusResponse {
        namespace: status.namespace,
        sandbox_id: status.id,
        state: status.state.into(),
        created_at_ns: status.created_ns,
        shim: MessageField::some(shim()),
        limits: limits(status.vm.as_ref()).into(),
        vmm: status.vm.map(vmm).into(),
        guest: guest.into(),
        guest_error,
        control: MessageField::some(control(link)),
        events: MessageField::some(api::Events {
            waiting: status.events.waiting,
            lost: status.events.lost,
            ..Default::default()
        }),
        processes,
        refused_connections: status.refused,
        ..Default::default()
    }
}

fn shim() -> api::Shim {
    api::Shim {
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: version::CURRENT.to_string(),
        pid: std::process::id(),
        rss_bytes: rss_bytes(Path::new("/proc/self/status")).unwrap_or_default(),
        // The one that lists them is counted as well.
        open_files: fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count().saturating_sub(1) as u32),
        ..Default::default()
    }
}

/// VmRSS of proc_pid_status(5).
fn rss_bytes(path: &Path) -> Option<u64> {
    let status = fs::read_to_string(path).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn vmm(vm: VmStatus) -> api::Vmm {
    api::Vmm {
        uptime_ns: u64::try_from(vm.uptime().as_nanos()).unwrap_or(u64::MAX),
        backend: vm.backend,
        reason: vm.reason,
        pid: vm.pid,
        timeline: vm.timeline,
        agent_version: vm.agent_version,
        agent_protocol: vm.agent_protocol.to_string(),
        kernel_release: vm.kernel_release,
        ..Default::default()
    }
}

fn limits(vm: Option<&VmStatus>) -> Option<api::Limits> {
    let limited = vm?.limited.as_ref()?;
    Some(api::Limits {
        cgroup: limited.cgroup.display().to_string(),
        memory_bytes: limited.memory_bytes.unwrap_or_default(),
        cpu_percent: limited.cpu_percent.unwrap_or_default(),
        pids: limited.pids.unwrap_or_default(),
        io: limited.io.clone(),
        missing: limited.missing.iter().map(|name| (*name).to_owned()).collect(),
        text: limited.to_string(),
        ..Default::default()
    })
}

fn control(link: LinkStatus) -> api::Control {
    let LinkStatus { connected, reconnects, last_event } = link;
    api::Control { connected, reconnects, last_event, ..Default::default() }
}

fn process(status: ProcessStatus, figures: Option<&Figures>) -> api::Process {
    let ProcessStatus { container, exec, state, guest_pid, terminal, exit, streams, ready } = status;
    let streams = streams
        .into_iter()
        .map(|status| {
            let lag = figures.and_then(|figures| figures.lag(&container, &exec, status.name, terminal));
            stream(status, lag)
        })
        .collect();
    let exit = exit.map(|Exit { status, at_ns }| api::Exit { status, at_ns, ..Default::default() }).into();
    let (container_id, exec_id, state) = (container, exec, state.into());
    api::Process {
        container_id,
        exec_id,
        state,
        guest_pid,
        terminal,
        exit,
        streams,
        ready: ready.map(self::ready).into(),
        ..Default::default()
    }
}

fn ready(status: ReadyStatus) -> api::Ready {
    let (since_ns, reason) = match status.state {
        Readiness::Since(since_ns) => (since_ns, String::new()),
        Readiness::Waiting(reason) => (0, reason),
    };
    api::Ready { probe: status.probe, since_ns, reason, ..Default::default() }
}

fn stream(status: StreamStatus, guest_lag: Option<u64>) -> api::Stream {
    api::Stream {
        name: status.name.into(),
        connected: status.connected,
        received: status.received,
        acknowledged: status.acknowledged,
        written: status.written,
        lost: status.lost,
        dropped: status.dropped,
        discarded: status.discarded,
        reconnects: status.reconnects,
        refused: status.refused,
        lag: status.lag,
        guest_lag: guest_lag.map(|bytes| api::GuestLag { bytes, ..Default::default() }).into(),
        complete: status.complete,
        truncated: status.truncated,
        log: status.log.map(log).into(),
        ..Default::default()
    }
}

fn log(LogStatus { usage, waits_for }: LogStatus) -> api::Log {
    let waits_for = match waits_for {
        None => "",
        Some(Obstacle::Reader) => "reader",
        Some(Obstacle::Disk) => "disk",
        Some(Obstacle::Directory) => "directory",
    };
    api::Log {
        segments: u32::try_from(usage.segments).unwrap_or(u32::MAX),
        bytes: usage.bytes,
        rotated_away: usage.rotated_away,
        lost: usage.lost,
        waits_for: waits_for.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_tells_its_own_size() {
        let shim = shim();
        assert!(shim.rss_bytes > 1 << 20 && shim.rss_bytes < 1 << 40, "{shim:?}");
        assert!(shim.open_files >= 3 && shim.pid == std::process::id(), "{shim:?}");
    }
}
