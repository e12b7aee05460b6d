//! `ctr task pause` and `ctr task resume`.

use std::fs;

use super::{full_flow, lab_with_waiting_container};
use crate::{
    command::{poll, start},
    lab::Lab,
    logs,
    needs::Backend,
    soak,
};

fn pause(lab: &Lab) {
    lab.ctr(&["task", "pause", "c"]).succeeds();
}

fn resume(lab: &Lab) {
    lab.ctr(&["task", "resume", "c"]).succeeds();
}

fn state(lab: &Lab) -> String {
    lab.task("c").expect("there is no task").0
}

/// Counts into its log, and tells in each line what time it is.
const COUNTING: [&str; 3] = ["sh", "-c", "i=0; while :; do echo $i $(date +%s); i=$((i+1)); done"];

/// As with runc: the state is told, nothing runs meanwhile, and what would need a process is refused.
pub fn a_paused_task_stands_still_until_it_is_resumed(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached("c", &COUNTING);
    let logged = || fs::metadata(lab.log_dir("c").join("stdout")).map_or(0, |log| log.len());
    assert!(poll(lab.limit(), || logged() > 100), "nothing runs");
    pause(&lab);
    assert_eq!(state(&lab), "PAUSED");
    let before = logged();
    lab.exec("c", &["true"]).fails_with(&["paused"]);
    lab.ctr(&["task", "pause", "c"]).fails_with(&["paused"]);
    lab.ctr(&["task", "metrics", "c"]);
    lab.stop_containerd();
    lab.start_containerd();
    assert_eq!(state(&lab), "PAUSED", "after a restart of containerd");
    assert_eq!(logged(), before, "something runs");
    resume(&lab);
    assert_eq!(state(&lab), "RUNNING");
    assert!(poll(lab.limit(), || logged() > before + 100), "nothing runs any more");
    lab.exec("c", &["true"]).succeeds();
    lab.ctr(&["task", "resume", "c"]).fails_with(&["running"]);
    let log = String::from_utf8(logs::read(&lab.log_dir("c"), "stdout")).unwrap();
    for (n, line) in log.lines().enumerate().take(log.matches('\n').count()) {
        assert!(line.starts_with(&format!("{n} ")), "line {n} is {line:?}");
    }
    lab.remove("c");
    lab.nothing_is_left();
}

/// SIGKILL does not wait for a resume.
pub fn a_paused_task_can_be_killed_and_deleted(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    pause(&lab);
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "c"]).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// A SIGTERM that comes during a pause arrives after it.
pub fn a_signal_waits_for_the_resume(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    pause(&lab);
    let term = start(&mut lab.ctr_command(&["task", "kill", "--signal", "SIGTERM", "c"]));
    assert_eq!(state(&lab), "PAUSED");
    resume(&lab);
    term.wait(lab.limit()).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 143);
    lab.nothing_is_left();
}

/// containerd runs `shim delete` then, which finds a guest that answers nothing.
pub fn a_shim_that_is_killed_while_its_sandbox_is_paused_leaves_nothing(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    pause(&lab);
    super::a_killed_shim_leaves_nothing(&lab);
}

/// Again and again, with everything in flight.
pub fn pauses_in_full_flow_cost_and_double_no_byte(backend: Backend) {
    let rounds = match backend {
        Backend::Process => soak::rounds(20, 200),
        Backend::Qemu => soak::rounds(4, 200),
        Backend::CloudHypervisor => soak::rounds(4, 20),
    };
    let lab = Lab::new(backend);
    let bytes = full_flow::run(&lab, &[], rounds, |_| {
        pause(&lab);
        resume(&lab);
    });
    lab.nothing_is_left();
    let name = format!("pauses in full flow, {}", backend.name());
    soak::record(&name, "pauses", rounds);
    soak::record(&name, "bytes compared", bytes);
}
