//! Real containers, as root, in a busybox rootfs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::symlink,
};

use cube_agent::{container::ContainerError, stdio::ChildStdio};
use nix::sys::{
    inotify::{InitFlags, Inotify},
    signal::Signal,
    wait::WaitStatus,
};
use oci_spec::runtime::Process;
use serde_json::{Value, json};
use support::{Fixture, chain, default_spec, reap_any, stdio, wait, within};

fn push(spec: &mut Value, pointer: &str, value: Value) {
    spec.pointer_mut(pointer).unwrap().as_array_mut().unwrap().push(value);
}

#[tokio::test]
async fn the_default_spec_gives_its_own_view_of_the_system() {
    let fixture = Fixture::new();
    let seen = fixture
        .script(default_spec(), "hostname; echo $$; grep ^0: /proc/1/cgroup; readlink /proc/self/ns/net")
        .await;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(&lines[..3], ["box", "1", "0::/init"]);
    // A network namespace without a path is the guest's own network.
    assert_eq!(lines[3], fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap());
    for kind in ["mnt", "pid", "uts", "ipc", "cgroup"] {
        let inside = fixture.script(default_spec(), &format!("readlink /proc/self/ns/{kind}")).await;
        let outside = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(inside.trim(), outside.to_str().unwrap());
    }
}

#[tokio::test]
async fn the_mounts_are_those_of_the_spec_and_nothing_of_the_guest_is_left() {
    let fixture = Fixture::new();
    let mounts = fixture.script(default_spec(), "cat /proc/mounts").await;
    let points: Vec<&str> = mounts.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
    for point in ["/", "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/run", "/proc/sys"] {
        assert!(points.contains(&point), "{point} in\n{mounts}");
    }
    assert!(
        mounts.lines().any(|line| line.starts_with("proc /proc proc rw,nosuid,nodev,noexec")),
        "{mounts}"
    );
    assert!(mounts.lines().any(|line| line.starts_with("sysfs /sys sysfs ro,")), "{mounts}");
    let known = ["/", "/proc", "/dev", "/sys", "/run"];
    assert!(
        points.iter().all(|point| known.contains(point) || known[1..].iter().any(|k| point.starts_with(k))),
        "{mounts}"
    );
}

#[tokio::test]
async fn masked_and_read_only_paths_are_that() {
    let fixture = Fixture::new();
    let script = "cat /proc/kcore | wc -c; cat /proc/keys | wc -c; ls /sys/firmware | wc -l
        echo x > /proc/sys/kernel/hostname || echo denied; touch /sys/x || echo denied; touch /here && echo made";
    let seen = fixture.script(default_spec(), script).await;
    let lines: Vec<&str> = seen.lines().filter(|line| !line.contains(':')).collect();
    assert_eq!(lines, ["0", "0", "0", "denied", "denied", "made"], "{seen}");
}

#[tokio::test]
async fn a_read_only_rootfs_is_read_only_and_its_tmpfs_are_not() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["root"]["readonly"] = json!(true);
    let seen = fixture.script(spec, "touch /here 2>&1 || echo denied; touch /run/there && echo made").await;
    assert_eq!(seen, "touch: /here: Read-only file system\ndenied\nmade\n");
}

#[tokio::test]
async fn a_read_only_tmpfs_can_hold_mount_points_and_devices() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    push(&mut spec, "/mounts/1/options", json!("ro"));
    let seen =
        fixture.script(spec, "touch /dev/x 2>&1; touch /dev/shm/y && echo made > /dev/null && echo ok").await;
    assert_eq!(seen, "touch: /dev/x: Read-only file system\nok\n");
}

