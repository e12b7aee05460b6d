//! What a process costs, as the kernel counts it.

use std::{fs, path::Path, time::Duration};

use nix::{time::ClockId, unistd::Pid};

pub(crate) const MIB: f64 = 1_048_576.0;
pub(crate) const GIB: f64 = 1024.0 * MIB;

/// User and system time of a process so far, its threads included: clock_getcpuclockid(3).
pub(crate) fn cpu_time(pid: Pid) -> Duration {
    ClockId::pid_cpu_clock_id(pid).and_then(ClockId::now).map(Duration::from).unwrap()
}

pub(crate) fn cpu_time_of(pids: &[Pid]) -> Duration {
    pids.iter().copied().map(cpu_time).sum()
}

/// Resident memory in bytes, pages shared with others included: proc_pid_status(5).
pub(crate) fn resident(pid: Pid) -> u64 {
    kib_line(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// Resident memory in bytes, each page divided by the number of processes that share it. What a hundred
/// processes of one program cost together is the sum of these.
pub(crate) fn proportional(pid: Pid) -> u64 {
    kib_line(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

fn kib_line(file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{file}: {e}"));
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The first process called `name` in a cgroup.
pub(crate) fn member(cgroup: &Path, name: &str) -> Pid {
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    let is_named =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    let pid = pids.lines().find(is_named).unwrap_or_else(|| panic!("no {name} in {}", cgroup.display()));
    Pid::from_raw(pid.parse().unwrap())
}
