//! A status for programs. The names are an interface: `docs/operations.md` lists them, and they stay.

use cube_shim::control::sandbox::{Exit, Guest, Limits, Log, Process, Ready, StatusResponse, Stream, Vmm};
use serde_json::{Value, json};

use crate::time;

pub(super) fn value(status: &StatusResponse) -> Value {
    let (shim, control, events) = (&status.shim, &status.control, &status.events);
    json!({
        "namespace": status.namespace,
        "sandbox": status.sandbox_id,
        "state": status.state,
        "created": time::rfc3339(status.created_at_ns),
        "shim": {
            "version": shim.version,
            "protocol": shim.protocol,
            "pid": shim.pid,
            "rss_bytes": shim.rss_bytes,
            "open_files": shim.open_files,
        },
        "vmm": status.vmm.as_ref().map(vmm),
        "limits": status.limits.as_ref().map(limits),
        "guest": status.guest.as_ref().map(guest),
        "guest_error": (!status.guest_error.is_empty()).then_some(&status.guest_error),
        "control": {
            "connected": control.connected,
            "reconnects": control.reconnects,
            "last_event": control.last_event,
        },
        "events": { "waiting": events.waiting, "lost": events.lost },
        "processes": status.processes.iter().map(process).collect::<Vec<_>>(),
        "refused_connections": status.refused_connections,
    })
}

fn vmm(vmm: &Vmm) -> Value {
    json!({
        "backend": vmm.backend,
        "reason": vmm.reason,
        "pid": vmm.pid,
        "uptime_ms": vmm.uptime_ns / 1_000_000,
        // A number of 64 bits is not safe in JSON.
        "timeline": format!("{:016x}", vmm.timeline),
        "agent_version": vmm.agent_version,
        "agent_protocol": vmm.agent_protocol,
        "kernel_release": vmm.kernel_release,
    })
}

fn limits(limits: &Limits) -> Value {
    let in_force = |value: u64| (value != 0).then_some(value);
    json!({
        "cgroup": limits.cgroup,
        "memory_bytes": in_force(limits.memory_bytes),
        "cpu_percent": in_force(limits.cpu_percent),
        "pids": in_force(limits.pids),
        "io": limits.io,
        "missing": limits.missing,
    })
}

fn guest(guest: &Guest) -> Value {
    json!({
        "memory_total_bytes": guest.memory_total_bytes,
        "memory_available_bytes": guest.memory_available_bytes,
        "agent_rss_bytes": guest.agent_rss_bytes,
        "ring_budget_bytes": guest.ring_budget_bytes,
        "ring_used_bytes": guest.ring_used_bytes,
        "containers": guest.containers,
        "processes": guest.processes,
        "refused_connections": guest.refused_connections,
    })
}

fn process(process: &Process) -> Value {
    json!({
        "container": process.container_id,
        "exec": (!process.exec_id.is_empty()).then_some(&process.exec_id),
        "state": process.state,
        "guest_pid": (process.guest_pid != 0).then_some(process.guest_pid),
        "terminal": process.terminal,
        "exit": process.exit.as_ref().map(exit),
        "ready": process.ready.as_ref().map(ready),
        "streams": process.streams.iter().map(stream).collect::<Vec<_>>(),
    })
}

fn ready(ready: &Ready) -> Value {
    json!({
        "probe": ready.probe,
        "since": (ready.since_ns != 0).then(|| time::rfc3339(ready.since_ns)),
        "reason": (!ready.reason.is_empty()).then_some(&ready.reason),
    })
}

fn exit(exit: &Exit) -> Value {
    json!({ "status": exit.status, "at": time::rfc3339(exit.at_ns) })
}

fn stream(stream: &Stream) -> Value {
    json!({
        "name": stream.name,
        "connected": stream.connected,
        "received": stream.received,
        "acknowledged": stream.acknowledged,
        "written": stream.written,
        "lost": stream.lost,
        "dropped": stream.dropped,
        "discarded": stream.discarded,
        "reconnects": stream.reconnects,
        "refused": stream.refused,
        "lag": stream.lag,
        "guest_lag": stream.guest_lag.as_ref().map(|lag| lag.bytes),
        "complete": stream.complete,
        "truncated": stream.truncated,
        "log": stream.log.as_ref().map(log),
    })
}

fn log(log: &Log) -> Value {
    json!({
        "segments": log.segments,
        "bytes": log.bytes,
        "rotated_away": log.rotated_away,
        "lost": log.lost,
        "waits_for": (!log.waits_for.is_empty()).then_some(&log.waits_for),
    })
}
