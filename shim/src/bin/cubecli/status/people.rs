//! A status for people: sizes are rounded and long IDs shortened, so that tables fit a terminal.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    time::Duration,
};

use cube_shim::control::sandbox::{Process, StatusResponse, Stream};

use crate::{table, time};

/// Characters of an ID that are shown; IDs of Kubernetes have 64, and differ in the first few.
const ID_MAX: usize = 24;

pub(super) fn print(status: &StatusResponse, output: File) -> io::Result<()> {
    let mut output = BufWriter::new(output);
    table::write_to(&mut output, &facts(status))?;
    writeln!(output)?;
    table::write_to(&mut output, &processes(status))?;
    if status.processes.iter().any(|process| process.ready.is_some()) {
        writeln!(output)?;
        table::write_to(&mut output, &probes(status))?;
    }
    if status.processes.iter().any(|process| !process.streams.is_empty()) {
        writeln!(output)?;
        table::write_to(&mut output, &streams(status))?;
    }
    if streams_of(status).any(|(_, stream)| stream.log.is_some()) {
        writeln!(output)?;
        table::write_to(&mut output, &logs(status))?;
    }
    output.flush()
}

fn facts(status: &StatusResponse) -> Vec<[String; 2]> {
    let (shim, control, events) = (&status.shim, &status.control, &status.events);
    let fact = |name: &str, value: String| [name.to_owned(), value];
    let mut facts = vec![
        fact("sandbox", format!("{}/{}", status.namespace, status.sandbox_id)),
        fact("state", status.state.clone()),
    ];
    if let Some(vmm) = status.vmm.as_ref() {
        let uptime = time::age(Duration::from_nanos(vmm.uptime_ns));
        facts.extend([
            fact("vm", format!("{} (pid {}) for {uptime}: {}", vmm.backend, vmm.pid, vmm.reason)),
            fact(
                "agent",
                format!(
                    "{}, protocol {}, kernel {}",
                    vmm.agent_version, vmm.agent_protocol, vmm.kernel_release
                ),
            ),
            fact("timeline", format!("{:016x}", vmm.timeline)),
        ]);
    }
    if let Some(limits) = status.limits.as_ref() {
        facts.push(fact("limits", format!("{}, of {}", limits.text, limits.cgroup)));
    }
    facts.push(fact(
        "shim",
        format!(
            "{}, protocol {}, pid {}, {} resident, {} open files",
            shim.version,
            shim.protocol,
            shim.pid,
            size(shim.rss_bytes),
            shim.open_files
        ),
    ));
    facts.extend(guest(status).into_iter().map(|(name, value)| fact(name, value)));
    let link = if control.connected { "connected" } else { "not connected" };
    facts.extend([
        fact(
            "control",
            format!("{link}, {} reconnects, last event {}", control.reconnects, control.last_event),
        ),
        fact("events", format!("{} wait for containerd, {} lost", events.waiting, events.lost)),
    ]);
    let by_guest = status.guest.as_ref().map(|guest| format!(", {} by the agent", guest.refused_connections));
    let by_guest = by_guest.unwrap_or_default();
    facts.push(fact("refused", format!("{} connections by the shim{by_guest}", status.refused_connections)));
    facts
}

fn guest(status: &StatusResponse) -> Vec<(&'static str, String)> {
    let Some(guest) = status.guest.as_ref() else {
        return vec![("guest", format!("does not answer: {}", status.guest_error))];
    };
    let memory = format!(
        "{} memory, {} available, agent {} resident",
        size(guest.memory_total_bytes),
        size(guest.memory_available_bytes),
        size(guest.agent_rss_bytes)
    );
    let rings = format!("{} of {} in use", size(guest.ring_used_bytes), size(guest.ring_budget_bytes));
    vec![("guest", memory), ("rings", rings)]
}

fn processes(status: &StatusResponse) -> Vec<[String; 4]> {
    let mut rows = vec![["PROCESS", "STATE", "GUEST-PID", "EXIT"].map(String::from)];
    rows.extend(status.processes.iter().map(|process| {
        let pid = if process.guest_pid == 0 { "-".into() } else { process.guest_pid.to_string() };
        let exit =
            process.exit.as_ref().map(|exit| format!("{} at {}", exit.status, time::rfc3339(exit.at_ns)));
        [name(process), process.state.clone(), pid, exit.unwrap_or_else(|| "-".into())]
    }));
    rows
}

