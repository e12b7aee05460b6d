//! What a process in a container sees, and what it is kept from.

use std::{fs, io::Read};

use super::lab_with_waiting_container;
use crate::{
    command::start,
    direct::{Direct, bind_mount},
    lab::Lab,
    needs::Backend,
};

/// cgroup v2 and its own namespaces; in a VM a kernel of its own too.
pub fn a_container_sees_its_own_system(backend: Backend) {
    let lab = Lab::new(backend);
    // Not the kernel's version: host and guest may run the same.
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let script = format!("cat {boot_id}; cat /proc/1/cgroup; echo $$; cat /proc/mounts; ls /dev");
    let seen = lab.run("c", &["sh", "-c", &script]).succeeds().out();
    let mut lines = seen.lines();
    let host = fs::read_to_string(boot_id).unwrap();
    assert_eq!(lines.next() != Some(host.trim_end()), backend.is_vm(), "{seen}");
    let cgroup = lines.find_map(|line| line.strip_prefix("0::/")).unwrap_or("none");
    // The process is in a leaf of the container's cgroup, which is the root of the namespace.
    assert!(!cgroup.contains('/') && cgroup != "none", "not cgroup v2 in its own namespace: {seen}");
    assert!(lines.any(|line| line == "1"), "not the first process: {seen}");
    // Without a VM, overlayfs shows where its directories are.
    let host_paths = backend.is_vm() && seen.contains(lab.dir().to_str().unwrap());
    assert!(!host_paths, "paths of the host: {seen}");
    for device in ["null", "zero", "full", "random", "urandom", "tty", "pts", "shm"] {
        assert!(seen.lines().any(|line| line == device), "no /dev/{device}: {seen}");
    }
    lab.nothing_is_left();
}

/// Directory, environment, a root that cannot be written to, limits; for an exec another user.
pub fn what_the_spec_asks_of_a_process_is_done(backend: Backend) {
    let lab = Lab::new(backend);
    let script = "pwd; echo $GREETING; touch /new; ulimit -n; while :; do sleep 0.1; done";
    let flags = ["--rm", "--cwd", "/tmp", "--env", "GREETING=hello there", "--read-only"];
    let running = start(&mut lab.run_command(&flags, "c", &["sh", "-c", script]));
    running.stdout.wait_for("/tmp\nhello there\n1024\n", lab.limit());
    running.stderr.wait_for("Read-only file system", lab.limit());
    let script = "id -u; id -g; pwd; grep -E 'NoNewPrivs|CapEff' /proc/self/status";
    let flags = ["--user", "1000:1000", "--cwd", "/bin"];
    let seen =
        start(&mut lab.exec_command(&flags, "c", &["sh", "-c", script])).wait(lab.limit()).succeeds().out();
    assert_eq!(seen, "1000\n1000\n/bin\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n");
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "c"]).succeeds();
    running.wait(lab.limit()).exits_with(137);
    lab.nothing_is_left();
}

/// As below containerd's own service, which has no limit (`LimitNOFILE`, `LimitNPROC`), and as CRI's specs have
/// none. In a VM, that is.
pub fn a_spec_without_rlimits_gets_those_of_containerds_service(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["sh", "-c", "ulimit -n; ulimit -u"]);
    let mut stdout = direct.read_fifos();
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let mut seen = String::new();
    stdout[0].read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "1048576\nunlimited\n");
    direct.wait().unwrap();
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

/// Files of the image can be read and written, and are gone with the container.
pub fn a_container_writes_to_its_own_layer_only(backend: Backend) {
    let lab = Lab::new(backend);
    let script =
        "cat /written; echo mine > /written && cat /written && rm /bin/vi && mkdir /d && mv /written /d/";
    for id in ["a", "b"] {
        let finished = lab.run(id, &["sh", "-c", script]).succeeds();
        assert_eq!(finished.out(), "mine\n");
    }
    lab.run("c", &["ls", "/bin/vi"]).succeeds();
    lab.nothing_is_left();
}

/// A directory of the host, writable and read-only.
pub fn a_bind_mount_of_the_host_is_shared(backend: Backend) {
    let lab = Lab::new(backend);
    let shared = lab.dir().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("in"), "from the host\n").unwrap();
    let mount = |target: &str, mode: &str| {
        format!("type=bind,src={},dst={target},options=rbind:{mode}", shared.display())
    };
    let (rw, ro) = (mount("/rw", "rw"), mount("/ro", "ro"));
    let script = "cat /ro/in; echo from the guest > /rw/out; echo no > /ro/in";
    let finished = lab.run_with(&["--mount", &rw, "--mount", &ro], "c", &["sh", "-c", script]);
    assert_eq!(finished.out(), "from the host\n", "{finished}");
    assert!(finished.err().contains("Read-only file system"), "{finished}");
    assert_eq!(fs::read_to_string(shared.join("out")).unwrap(), "from the guest\n");
    assert_eq!(fs::read_to_string(shared.join("in")).unwrap(), "from the host\n");
    lab.nothing_is_left();
}