#[tokio::test]
async fn the_process_is_who_and_where_the_spec_says() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    let process = &mut spec["process"];
    process["user"] = json!({"uid": 1000, "gid": 1001, "umask": 0o027, "additionalGids": [7, 8]});
    process["cwd"] = json!("/made/for/it");
    process["env"] = json!(["PATH=/bin", "GREETING=hello world"]);
    process["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]);
    process["oomScoreAdj"] = json!(321);
    let script = "id -u; id -g; id -G; umask; pwd; echo $GREETING; echo $HOME; ulimit -n; ulimit -Hn; ulimit -c
        cat /proc/self/oom_score_adj; grep -E 'NoNewPrivs|SigBlk|SigIgn' /proc/self/status; ls /proc/self/fd | wc -l
        echo again > /dev/stdout";
    let seen = fixture.script(spec, script).await;
    let expected = "1000\n1001\n1001 7 8\n0027\n/made/for/it\nhello world\n/home/user\n100\n200\n0\n321\n\
        SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nNoNewPrivs:\t1\n4\nagain\n";
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn capabilities_are_exactly_those_of_the_spec() {
    let fixture = Fixture::new();
    let script = "grep -E '^Cap' /proc/self/status | cut -f2 | tr '\n' ' '";
    // The bits of the default list, in all sets but the inheritable and the ambient one.
    let default = "00000000a80425fb";
    let root = fixture.script(default_spec(), script).await;
    assert_eq!(root, format!("0000000000000000 {default} {default} {default} 0000000000000000 "));

    let mut user = default_spec();
    user["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let kill = json!(["CAP_KILL"]);
    user["process"]["capabilities"] =
        json!({"bounding": kill, "effective": kill, "permitted": kill, "inheritable": kill, "ambient": kill});
    assert_eq!(fixture.script(user, script).await, "0000000000000020 ".repeat(5));

    let mut none = default_spec();
    none["process"]["capabilities"] = Value::Null;
    assert_eq!(fixture.script(none, script).await, "0000000000000000 ".repeat(5));
}

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
async fn a_privileged_container_may_do_what_the_guest_may() {
    let fixture = Fixture::new();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap();
    let bits = u64::from_str_radix(bounding, 16).unwrap();
    let all = caps::all().into_iter().filter(|capability| bits & capability.bitmask() != 0);
    let all: Vec<String> = all.map(|capability| capability.to_string()).collect();
    let mut spec = default_spec();
    spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    spec["linux"]["maskedPaths"] = Value::Null;
    spec["linux"]["readonlyPaths"] = Value::Null;
    spec["mounts"][5]["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
    let script = "grep CapEff /proc/self/status | cut -f2; mknod /log c 1 11 && : > /log && echo opened
        mkdir /m && mount -t tmpfs none /m && echo mounted; test -w /proc/sys/kernel/shmmni && echo writable";
    assert_eq!(fixture.script(spec, script).await, format!("{bounding}\nopened\nmounted\nwritable\n"));
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_named_by_create() {
    let fixture = Fixture::new();
    for (program, expected) in [
        ("/bin/nosuch", "exec /bin/nosuch: No such file or directory (os error 2)"),
        (
            "nosuch",
            "exec \"nosuch\": executable file not found in $PATH: No such file or directory (os error 2)",
        ),
        ("/etc/passwd", "exec /etc/passwd: Permission denied (os error 13)"),
        ("/etc", "exec /etc: Is a directory (os error 21)"),
    ] {
        let mut spec = default_spec();
        spec["process"]["args"] = json!([program]);
        let error = fixture.refused(spec).await;
        assert_eq!(chain(&error), expected);
    }
}

#[tokio::test]
async fn what_execve_refuses_is_the_error_of_start() {
    let fixture = Fixture::new();
    let script = fixture.rootfs().join("bin/broken");
    fs::copy("/bin/busybox", &script).unwrap();
    fs::write(&script, "#!/nosuch/interpreter\n").unwrap();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["broken"]);
    let (mut container, spawned, _output) = fixture.create(spec).await.unwrap();
    let error = within(container.start()).await.unwrap_err();
    assert_eq!(chain(&error), "exec /bin/broken: No such file or directory (os error 2)");
    wait(&spawned);
    within(container.delete()).await.unwrap();
    within(container.delete()).await.unwrap();
}

#[tokio::test]
async fn a_failing_step_is_named_and_leaves_nothing() {
    let fixture = Fixture::new();
    let mounts = || {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let place = fixture.outside("").display().to_string();
        all.lines().filter(|line| line.contains(&place)).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = mounts();
    let mut mount = default_spec();
    push(
        &mut mount,
        "/mounts",
        json!({"destination": "/data", "type": "bind", "source": "/nosuch/volume", "options": ["rbind"]}),
    );
    let error = fixture.refused(mount).await;
    assert_eq!(
        chain(&error),
        "find /nosuch/volume, the source of a bind mount: No such file or directory (os error 2)"
    );
    let mut fs_type = default_spec();
    push(&mut fs_type, "/mounts", json!({"destination": "/data", "type": "nosuchfs", "source": "x"}));
    assert_eq!(
        chain(&fixture.refused(fs_type).await),
        "mount nosuchfs on /data: No such device (os error 19)"
    );
    assert_eq!(mounts(), before);
}

#[tokio::test]
async fn bind_mounts_keep_to_their_options() {
    let fixture = Fixture::new();
    let volume = fixture.outside("volume");
    fs::write(volume.join("file"), "text\n").unwrap();
    let source = volume.to_str().unwrap();
    let mut spec = default_spec();
    for (destination, options) in
        [("/rw", ["rbind", "rw"]), ("/ro", ["rbind", "ro"]), ("/noexec", ["bind", "rnoexec"])]
    {
        push(
            &mut spec,
            "/mounts",
            json!({"destination": destination, "type": "bind", "source": source, "options": options}),
        );
    }
    let file = format!("{source}/file");
    push(
        &mut spec,
        "/mounts",
        json!({"destination": "/etc/deep/conf", "type": "bind", "source": file, "options": ["bind", "ro"]}),
    );
    let script = "cat /etc/deep/conf; echo new > /rw/new; cat /ro/new; touch /ro/x 2>&1; grep -c ' /noexec .*noexec' /proc/mounts";
    let seen = fixture.script(spec, script).await;
    assert_eq!(seen, "text\nnew\ntouch: /ro/x: Read-only file system\n1\n");
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "new\n");
}

#[tokio::test]
async fn a_link_in_the_rootfs_leads_no_mount_out_of_it() {
    let fixture = Fixture::new();
    let outside = fixture.outside("outside");
    symlink(&outside, fixture.rootfs().join("data")).unwrap();
    symlink("../../../../../../../../../../tmp/climbed", fixture.rootfs().join("climb")).unwrap();
    let mut spec = default_spec();
    for destination in ["/data/inner", "/climb"] {
        push(&mut spec, "/mounts", json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"}));
    }
    let seen = fixture
        .script(spec, "touch /data/inner/x /climb/y && grep -c tmpfs.*inner /proc/mounts; ls /tmp/climbed")
        .await;
    assert_eq!(seen, "1\ny\n");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);

    symlink("/run", fixture.rootfs().join("proc2")).unwrap();
    fs::remove_dir(fixture.rootfs().join("proc")).unwrap();
    symlink("/run", fixture.rootfs().join("proc")).unwrap();
    let error = chain(&fixture.refused(default_spec()).await);
    assert!(error.starts_with("mount proc on /proc, which is a symbolic link"), "{error}");
}

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
    // A pid namespace lives on until all its zombies are reaped.
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
async fn sysctls_and_names_are_set_in_the_containers_namespaces_only() {
    let fixture = Fixture::new();
    let before = fs::read_to_string("/proc/sys/kernel/shmmni").unwrap();
    let mut spec = default_spec();
    spec["domainname"] = json!("example");
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "123", "fs.mqueue.msg_max": "12"});
    let seen =
        fixture.script(spec, "cd /proc/sys; cat kernel/shmmni fs/mqueue/msg_max kernel/domainname").await;
    assert_eq!(seen, "123\n12\nexample\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(), before);
}

#[tokio::test]
async fn namespaces_with_a_path_are_joined() {
    let fixture = Fixture::new();
    let other = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec.clone()).await.unwrap();
    within(container.start()).await.unwrap();
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", init.pid);
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"},
        {"type": "pid", "path": path("pid")},
        {"type": "ipc", "path": path("ipc")},
        {"type": "uts", "path": path("uts")},
        {"type": "network", "path": path("net")},
    ]);
    spec.as_object_mut().unwrap().remove("hostname");
    let seen = other
        .script(spec, "hostname; cat /proc/1/comm; (readlink /proc/1/ns/ipc; readlink /proc/self/ns/ipc) | uniq | wc -l")
        .await;
    assert_eq!(seen, "box\nsleep\n1\n");
    within(container.delete()).await.unwrap();
    wait(&init);
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