fn probes(status: &StatusResponse) -> Vec<[String; 3]> {
    let mut rows = vec![["CONTAINER", "READY", "PROBE"].map(String::from)];
    rows.extend(status.processes.iter().filter_map(|process| {
        let ready = process.ready.as_ref()?;
        let state = match ready.since_ns {
            0 => format!("not yet: {}", ready.reason),
            since_ns => format!("since {}", time::rfc3339(since_ns)),
        };
        Some([name(process), state, ready.probe.clone()])
    }));
    rows
}

fn streams(status: &StatusResponse) -> Vec<[String; 11]> {
    const HEADER: [&str; 11] = [
        "STREAM",
        "RECEIVED",
        "ACKED",
        "WRITTEN",
        "LOST",
        "DISCARDED",
        "LAG",
        "GUEST-LAG",
        "RECONNECTS",
        "REFUSED",
        "STATE",
    ];
    let mut rows = vec![HEADER.map(String::from)];
    rows.extend(streams_of(status).map(|(process, stream)| {
        [
            format!("{} {}", name(process), stream.name),
            size(stream.received),
            size(stream.acknowledged),
            size(stream.written),
            size(stream.lost),
            size(stream.discarded),
            size(stream.lag),
            stream.guest_lag.as_ref().map_or_else(|| "-".into(), |lag| size(lag.bytes)),
            stream.reconnects.to_string(),
            stream.refused.to_string(),
            stream_state(stream).into(),
        ]
    }));
    rows
}

fn stream_state(stream: &Stream) -> &'static str {
    match (stream.complete, stream.truncated, stream.connected) {
        (_, true, _) => "truncated",
        (true, ..) => "complete",
        (_, _, true) => "connected",
        _ => "not connected",
    }
}

fn logs(status: &StatusResponse) -> Vec<[String; 6]> {
    let mut rows = vec![["LOG", "SEGMENTS", "BYTES", "ROTATED-AWAY", "LOST", "WAITS-FOR"].map(String::from)];
    rows.extend(streams_of(status).filter_map(|(process, stream)| {
        let log = stream.log.as_ref()?;
        let waits_for = if log.waits_for.is_empty() { "-".into() } else { log.waits_for.clone() };
        let name = format!("{} {}", name(process), stream.name);
        let (kept, gone) = (size(log.bytes), size(log.rotated_away));
        Some([name, log.segments.to_string(), kept, gone, size(log.lost), waits_for])
    }));
    rows
}

fn streams_of(status: &StatusResponse) -> impl Iterator<Item = (&Process, &Stream)> {
    status.processes.iter().flat_map(|process| process.streams.iter().map(move |stream| (process, stream)))
}

/// "container", or "container/exec".
fn name(process: &Process) -> String {
    let container = shortened(&process.container_id);
    if process.exec_id.is_empty() {
        container
    } else {
        format!("{container}/{}", shortened(&process.exec_id))
    }
}

fn shortened(id: &str) -> String {
    match id.char_indices().nth(ID_MAX) {
        Some((end, _)) => format!("{}…", &id[..end]),
        None => id.into(),
    }
}

/// Bytes, in full below 10 KiB: whether it is 0 or 1 must be seen.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 10 << 10 {
        return bytes.to_string();
    }
    let mut value = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 1000.0 && units.len() > 0 {
        value /= 1024.0;
        unit = units.next();
    }
    format!("{value:.1} {}", unit.unwrap_or(&""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_small_ones_exact() {
        for (bytes, text) in [
            (0, "0"),
            (1, "1"),
            (10_239, "10239"),
            (10_240, "10.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (1500 << 20, "1.5 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn long_ids_are_shortened_so_that_it_shows() {
        assert_eq!(shortened(&"x".repeat(24)), "x".repeat(24));
        assert_eq!(shortened(&"ä".repeat(64)), "ä".repeat(24) + "…");
    }
}
