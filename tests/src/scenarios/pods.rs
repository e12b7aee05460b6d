//! Pods: several containers in one sandbox, grouped by the annotations that CRI gives them.

use std::{fs, process::Command, thread, time::Duration};

use crate::{
    command::{Finished, poll, start},
    lab::Lab,
    logs,
    needs::Backend,
    paths,
};

/// Says who it is on both streams, and lives until it is killed.
fn speaker(name: &str) -> [String; 3] {
    ["sh".into(), "-c".into(), format!("echo out {name}; echo err {name} >&2; exec sleep 100000")]
}

fn start_in_pod(lab: &Lab, pod: &str, id: &str) {
    let argv = speaker(id);
    run_in_pod(lab, pod, id, &argv.each_ref().map(String::as_str));
}

/// Starts container `id` of the pod `pod` as containerd's CRI plugin does: with its annotations, and in
/// those namespaces of the sandbox container that a pod shares.
fn run_in_pod(lab: &Lab, pod: &str, id: &str, argv: &[&str]) {
    let kind = if id == pod { "sandbox" } else { "container" };
    let kind = format!("io.kubernetes.cri.container-type={kind}");
    let group = format!("io.kubernetes.cri.sandbox-id={pod}");
    let mut flags = vec!["--annotation".to_owned(), kind, "--annotation".to_owned(), group];
    if id != pod {
        let (_, pid) = lab.task(pod).unwrap();
        let join = |kind, file| format!("{kind}:/proc/{pid}/ns/{file}");
        for namespace in [join("ipc", "ipc"), join("uts", "uts"), join("network", "net")] {
            flags.extend(["--with-ns".to_owned(), namespace]);
        }
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    lab.detached_with(&flags, id, argv);
}

fn pod_of_two(backend: Backend) -> Lab {
    let lab = Lab::new(backend);
    start_in_pod(&lab, "pod", "pod");
    start_in_pod(&lab, "pod", "member");
    lab
}

fn wait_for_logs(lab: &Lab, id: &str) {
    for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
        let expected = format!("{word} {id}\n");
        let log = lab.log_dir(id);
        assert!(poll(lab.limit(), || logs::read(&log, stream) == expected.as_bytes()), "{stream} of {id}");
    }
}

/// What exists on the host for container `id`, and for it alone.
fn traces(lab: &Lab, id: &str) -> Vec<String> {
    let own = format!("/shared/{id}");
    lab.leftovers().into_iter().filter(|line| line.contains(&own)).collect()
}

/// One shim, one VM, and each container with its own log, processes and file system.
pub fn the_containers_of_a_pod_share_a_sandbox_and_nothing_else(backend: Backend) {
    let lab = pod_of_two(backend);
    let (pod, member) = (lab.task("pod").unwrap(), lab.task("member").unwrap());
    assert_eq!(pod, member, "state, and the pid of one VMM");
    lab.shim_pid("pod");
    assert!(!lab.run_dir().join(lab.key("member")).exists(), "the member has a sandbox of its own");

    let boot_id = "/proc/sys/kernel/random/boot_id";
    for (namespace, shared) in [("ipc", true), ("uts", true), ("net", true), ("pid", false), ("mnt", false)] {
        let file = format!("/proc/self/ns/{namespace}");
        let [in_pod, in_member] =
            ["pod", "member"].map(|id| lab.exec(id, &["readlink", &file]).succeeds().out());
        assert_eq!(in_pod == in_member, shared, "{namespace}: {in_pod} and {in_member}");
    }
    let in_pod = lab.exec("pod", &["sh", "-c", &format!("cat {boot_id}; touch /mine")]).succeeds().out();
    let in_member =
        lab.exec("member", &["sh", "-c", &format!("cat {boot_id}; ls /mine")]).exits_with(1).out();
    assert_eq!(in_pod, in_member);
    for id in ["pod", "member"] {
        wait_for_logs(&lab, id);
        let processes = lab.exec(id, &["ps"]).succeeds().out();
        assert_eq!(processes.matches("sleep 100000").count(), 1, "{processes}");
    }

    lab.remove("member");
    assert_eq!(traces(&lab, "member"), Vec::<String>::new());
    assert_eq!(lab.task("pod").unwrap(), pod, "the pod goes on");
    lab.exec("pod", &["test", "-e", "/mine"]).succeeds();
    // The id is free again.
    start_in_pod(&lab, "pod", "member");
    lab.exec("member", &["true"]).succeeds();

    lab.remove("member");
    lab.remove("pod");
    lab.nothing_is_left();
    for id in ["pod", "member"] {
        wait_for_logs(&lab, id);
    }
}

/// Counts into its log, until a signal ends it with 3.
const COUNTING: [&str; 3] =
    ["sh", "-c", "trap 'exit 3' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"];

