//! Execs, terminals, signals, and the end of a container.

use std::{
    fs,
    io::{Read, Write},
};

use cube_agent::{container::ContainerError, stdio::ChildStdio};
use nix::sys::{
    inotify::{InitFlags, Inotify},
    signal::Signal,
    wait::WaitStatus,
};
use oci_spec::runtime::Process;
use serde_json::json;

use crate::{
    push,
    support::{Fixture, chain, default_spec, reap_any, stdio, wait, within},
};

#[tokio::test]
async fn an_exec_joins_the_container() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec.clone()).await.unwrap();
    let mut process = spec["process"].clone();
    process["args"] = json!(["sh", "-c",
        "for ns in mnt pid uts ipc net cgroup; do (readlink /proc/1/ns/$ns; readlink /proc/self/ns/$ns) | uniq | wc -l; done
         hostname; grep ^0: /proc/self/cgroup; cat /proc/1/comm; grep -E '^(Seccomp|NoNewPrivs):|CapBnd' /proc/self/status"]);
    let too_early: Process = serde_json::from_value(process.clone()).unwrap();
    let error = within(container.exec(&too_early, stdio(&process).0)).await.unwrap_err();
    assert!(matches!(error, ContainerError::State { state: "created", .. }), "{error}");

    within(container.start()).await.unwrap();
    let (pipes, output) = stdio(&process);
    let exec: Process = serde_json::from_value(process.clone()).unwrap();
    let spawned = within(container.exec(&exec, pipes)).await.unwrap();
    let seen = output.text().await;
    assert_eq!(
        seen,
        "1\n1\n1\n1\n1\n1\nbox\n0::/init\nsleep\nCapBnd:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n"
    );
    assert!(matches!(wait(&spawned), WaitStatus::Exited(_, 0)));

    process["args"] = json!(["/no/such/program"]);
    let absent: Process = serde_json::from_value(process.clone()).unwrap();
    let error = within(container.exec(&absent, stdio(&process).0)).await.unwrap_err();
    assert_eq!(chain(&error), "exec /no/such/program: No such file or directory (os error 2)");
    // The stages.
    reap_any();
    reap_any();

    assert_eq!(container.pids().unwrap(), [init.pid]);
    container.kill_all(libc::SIGKILL).unwrap();
    assert!(matches!(wait(&init), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    within(container.delete()).await.unwrap();
}

#[tokio::test]
async fn a_terminal_is_the_containers_own() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"width": 91, "height": 23});
    let script = "tty; stty size; test -c /dev/console && readlink /proc/self/fd/0; ps -o tty,pid; read line; echo got $line";
    spec["process"]["args"] = json!(["sh", "-c", script]);
    let (mut container, spawned, _) = fixture.create(spec.clone()).await.unwrap();
    within(container.start()).await.unwrap();
    let mut master = fs::File::from(spawned.terminal.as_ref().unwrap().try_clone().unwrap());
    master.write_all(b"hello\n").unwrap();
    let seen = read_terminal(master).await;
    // The echo of the input may come anywhere in between.
    assert_eq!(seen.matches("/dev/pts/0\r\n").count(), 2, "{seen}");
    assert!(seen.contains("23 91\r\n"), "{seen}");
    assert!(seen.contains("136,0"), "a controlling terminal: {seen}");
    assert!(seen.contains("got hello"), "{seen}");
    assert!(matches!(wait(&spawned), WaitStatus::Exited(_, 0)));
    within(container.delete()).await.unwrap();

    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/dev/pts");
    let error = chain(&fixture.refused(spec).await);
    assert!(error.contains("open a terminal at /dev/pts/ptmx, where mounts must have a devpts"), "{error}");
}

#[tokio::test]
async fn an_exec_can_have_a_terminal_of_its_own() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec.clone()).await.unwrap();
    within(container.start()).await.unwrap();
    let mut process = spec["process"].clone();
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    process["args"] = json!(["sh", "-c", "tty; stat -c %u $(tty); echo open > /dev/tty"]);
    let process: Process = serde_json::from_value(process).unwrap();
    let spawned = within(container.exec(&process, ChildStdio::Terminal)).await.unwrap();
    let seen = read_terminal(spawned.terminal.as_ref().unwrap().try_clone().unwrap().into()).await;
    assert_eq!(seen, "/dev/pts/0\r\n1000\r\nopen\r\n");
    wait(&spawned);
    within(container.delete()).await.unwrap();
    wait(&init);
}

/// Everything until the last process has closed the other end, which reads as EIO.
async fn read_terminal(mut master: fs::File) -> String {
    let reading = tokio::task::spawn_blocking(move || {
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(length @ 1..) = master.read(&mut buffer) {
            text.extend_from_slice(&buffer[..length]);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    within(reading).await.unwrap()
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_deleted() {
    let fixture = Fixture::new();
    let (mut container, spawned, output) = fixture.create(default_spec()).await.unwrap();
    assert_eq!(container.pids().unwrap(), [spawned.pid]);
    within(container.delete()).await.unwrap();
    assert!(matches!(wait(&spawned), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    assert_eq!(output.text().await, "");
    assert!(!fixture.cgroup("c1").exists());
    assert!(matches!(container.start().await, Err(ContainerError::State { state: "deleted", .. })));
}

#[tokio::test]
async fn delete_kills_every_process_even_those_in_cgroups_of_the_containers_own() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    push(
        &mut spec,
        "/mounts",
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]}),
    );
    let script = "mkdir /sys/fs/cgroup/inner && echo $$ > /sys/fs/cgroup/inner/cgroup.procs
        grep ^0: /proc/self/cgroup; sleep 1000 & sleep 1000 & echo ready; wait";
    spec["process"]["args"] = json!(["sh", "-c", script]);
    spec["process"]["env"] = json!(["PATH=/bin"]);
    let (mut container, spawned, output) = fixture.create(spec).await.unwrap();
    within(container.start()).await.unwrap();
    while container.pids().unwrap().len() < 3 {
        tokio::task::yield_now().await;
    }
    assert!(fixture.cgroup("c1/inner").exists());
    let metrics = container.stats().unwrap();
    assert!(metrics.cpu.is_some());
    within(container.delete()).await.unwrap();
    assert!(matches!(wait(&spawned), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    let seen = output.text().await;
    assert!(seen.starts_with("0::/inner\n"), "{seen}");
    assert!(!fixture.cgroup("c1").exists());
}

/// They are limited per user, and a container may have taken them all.
#[tokio::test]
async fn delete_needs_no_inotify_instance() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec).await.unwrap();
    within(container.start()).await.unwrap();
    let mut taken = Vec::new();
    while let Ok(instance) = Inotify::init(InitFlags::IN_CLOEXEC) {
        taken.push(instance);
    }
    let deleted = within(container.delete()).await;
    drop(taken);
    deleted.unwrap();
    assert!(!fixture.cgroup("c1").exists());
    wait(&init);
}

#[tokio::test]
async fn signals_other_than_kill_reach_every_process() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] =
        json!(["sh", "-c", "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.01; done"]);
    let (mut container, spawned, output) = fixture.create(spec).await.unwrap();
    within(container.start()).await.unwrap();
    let text = tokio::spawn(output.text());
    // The shell is in its loop, with the trap set, once it has a child.
    while container.pids().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    container.kill_all(libc::SIGTERM).unwrap();
    // The shell also tells of the sleep that got the signal.
    assert!(within(text).await.unwrap().ends_with("term\n"));
    assert!(matches!(wait(&spawned), WaitStatus::Exited(_, 3)));
    within(container.delete()).await.unwrap();
}
