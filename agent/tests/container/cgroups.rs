//! Limits, devices, and what a container sees of its cgroup.

use nix::sys::{signal::Signal, wait::WaitStatus};
use oci_spec::runtime::Process;
use serde_json::json;

use crate::{
    push,
    support::{Fixture, default_spec, stdio, wait, within},
};

const CONTROLLERS: &str = "needs the cpu, memory and pids controllers in cgroup v2";

#[tokio::test]
async fn only_allowed_devices_can_be_opened() {
    let fixture = Fixture::new();
    let script = "head -c 1 /dev/zero | wc -c; echo x > /dev/null && echo null
        ls -l /dev/fd /dev/stdin /dev/ptmx | sed 's/.* \\/dev/\\/dev/'
        mknod /dev/kmsg c 1 11 && echo noded; head -c 1 /dev/kmsg 2>&1";
    let seen = fixture.script(default_spec(), &format!("{script} || echo denied")).await;
    let expected = "1\nnull\n/dev/fd -> /proc/self/fd\n/dev/ptmx -> pts/ptmx\n/dev/stdin -> /proc/self/fd/0\n\
        noded\nhead: /dev/kmsg: Operation not permitted\n";
    assert_eq!(seen, format!("{expected}denied\n"));

    let mut allowed = default_spec();
    let device = json!({"path": "/dev/extra/log", "type": "c", "major": 1, "minor": 11, "fileMode": 0o640, "uid": 3, "gid": 4});
    allowed["linux"]["devices"] = json!([device]);
    push(
        &mut allowed,
        "/linux/resources/devices",
        json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"}),
    );
    let seen = fixture
        .script(allowed, "stat -c '%a %u %g %t,%T' /dev/extra/log; : > /dev/extra/log && echo open")
        .await;
    assert_eq!(seen, "640 3 4 1,b\nopen\n");
}

#[tokio::test]
async fn a_cgroup_mount_shows_the_containers_part_read_only() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    push(
        &mut spec,
        "/mounts",
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime"]}),
    );
    let seen = fixture
        .script(
            spec,
            "cat /sys/fs/cgroup/init/cgroup.procs | head -1; mkdir /sys/fs/cgroup/x 2>&1 || echo denied",
        )
        .await;
    assert_eq!(seen, "1\nmkdir: can't create directory '/sys/fs/cgroup/x': Read-only file system\ndenied\n");
}

#[tokio::test]
async fn a_limit_without_its_controller_is_refused_by_name() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["linux"]["resources"]["unified"] = json!({"nosuch.max": "1"});
    let error = fixture.refused(spec).await.to_string();
    assert!(error.contains("linux.resources.unified"), "{error}");
    assert!(error.contains("the nosuch controller is not available in"), "{error}");
}

#[tokio::test]
#[ignore = "needs the cpu, memory and pids controllers in cgroup v2"]
async fn limits_are_in_force_and_controllers_are_delegated() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    let resources = &mut spec["linux"]["resources"];
    resources["memory"] = json!({"limit": 32 << 20, "reservation": 16 << 20});
    resources["cpu"] = json!({"shares": 1024, "quota": 50_000, "period": 100_000});
    resources["pids"] = json!({"limit": 20});
    let cgroup =
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]});
    push(&mut spec, "/mounts", cgroup);
    let script = "cd /sys/fs/cgroup; cat memory.max memory.low cpu.weight cpu.max pids.max
        for c in memory pids; do grep -q $c cgroup.subtree_control || echo $c is missing; done
        mkdir inner && echo 5 > inner/pids.max && echo delegated
        i=0; while [ $i -lt 30 ]; do sleep 1000 & i=$((i+1)); done";
    spec["process"]["args"] = json!(["sh", "-c", script]);
    let (mut container, spawned, output) = fixture.create(spec).await.expect(CONTROLLERS);
    within(container.start()).await.unwrap();
    wait(&spawned);
    let metrics = container.stats().unwrap();
    assert_eq!((metrics.pids.limit, metrics.memory.usage_limit), (20, 32 << 20));
    assert!(metrics.cpu.usage_usec > 0);
    let seen = output.text().await;
    assert!(seen.starts_with("33554432\n16777216\n39\n50000 100000\n20\ndelegated\n"), "{seen}");
    assert!(seen.contains("can't fork"), "{seen}");
    within(container.delete()).await.unwrap();
}

#[tokio::test]
#[ignore = "needs the cpu, memory and pids controllers in cgroup v2"]
async fn a_kill_for_want_of_memory_is_told_and_update_lifts_a_limit() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec.clone()).await.expect(CONTROLLERS);
    within(container.start()).await.unwrap();
    let mut process = spec["process"].clone();
    // Without a newline, tail keeps all that it reads.
    process["args"] = json!(["sh", "-c", "exec tail -c 64m < /dev/zero"]);
    let (pipes, _output) = stdio(&process);
    let exec: Process = serde_json::from_value(process).unwrap();
    let spawned = within(container.exec(&exec, pipes)).await.unwrap();
    assert_eq!(within(container.oom_kills_after(0)).await, 1);
    assert!(matches!(wait(&spawned), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    assert_eq!(container.stats().unwrap().memory_events.oom_kill, 1);

    let lifted = serde_json::from_value(json!({"memory": {"limit": 64 << 20}})).unwrap();
    container.update(&lifted).unwrap();
    assert_eq!(container.stats().unwrap().memory.usage_limit, 64 << 20);
    within(container.delete()).await.unwrap();
    wait(&init);
}
