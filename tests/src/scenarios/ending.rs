//! `cubecli cubebox kill` and `rm`, whatever still answers.

use std::fs;

use nix::sys::signal::{Signal, kill};

use super::lab_with_waiting_container;
use crate::{
    command::{poll, start},
    lab::Lab,
    logs,
    needs::Backend,
};

/// Says that it is there, and ends with 143 on SIGTERM.
const UP: [&str; 3] = ["sh", "-c", "trap 'exit 143' TERM; echo up; while :; do sleep 0.05; done"];

fn lab_with_container(backend: Backend) -> Lab {
    let lab = Lab::new(backend);
    lab.detached("c", &UP);
    assert!(poll(lab.limit(), || logs::read(&lab.log_dir("c"), "stdout") == b"up\n"), "no output");
    lab
}

/// The IDs that containerd has containers of.
fn containers(lab: &Lab) -> String {
    lab.ctr(&["containers", "list", "--quiet"]).succeeds().out()
}

/// containerd gives up a task whose shim is gone, and then its container can be removed.
fn is_forgotten(lab: &Lab) {
    let mut said = String::new();
    let gone = poll(lab.limit(), || {
        lab.ctr(&["task", "delete", "--force", "c"]);
        let deleted = lab.ctr(&["container", "delete", "c"]);
        said = deleted.to_string();
        deleted.code() == 0
    });
    assert!(gone, "containerd holds on to it: {said}");
}

/// containerd has removed what it had, and nothing else was left for it.
fn nothing_is_left_once_containerd_is_back(lab: &Lab) {
    lab.start_containerd();
    is_forgotten(lab);
    lab.nothing_is_left();
    assert_eq!(logs::read(&lab.log_dir("c"), "stdout"), b"up\n", "the log stays");
}

/// containerd is told of each, as if its own client had asked.
pub fn kill_and_rm_go_through_containerd(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    lab.cubecli(&["cubebox", "kill", "nobody"]).exits_with(3);
    lab.cubecli(&["cubebox", "rm", "nobody"]).exits_with(3);
    lab.cubecli(&["cubebox", "kill", "-s", "SIGNOTHING", "c"]).exits_with(2);
    lab.cubecli(&["cubebox", "rm", "c"]).fails_with(&["has not stopped", "--force"]);
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");
    lab.cubecli(&["cubebox", "kill", "--signal", "TERM", "c"]).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    let removed = lab.cubecli(&["cubebox", "rm", "c"]).succeeds();
    assert_eq!((removed.out().as_str(), removed.err().as_str()), ("", ""));
    assert_eq!((lab.task("c"), containers(&lab).as_str()), (None, ""));
    lab.nothing_is_left();
    // Another ID: the snapshot of the first waits for containerd's garbage collection.
    lab.detached("d", &UP);
    lab.cubecli(&["cubebox", "rm", "--force", "d"]).succeeds();
    assert_eq!((lab.task("d"), containers(&lab).as_str()), (None, ""));
    lab.nothing_is_left();
}

/// Another containerd on this host may have the same IDs: it is not asked.
pub fn another_containerd_with_the_same_id_is_left_alone(backend: Backend) {
    let (lab, other) = (lab_with_waiting_container(backend), lab_with_waiting_container(backend));
    let mut rm = lab.cubecli_command(&["cubebox", "rm", "--force", "c"]);
    rm.env("CONTAINERD_ADDRESS", other.address());
    start(&mut rm).wait(lab.limit()).succeeds();
    assert_eq!(other.task("c").unwrap().0, "RUNNING");
    is_forgotten(&lab);
    lab.nothing_is_left();
    other.remove("c");
    other.nothing_is_left();
}

/// What containerd has of it stays until it is back, which is said.
pub fn kill_and_rm_need_no_containerd(backend: Backend) {
    let lab = lab_with_container(backend);
    lab.kill_containerd();
    lab.cubecli(&["cubebox", "rm", "c"]).fails_with(&["has not stopped", "--force"]);
    lab.cubecli(&["cubebox", "kill", "-s", "TERM", "c"]).succeeds();
    let stopped = || lab.cubecli(&["cubebox", "ls"]).succeeds().out().contains("stopped");
    assert!(poll(lab.limit(), stopped), "it runs on");
    let removed = lab.cubecli(&["cubebox", "rm", "c"]).succeeds();
    assert!(removed.err().contains("does not answer"), "{removed}");
    assert_eq!(fs::read_dir(lab.run_dir()).unwrap().count(), 0);
    lab.cubecli(&["cubebox", "rm", "c"]).exits_with(3);
    nothing_is_left_once_containerd_is_back(&lab);
}

/// By what is on disk, as containerd would have had it done.
pub fn kill_and_rm_need_neither_containerd_nor_shim(backend: Backend) {
    let lab = lab_with_container(backend);
    lab.kill_containerd();
    kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
    lab.cubecli(&["cubebox", "rm", "c"]).fails_with(&["has not stopped", "--force"]);
    lab.cubecli(&["cubebox", "kill", "-s", "TERM", "c"]).fails_with(&["nothing but sigkill"]);
    lab.cubecli(&["cubebox", "kill", "c"]).succeeds();
    // What is left are files: it may be repeated, and removed without force.
    lab.cubecli(&["cubebox", "kill", "c"]).succeeds();
    lab.cubecli(&["cubebox", "rm", "c"]).succeeds();
    assert_eq!(fs::read_dir(lab.run_dir()).unwrap().count(), 0);
    nothing_is_left_once_containerd_is_back(&lab);

    lab.detached("c", &UP);
    lab.kill_containerd();
    kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
    lab.cubecli(&["cubebox", "rm", "--force", "c"]).succeeds();
    assert_eq!(fs::read_dir(lab.run_dir()).unwrap().count(), 0);
    lab.start_containerd();
    is_forgotten(&lab);
    lab.nothing_is_left();
}

/// SIGKILL needs no answer of anybody: with a shim that stands still, neither containerd nor the shim gives one.
pub fn a_shim_that_does_not_answer_holds_up_no_kill(backend: Backend) {
    let lab = lab_with_container(backend);
    let shim = lab.shim_pid("c");
    kill(shim, Signal::SIGSTOP).unwrap();
    let state = fs::read(lab.run_dir().join(lab.key("c")).join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    let vmm = state["vmm_pid"].as_i64().unwrap();
    lab.cubecli(&["cubebox", "kill", "c"]).succeeds();
    let lives =
        |pid: i64| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    assert!(poll(lab.limit(), || !lives(vmm)), "the VMM lives");
    kill(shim, Signal::SIGCONT).unwrap();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// `ctr c rm` while the VM boots: containerd has no container any more, and so nobody removes the task.
pub fn a_task_without_a_container_is_removed(backend: Backend) {
    let lab = Lab::new(backend);
    let mut run = lab.run_command(&["--detach", "--null-io"], "c", &UP);
    let running = start(&mut run);
    let has_state = || lab.cubecli(&["cubebox", "ls"]).succeeds().out().contains(" c ");
    assert!(poll(lab.limit(), has_state), "no state");
    lab.ctr(&["container", "delete", "c"]).succeeds();
    lab.cubecli(&["cubebox", "rm", "--force", "c"]).succeeds();
    running.wait(lab.limit());
    assert_eq!((lab.task("c"), containers(&lab).as_str()), (None, ""));
    lab.nothing_is_left();
}
