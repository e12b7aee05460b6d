//! What a container must not reach.

use std::{fs, os::unix::fs::symlink};

use serde_json::{Value, json};

use crate::{
    push,
    support::{Fixture, chain, default_spec, wait, within},
};

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
            json!(["/probe", "--ignored", "--exact", "--nocapture", "walls::probe_the_system_call_filter"]);
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
