//! How processes end, and who hears of it when.

use std::time::Duration;

use super::lab_with_waiting_container;
use crate::{
    command::{poll, start},
    lab::Lab,
    leftovers,
    needs::Backend,
};

/// Statuses of the process itself, of a shell's SIGTERM trap and of `kill -9`.
pub fn exit_codes_arrive_as_they_are(backend: Backend) {
    let lab = Lab::new(backend);
    lab.run("zero", &["true"]).exits_with(0);
    lab.run("one", &["false"]).exits_with(1);
    lab.run("most", &["sh", "-c", "exit 255"]).exits_with(255);
    lab.nothing_is_left();
}

/// 128 + n, for init processes and for execs.
pub fn death_by_a_signal_is_128_and_its_number(backend: Backend) {
    let lab = Lab::new(backend);
    for (signal, code) in [("SIGTERM", 143), ("SIGKILL", 137)] {
        let id = signal.to_lowercase();
        let running =
            lab.attached(&id, &["sh", "-c", "trap 'exit 143' TERM; echo up; while :; do sleep 0.1; done"]);
        running.stdout.wait_for("up", lab.limit());
        let exec = start(&mut lab.exec_command(&[], &id, &["sh", "-c", "echo $$; exec sleep 1000"]));
        exec.stdout.wait_for("\n", lab.limit());
        let number = if signal == "SIGTERM" { "15" } else { "9" };
        let exec_pid = exec.stdout.text().trim().to_owned();
        lab.exec(&id, &["kill", &format!("-{number}"), &exec_pid]).succeeds();
        exec.wait(lab.limit()).exits_with(code);
        lab.ctr(&["task", "kill", "--signal", signal, &id]).succeeds();
        running.wait(lab.limit()).exits_with(code);
    }
    lab.nothing_is_left();
}

/// Not after a time limit, and not as an exit status alone.
pub fn a_command_that_does_not_exist_fails_at_once_with_its_path(backend: Backend) {
    let lab = Lab::new(backend);
    let boot = lab.run("c", &["true"]).succeeds().took;
    let failed = lab.run("c", &["/bin/nosuch", "argument"]);
    let extra = failed.took.saturating_sub(boot);
    let failed = failed.fails_with(&["/bin/nosuch", "no such file or directory"]);
    assert!(extra < Duration::from_secs(10), "took {extra:?} more than a command that exists: {failed}");
    lab.run("c", &["nosuch"]).fails_with(&["nosuch"]);
    lab.run("c", &["/etc/passwd"]).fails_with(&["/etc/passwd", "permission denied"]);
    lab.nothing_is_left();
}

/// The client waits for the end of the exec's output, which a grandchild keeps open for ever.
pub fn a_grandchild_that_keeps_stdout_open_delays_an_exit_by_2_s_at_most(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let usual = lab.exec("c", &["echo", "done"]).succeeds().took;
    let held = lab.exec("c", &["sh", "-c", "sleep 1000 & echo done"]).succeeds();
    assert_eq!(held.out(), "done\n");
    let extra = held.took.saturating_sub(usual);
    assert!(extra < Duration::from_millis(3500), "took {extra:?} longer");
    // Whoever still writes there must not die of SIGPIPE.
    let writer = "(sleep 3; echo late && echo alive > /tmp/proof; sleep 1000) & echo done";
    lab.exec("c", &["sh", "-c", writer]).succeeds();
    let alive = poll(lab.limit(), || lab.exec("c", &["cat", "/tmp/proof"]).out() == "alive\n");
    assert!(alive, "the grandchild did not outlive its end of output");
    lab.remove("c");
    lab.nothing_is_left();
}

/// Neither the agent nor the container collects zombies.
pub fn orphans_are_reaped(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    for _ in 0..5 {
        lab.exec("c", &["sh", "-c", "(sh -c 'sleep 0.1; exit 1' &) ; (sh -c true &)"]).succeeds();
    }
    let mut seen = String::new();
    let reaped = poll(Duration::from_secs(10), || {
        seen = lab.exec("c", &["sh", "-c", "grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null"]).out();
        seen.is_empty()
    });
    assert!(reaped, "zombies in the container: {seen}");
    if backend == Backend::Process {
        let cgroups = leftovers::cgroups(&[lab.key("c")]);
        let pids =
            cgroups.iter().map(|dir| std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default());
        let pids: String = pids.collect();
        for pid in pids.lines() {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            assert!(!status.contains("State:\tZ"), "{status}");
        }
    }
    lab.remove("c");
    lab.nothing_is_left();
}