const CONTROLLERS: &str = "needs the cpu, memory and pids controllers in cgroup v2";

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

#[tokio::test]
async fn the_guests_own_descriptors_and_directories_are_out_of_reach() {
    let fixture = Fixture::new();
    for fd in 3..12 {
        let mut spec = default_spec();
        spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
        fixture.refused(spec).await;
    }
}

#[tokio::test]
async fn vsock_is_closed_to_containers_unless_it_is_allowed() {
    for (no_new_privileges, allow, vsock) in
        [(true, false, "EPERM"), (false, false, "EPERM"), (true, true, "allowed")]
    {
        let fixture = Fixture::new();
        let mut spec = default_spec();
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let program = std::env::current_exe().unwrap();
        // The probe is this very program, with the libraries that it is linked to.
        let mounts =
            [("/usr", "/usr"), ("/lib", "/lib"), ("/lib64", "/lib64"), (program.to_str().unwrap(), "/probe")];
        for (source, destination) in mounts {
            push(
                &mut spec,
                "/mounts",
                json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]}),
            );
        }
        spec["process"]["args"] =
            json!(["/probe", "--ignored", "--exact", "--nocapture", "probe_the_system_call_filter"]);
        let (mut container, spawned, output) = fixture.create_with(spec, allow).await.unwrap();
        within(container.start()).await.unwrap();
        let seen = output.text().await;
        wait(&spawned);
        within(container.delete()).await.unwrap();
        assert!(seen.contains("inet=allowed"), "{seen}");
        // Where the kernel has no vsock at all, that is what an allowed call finds.
        let found =
            |name: &str| seen.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned).unwrap();
        if allow {
            assert_ne!(found("vsock="), "EPERM", "{seen}");
        } else {
            assert_eq!((found("vsock="), found("vsock pair=")), (vsock.into(), "EPERM".into()), "{seen}");
            assert_eq!((found("io_uring="), found("x32=")), ("ENOSYS".into(), "ENOSYS".into()), "{seen}");
        }
    }
}

#[test]
#[ignore = "runs inside of the containers of vsock_is_closed_to_containers_unless_it_is_allowed"]
fn probe_the_system_call_filter() {
    let outcome = |result: libc::c_long| match nix::errno::Errno::result(result) {
        Ok(_) => "allowed".to_owned(),
        Err(errno) => format!("{errno:?}"),
    };
    let mut pair = [0i32; 2];
    // SAFETY: system calls on numbers and living memory; the descriptors they make live until the end.
    unsafe {
        println!();
        println!("inet={}", outcome(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into()));
        println!("vsock={}", outcome(libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0).into()));
        println!(
            "vsock pair={}",
            outcome(libc::socketpair(libc::AF_VSOCK, libc::SOCK_STREAM, 0, pair.as_mut_ptr()).into())
        );
        println!("io_uring={}", outcome(libc::syscall(libc::SYS_io_uring_setup, 1, [0u8; 120].as_mut_ptr())));
        println!(
            "x32={}",
            outcome(libc::syscall(libc::SYS_socket | 0x4000_0000, libc::AF_VSOCK, libc::SOCK_STREAM, 0))
        );
    }
}
