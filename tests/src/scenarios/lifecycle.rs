//! From create to delete, through `ctr` and directly.

use std::time::Duration;

use containerd_shim_protos::{
    events::task::{TaskDelete, TaskExit, TaskStart},
    ttrpc::{Code, Error},
};
use serde_json::json;

use super::{WAIT, lab_with_waiting_container};
use crate::{
    command::{poll, start},
    direct::{Direct, bind_mount, spec},
    lab::{Lab, Setup},
    leftovers,
    needs::Backend,
};

/// The fixture itself, with containerd's own runtime: if this fails, look at the harness first.
pub fn the_harness_works_with_runc(backend: Backend) {
    let lab = Lab::with(Setup { runtime: "io.containerd.runc.v2".into(), ..backend.into() });
    let finished = lab.run("c", &["sh", "-c", "echo out; echo err >&2; exit 3"]).exits_with(3);
    assert_eq!((finished.out().as_str(), finished.err().as_str()), ("out\n", "err\n"));
    lab.detached("d", &["sleep", "1000"]);
    assert_ne!(lab.leftovers().len(), 0, "a running container must show among the leftovers");
    lab.remove("d");
    lab.nothing_is_left();
}

/// What makes `nothing_is_left` mean something.
pub fn a_running_sandbox_has_what_the_leftover_check_looks_for(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let key = lab.key("c");
    let run_dir = lab.run_dir().join(&key);
    assert!(run_dir.is_dir(), "{} among {:?}", run_dir.display(), lab.leftovers());
    let found = lab.leftovers();
    for kind in ["process ", "file ", "mount ", "cgroup "] {
        assert!(found.iter().any(|line| line.starts_with(kind)), "no {kind}among {found:#?}");
    }
    let in_cgroup = leftovers::cgroups(&[key]);
    assert!(in_cgroup.iter().any(|cgroup| cgroup.ends_with("helpers")), "{in_cgroup:?}");
    lab.remove("c");
    lab.nothing_is_left();
}

/// State, processes and metrics of a running task, and its way to the end.
pub fn a_task_can_be_listed_measured_killed_and_deleted(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let (state, pid) = lab.task("c").unwrap();
    assert_eq!(state, "RUNNING");
    assert!(pid > 1, "pid {pid}");
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "pid {pid} is none of this host");
    assert!(lab.ctr(&["task", "ps", "c"]).succeeds().out().lines().count() > 1);
    let metrics = lab.ctr(&["task", "metrics", "c"]).succeeds().out();
    // Hosts with cgroup v1 have no memory controller for the process backend.
    let expected = if backend.is_vm() { "memory.usage" } else { "cpu.usage_usec" };
    assert!(metrics.contains(expected), "{metrics}");
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "c"]).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// An exec has the container's file system and namespaces, its own output and exit status.
pub fn another_process_runs_in_a_container(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let finished =
        lab.exec("c", &["sh", "-c", "echo out; echo err >&2; cat /proc/1/cmdline; exit 7"]).exits_with(7);
    assert!(finished.out().starts_with("out\nsh\0-c\0trap"), "{finished}");
    assert_eq!(finished.err(), "err\n");
    lab.exec("c", &["/bin/nosuch"]).fails_with(&["/bin/nosuch", "no such file or directory"]);
    lab.exec("c", &["true"]).succeeds();
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");
    lab.remove("c");
    lab.nothing_is_left();
}

/// The container that has the id goes on undisturbed.
pub fn an_id_that_is_taken_is_refused(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let second = start(&mut lab.run_command(&["--rm"], "c", &["true"])).wait(lab.limit());
    second.fails_with(&["already exists"]);
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");
    lab.exec("c", &["true"]).succeeds();
    lab.remove("c");
    lab.nothing_is_left();
}

/// As containerd's own shim sends them.
pub fn events_come_in_order_with_the_fields_of_containerds_own_shim(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["sh", "-c", "exit 5"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    let pid = direct.create(bind_mount(&rootfs)).unwrap();
    assert!(pid > 1, "pid {pid}");
    assert_eq!(direct.start().unwrap(), pid);
    assert_eq!(direct.wait().unwrap(), 5);
    let exit: TaskExit = direct.event("/tasks/exit");
    assert_eq!((exit.container_id.as_str(), exit.id.as_str()), ("c", "c"));
    assert_eq!((exit.pid, exit.exit_status), (pid, 5));
    assert!(exit.exited_at.is_some());
    assert_eq!(direct.event::<TaskStart>("/tasks/start").pid, pid);
    let deleted = direct.delete().unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 5));
    assert_eq!(deleted.exited_at, exit.exited_at);
    let delete: TaskDelete = direct.event("/tasks/delete");
    assert_eq!((delete.pid, delete.exit_status), (pid, 5));
    let topics = direct.topics();
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    direct.finish();
    lab.nothing_is_left();
}

/// More than a message of ttrpc takes, in many fields and in a large one.
pub fn a_config_json_of_16_megabytes_works(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &[]);
    let mut spec = spec(&["sh", "-c", "exit $LAST"]);
    let small = (0..10_000).map(|n| (format!("example.com/{n}"), "x".repeat(100).into()));
    let large = ("example.com/large".to_owned(), "y".repeat(15 << 20).into());
    spec["annotations"] = small.chain([large]).collect::<serde_json::Map<_, _>>().into();
    spec["process"]["env"] = json!(["PATH=/bin:/usr/bin", "LAST=7"]);
    assert!(spec.to_string().len() > 16 << 20);
    direct.write_spec(&spec);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    assert_eq!(direct.wait().unwrap(), 7);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

/// `Wait` of a task that is killed before it was started returns, and its Delete works.
pub fn a_created_task_can_be_killed(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &WAIT);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.kill(9).unwrap();
    assert_eq!(direct.wait().unwrap(), 137);
    let again = poll(Duration::from_secs(5), || is_not_found(direct.kill(9).err()));
    assert!(again, "Kill of a stopped task must be NotFound: {:?}", direct.kill(9));
    direct.delete().unwrap();
    assert!(is_not_found(direct.state().err()), "State of a deleted task must be NotFound");
    direct.finish();
    lab.nothing_is_left();
}

fn is_not_found(error: Option<Error>) -> bool {
    matches!(error, Some(Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND)
}
