//! Figures that have a budget, measured and printed beside it. Fails if one is exceeded.

use std::{fs, process::ExitCode, time::Duration};

use cube_tests::{guest::Guest, needs::Backend, paths, scenarios};
use nix::unistd::Pid;

const MIB: f64 = 1_048_576.0;

struct Figure {
    name: String,
    bytes: u64,
    budget_mib: u32,
}

fn main() -> ExitCode {
    let agent = fs::metadata(paths::agent()).map(|file| file.len()).unwrap_or(u64::MAX);
    let mut figures = vec![Figure { name: "agent binary".into(), bytes: agent, budget_mib: 3 }];
    for backend in [Backend::Process, Backend::Qemu, Backend::CloudHypervisor] {
        match backend.missing() {
            Some(reason) => println!("{}: not measured: {reason}", backend.name()),
            None => figures.extend(idle_memory(backend)),
        }
    }
    println!("\n{:<44} {:>10} {:>10}", "figure", "measured", "budget");
    for Figure { name, bytes, budget_mib } in &figures {
        println!("{name:<44} {:>6.2} MiB {budget_mib:>6} MiB", *bytes as f64 / MIB);
    }
    let exceeded = figures.iter().filter(|figure| figure.bytes as f64 > f64::from(figure.budget_mib) * MIB);
    match exceeded.count() {
        0 => ExitCode::SUCCESS,
        count => {
            println!("\n{count} over budget");
            ExitCode::FAILURE
        }
    }
}

/// Resident memory of agent and shim while a container only waits.
fn idle_memory(backend: Backend) -> [Figure; 2] {
    let lab = scenarios::lab_with_waiting_container(backend);
    // What starting took is given back.
    std::thread::sleep(Duration::from_secs(3));
    let agent = Guest::of(&lab, "c").info().agent_rss_bytes;
    let shim = resident(lab.shim_pid("c"));
    lab.remove("c");
    lab.nothing_is_left();
    let name = |what| format!("resident memory of the idle {what} ({})", backend.name());
    [
        Figure { name: name("agent"), bytes: agent, budget_mib: 3 },
        Figure { name: name("shim"), bytes: shim, budget_mib: 12 },
    ]
}

#[allow(clippy::unwrap_used, reason = "a benchmark fails loudly")]
fn resident(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
