//! How fast output gets from a process into the log, and what that costs.

use std::time::Duration;

use cube_shim::cgroup::SandboxCgroup;
use cube_tests::{
    lab::{Lab, Setup},
    needs::Backend,
};
use nix::unistd::Pid;

use crate::{
    cost::{MIB, member},
    flow::Flow,
    pipeline::{self, Transport},
    table::{Samples, Table},
};

const ROUNDS: usize = 5;
const BYTES: u64 = 1 << 30;
/// Polling is slow: fewer bytes take as long.
const POLLED_BYTES: u64 = 128 << 20;
/// Emulation is slower still.
const EMULATED_BYTES: u64 = 64 << 20;

/// A lab whose logs are one segment, as the baselines' files are.
pub(crate) fn lab(backend: Backend) -> Lab {
    let log = "segment_bytes = 17179869184\nsegments = 2".to_owned();
    Lab::with(Setup { log, ..backend.into() })
}

/// The process backend beside both baselines, round by round.
pub(crate) fn measure(table: &mut Table) {
    table.group("log throughput, process to host file, one stream, 64 KiB writes");
    let lab = lab(Backend::Process);
    let [mut ours, mut bare, mut polling] = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        bare.push(pipeline::run(Transport::Bare, lab.dir(), BYTES));
        ours.push(into_log(&lab, BYTES));
        polling.push(pipeline::run(Transport::Polling, lab.dir(), POLLED_BYTES));
    }
    let rates = |flows: &[Flow]| flows.iter().map(Flow::rate).collect::<Samples>();
    let cpu = |flows: &[Flow]| flows.iter().map(Flow::cpu_per_gib).collect::<Samples>();
    let (rate, bare_rate, polling_rate) = (rates(&ours), rates(&bare), rates(&polling));
    table.add("bare: pipe, relay, Unix socket, file", "MiB/s", bare_rate.clone());
    table.add("RPC polling, 4 KiB a request", "MiB/s", polling_rate.clone());
    table.add("cubebox", "MiB/s", rate.clone());
    table.add("cubebox over bare", "x", rate.over(&bare_rate)).at_least(0.8);
    table.add("cubebox over polling", "x", rate.over(&polling_rate)).at_least(10.0);
    table.add("CPU time of relay and receiver, bare", "ms/GiB", cpu(&bare));
    table.add("CPU time of relay and receiver, polling", "ms/GiB", cpu(&polling));
    table.add("CPU time of agent and shim", "ms/GiB", cpu(&ours));
    table.add("CPU time, bare over cubebox", "x", cpu(&bare).over(&cpu(&ours)));
    let peak = |which: usize| ours.iter().map(|flow| flow.peaks[which] as f64 / MIB).collect::<Samples>();
    table.add("agent memory while busy, highest", "MiB", peak(0)).at_most(6.0).binding();
    table.add("shim memory while busy, highest", "MiB", peak(1)).at_most(12.0).binding();
}

/// A guest with a kernel of its own. Nothing to compare with: emulation decides.
pub(crate) fn measure_emulated(table: &mut Table, backend: Backend) {
    table.group("log throughput, process in the VM to host file");
    let lab = lab(backend);
    lab.detached("c", &delayed_writer(EMULATED_BYTES).each_ref().map(String::as_str));
    let flow = Flow::watch(&lab.log_dir("c").join("stdout"), EMULATED_BYTES, &[]);
    lab.remove("c");
    table.add(format!("cubebox ({})", backend.name()), "MiB/s", flow.rate());
}

fn into_log(lab: &Lab, bytes: u64) -> Flow {
    lab.detached("c", &delayed_writer(bytes).each_ref().map(String::as_str));
    let flow = Flow::watch(&lab.log_dir("c").join("stdout"), bytes, &relays(lab, "c"));
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    std::fs::remove_dir_all(lab.log_dir("c")).unwrap();
    flow
}

/// Agent and shim of a container on the process backend.
pub(crate) fn relays(lab: &Lab, id: &str) -> [Pid; 2] {
    relays_of(lab, &lab.key(id), id)
}

/// The same of a sandbox that has another key than containerd's would.
pub(crate) fn relays_of(lab: &Lab, key: &str, id: &str) -> [Pid; 2] {
    let cgroup = SandboxCgroup::for_key(key).unwrap();
    [member(&cgroup.helpers(), "cube-agent"), lab.shim_pid(id)]
}

/// A container's command: a pause in which the one who watches gets ready, then the bytes.
fn delayed_writer(bytes: u64) -> [String; 3] {
    let pause = Duration::from_secs(1).as_secs();
    let script = format!("sleep {pause}; exec cube-test-writer blocks 65536 {bytes}");
    ["sh".into(), "-c".into(), script]
}