/// It alone stands still, also when the whole pod was paused and resumed meanwhile; a signal waits for its
/// resume, SIGKILL does not.
pub fn a_member_is_paused_and_resumed_alone(backend: Backend) {
    let lab = Lab::new(backend);
    start_in_pod(&lab, "pod", "pod");
    run_in_pod(&lab, "pod", "member", &COUNTING);
    let logged = || fs::metadata(lab.log_dir("member").join("stdout")).map_or(0, |log| log.len());
    assert!(poll(lab.limit(), || logged() > 100), "nothing runs");
    let do_to = |what: &str, id: &str| lab.ctr(&["task", what, id]);
    let state = |id: &str| lab.task(id).unwrap().0;

    do_to("pause", "member").succeeds();
    // What it had written is on its way.
    let rests = || {
        let before = logged();
        thread::sleep(Duration::from_millis(300));
        logged() == before
    };
    assert!(poll(lab.limit(), rests), "something runs");
    let before = logged();
    assert_eq!([state("pod"), state("member")], ["RUNNING", "PAUSED"]);
    assert_eq!(lab.exec("pod", &["echo", "alive"]).succeeds().out(), "alive\n");
    lab.exec("member", &["true"]).fails_with(&["paused"]);
    do_to("pause", "member").fails_with(&["paused"]);
    lab.ctr(&["task", "kill", "--signal", "SIGTERM", "member"]).succeeds();
    let listed = lab.cubecli(&["cubebox", "ls"]).succeeds().out();
    assert!(listed.lines().any(|line| line.contains(" member ") && line.contains(" paused ")), "{listed}");

    do_to("pause", "pod").succeeds();
    assert_eq!([state("pod"), state("member")], ["PAUSED", "PAUSED"]);
    do_to("resume", "member").fails_with(&["whole pod"]);
    do_to("resume", "pod").succeeds();
    lab.cubecli(&["cubebox", "snapshot", "pod"]).fails_with(&["snapshot"]);
    assert_eq!([state("pod"), state("member")], ["RUNNING", "PAUSED"]);
    assert!(rests() && logged() == before, "something has run");

    do_to("resume", "member").succeeds();
    lab.wait_for_state("member", Some("STOPPED"));
    do_to("resume", "member").fails_with(&["stopped"]);
    lab.delete_stopped("member", 3);
    let log = String::from_utf8(logs::read(&lab.log_dir("member"), "stdout")).unwrap();
    let count = log.lines().count();
    assert!(log.lines().eq((0..count).map(|n| n.to_string())), "{log}");

    run_in_pod(&lab, "pod", "member", &COUNTING);
    do_to("pause", "member").succeeds();
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "member"]).succeeds();
    lab.wait_for_state("member", Some("STOPPED"));
    lab.delete_stopped("member", 137);
    lab.exec("pod", &["true"]).succeeds();
    lab.remove("pod");
    lab.nothing_is_left();
}

/// Members go with it, whoever forgot them.
pub fn deleting_the_sandbox_of_a_pod_removes_everything(backend: Backend) {
    let lab = pod_of_two(backend);
    for id in ["pod", "member"] {
        wait_for_logs(&lab, id);
    }
    lab.remove("pod");
    lab.wait_for_state("member", None);
    lab.ctr(&["container", "delete", "member"]).succeeds();
    lab.nothing_is_left();
    for id in ["pod", "member"] {
        wait_for_logs(&lab, id);
    }
}

/// containerd runs it for one container, and knows nothing of pods.
pub fn shim_delete_of_a_member_removes_that_alone(backend: Backend) {
    let lab = pod_of_two(backend);
    let pod = lab.task("pod").unwrap();
    assert_ne!(traces(&lab, "member"), Vec::<String>::new());
    for _ in 0..2 {
        shim_delete(&lab, "member").succeeds();
        assert_eq!(traces(&lab, "member"), Vec::<String>::new());
    }
    assert_eq!(lab.task("pod").unwrap(), pod, "the pod goes on");
    lab.exec("pod", &["true"]).succeeds();
    // containerd has heard that the task is deleted, and says what it thinks of it.
    lab.ctr(&["task", "delete", "--force", "member"]);
    lab.ctr(&["container", "delete", "member"]).succeeds();
    lab.remove("pod");
    lab.nothing_is_left();
    for id in ["pod", "member"] {
        wait_for_logs(&lab, id);
    }
}

/// `containerd-shim-cube-v2 delete` as containerd runs it.
fn shim_delete(lab: &Lab, id: &str) -> Finished {
    let mut command = Command::new(paths::shim());
    command.args(["-namespace", lab.namespace(), "-id", id, "-address"]).arg(lab.address());
    command.args(["-publish-binary", "containerd", "-bundle"]).arg(lab.bundle(id)).arg("delete");
    command.current_dir(lab.bundle(id)).env("TTRPC_ADDRESS", lab.ttrpc_address());
    command.env("CUBE_CONFIG", lab.config_file()).stdin(std::process::Stdio::null());
    start(&mut command).wait(lab.limit())
}
