//! What the spec says is what the process finds.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use cube_agent::container::parse;
use serde_json::json;

use crate::{
    push,
    support::{Fixture, chain, default_spec, reap_any, stdio, wait, within},
};

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
async fn a_tmpfs_has_the_mode_of_the_directory_that_it_covers() {
    let fixture = Fixture::new();
    let private = fixture.rootfs().join("private");
    fs::create_dir(&private).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o1750)).unwrap();
    let mut spec = default_spec();
    for (destination, options) in
        [("/private", json!(["nosuid"])), ("/new", json!(["nosuid"])), ("/run", json!(["mode=700"]))]
    {
        let mount =
            json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options});
        push(&mut spec, "/mounts", mount);
    }
    // As with runc: a directory that is made for the mount has no mode to pass on, and tmpfs has its own.
    assert_eq!(fixture.script(spec, "stat -c %a /private /new /run").await, "1750\n1777\n700\n");
}

#[tokio::test]
async fn a_destination_with_dots_is_cleaned_and_stays_inside() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    for destination in ["/no/such/../../cleaned", "/../../../../inside", "relative"] {
        let mount = json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"});
        push(&mut spec, "/mounts", mount);
    }
    let seen = fixture
        .script(spec, "grep -c -E '^tmpfs /(cleaned|inside|relative) ' /proc/mounts; ls -d /no 2>&1; true")
        .await;
    assert!(seen.starts_with("3\n") && seen.contains("No such file"), "{seen}");
}

#[tokio::test]
async fn a_tmpfs_with_tmpcopyup_begins_with_what_it_covers_and_changes_stay_in_it() {
    let fixture = Fixture::new();
    let covered = fixture.rootfs().join("covered");
    fs::create_dir_all(covered.join("below")).unwrap();
    fs::write(covered.join("below/file"), "text\n").unwrap();
    symlink("/etc/passwd", covered.join("link")).unwrap();
    let mut spec = default_spec();
    let options = json!(["nosuid", "tmpcopyup", "ro"]);
    let mount = json!({"destination": "/covered", "type": "tmpfs", "source": "tmpfs", "options": options});
    push(&mut spec, "/mounts", mount.clone());
    let script = "cat /covered/below/file; readlink /covered/link; touch /covered/x 2>&1; true";
    let seen = fixture.script(spec.clone(), script).await;
    assert_eq!(seen, "text\n/etc/passwd\ntouch: /covered/x: Read-only file system\n");
    spec["mounts"].as_array_mut().unwrap().last_mut().unwrap()["options"] = json!(["tmpcopyup"]);
    fixture.script(spec, "echo other > /covered/below/file").await;
    assert_eq!(fs::read_to_string(covered.join("below/file")).unwrap(), "text\n");
}

#[tokio::test]
async fn the_home_is_found_among_names_that_are_not_utf_8() {
    let fixture = Fixture::new();
    let users = b"m:x:9:9:M\xfcller:/home/m:/bin/sh\nuser:x:1000:1000:\xff:/home/user:/bin/sh\n";
    fs::write(fixture.rootfs().join("etc/passwd"), users).unwrap();
    let mut spec = default_spec();
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    assert_eq!(fixture.script(spec, "echo $HOME").await, "/home/user\n");
}

#[tokio::test]
async fn an_exec_in_a_directory_that_does_not_exist_is_an_error_and_makes_none() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec.clone()).await.unwrap();
    within(container.start()).await.unwrap();
    let mut process = spec["process"].clone();
    process["cwd"] = json!("/no/such/directory");
    let (stdio, _output) = stdio(&process);
    let process = parse(process.to_string().as_bytes()).unwrap();
    let error = within(container.exec(&process, stdio)).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("/no/such/directory") && text.contains("No such file"), "{text}");
    assert!(!fixture.rootfs().join("no").exists());
    // A pid namespace lives on until all its zombies are reaped.
    reap_any();
    within(container.delete()).await.unwrap();
    wait(&init);
}

#[tokio::test]
async fn an_update_takes_the_device_rules_of_the_create_and_no_others() {
    let fixture = Fixture::new();
    let mut spec = default_spec();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, init, _output) = fixture.create(spec.clone()).await.unwrap();
    within(container.start()).await.unwrap();
    let mut resources = json!({"devices": spec["linux"]["resources"]["devices"]});
    container.update(&parse(resources.to_string().as_bytes()).unwrap()).unwrap();
    push(&mut resources, "/devices", json!({"allow": true, "access": "rwm"}));
    let error = container.update(&parse(resources.to_string().as_bytes()).unwrap()).unwrap_err();
    assert!(error.to_string().contains("linux.resources.devices"), "{error}");
    within(container.delete()).await.unwrap();
    wait(&init);
}