/// Neither the agent's ports nor the host can be dialled from a container.
pub fn a_container_cannot_open_a_vsock(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    for cid in ["1", "2", "3"] {
        for port in ["1024", "1025"] {
            let seen = lab.exec("c", &["cube-test-writer", "vsock", cid, port]).succeeds().out();
            assert!(seen.contains("not permitted") || seen.contains("denied"), "{cid}:{port}: {seen}");
        }
    }
    let seen = lab.exec("c", &["cube-test-writer", "io-uring"]).succeeds().out();
    assert!(seen.contains("was refused"), "{seen}");
    lab.remove("c");
    lab.nothing_is_left();
}

/// A process that may trace sees nobody who may do more than itself, while execs come and go. The agent's own
/// tests look closer.
pub fn a_tracer_sees_nobody_who_may_do_more(backend: Backend) {
    let lab = Lab::new(backend);
    let look = "while [ ! -e /stop ]; do cat /proc/[0-9]*/status 2>/dev/null | grep ^CapPrm; done | sort -u";
    let flags = ["--rm", "--cap-add", "CAP_SYS_PTRACE"];
    let script = format!("echo looking; {look}");
    let running = start(&mut lab.run_command(&flags, "c", &["sh", "-c", &script]));
    running.stdout.wait_for("looking\n", lab.limit());
    for _ in 0..10 {
        lab.exec("c", &["true"]).succeeds();
    }
    lab.exec("c", &["touch", "/stop"]).succeeds();
    let seen = running.wait(lab.limit()).succeeds().out();
    let capabilities: Vec<&str> = seen.lines().filter(|line| line.starts_with("CapPrm")).collect();
    assert_eq!(capabilities, ["CapPrm:\t00000000a80c25fb"], "{seen}");
    lab.nothing_is_left();
}

/// /etc/passwd is the container's, and an exec looks into it. One that can be read without an end, or never.
pub fn a_container_cannot_hold_up_its_execs(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    for replace in ["mkfifo /etc/passwd", "ln -s /dev/zero /etc/passwd"] {
        lab.exec("c", &["sh", "-c", &format!("rm -f /etc/passwd; {replace}")]).succeeds();
        assert_eq!(lab.exec("c", &["sh", "-c", "echo $HOME"]).succeeds().out(), "/\n", "{replace}");
    }
    lab.ctr(&["task", "pause", "c"]).succeeds();
    lab.ctr(&["task", "resume", "c"]).succeeds();
    lab.remove("c");
    lab.nothing_is_left();
}

/// Only in a VM: the kernel of the `process` backend is the host's.
pub fn the_kernel_of_a_guest_is_hardened(backend: Backend) {
    let lab = Lab::new(backend);
    let settings = [
        ("kernel/kptr_restrict", "2"),
        ("kernel/dmesg_restrict", "1"),
        ("kernel/yama/ptrace_scope", "1"),
        ("kernel/kexec_load_disabled", "1"),
        ("kernel/modules_disabled", "1"),
        ("kernel/unprivileged_bpf_disabled", "1"),
        ("kernel/perf_event_paranoid", "3"),
        ("kernel/sysrq", "0"),
        ("fs/suid_dumpable", "0"),
        ("fs/protected_symlinks", "1"),
        ("fs/protected_hardlinks", "1"),
        ("fs/protected_fifos", "1"),
        ("fs/protected_regular", "2"),
    ];
    let names: Vec<&str> = settings.iter().map(|(name, _)| *name).collect();
    // A kernel may lack one.
    let script = format!(
        "cd /proc/sys; for name in {}; do [ ! -e $name ] || echo $name $(cat $name); done; ulimit -c",
        names.join(" ")
    );
    let seen = lab.run("c", &["sh", "-c", &script]).succeeds().out();
    let mut lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines.pop(), Some("0"), "the limit of cores: {seen}");
    assert!(lines.len() > settings.len() / 2, "{seen}");
    for line in lines {
        let (name, value) = line.split_once(' ').unwrap();
        assert!(settings.contains(&(name, value)), "{line}");
    }
    lab.nothing_is_left();
}
