//! VMs by themselves: what each VMM backend does for its sandbox.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use cube_shim::{errors::Error, vmm::VmmError};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    machine::{Bench, Machine, chain, grows},
    needs::Backend,
};

/// It is found by its serial, and a container runs on it.
pub fn a_disk_that_is_added_to_a_running_vm_appears_in_the_guest(backend: Backend) {
    let bench = Bench::new(backend);
    let (first, rootfs) = (bench.empty("data-0"), bench.rootfs("rootfs-1"));
    let mut machine = bench.machine("plugged", vec![first], None);
    machine.boot();
    machine.add_disk(&rootfs);
    machine.run("c", &rootfs, &["sh", "-c", "while :; do echo x >> /file; sync; sleep 0.1; done"]);
    grows(&rootfs, "/file", 3);
}

/// With whoever knocks meanwhile: the door must not stay shut for that.
pub fn a_pause_in_which_the_host_goes_on_to_connect_ends_like_any_other(backend: Backend) {
    let bench = Bench::new(backend);
    let mut machine = bench.machine("knocked", Vec::new(), None);
    let hello = machine.boot();
    for round in 0..20 {
        machine.pause();
        let knock = UnixStream::connect(bench.path("knocked").join("vsock/vm.vsock"));
        let knock = knock.and_then(|mut socket| writeln!(socket, "CONNECT 1024").map(|()| socket));
        // vhost-device-vsock does not survive a socket that is closed before it has said OK there; the
        // shim's own stay open for that long.
        let knock = knock.ok().filter(|_| round % 2 == 0 || backend == Backend::Qemu);
        machine.resume();
        assert_eq!(machine.hello().boot_id, hello.boot_id, "round {round}");
        drop(knock);
    }
}

/// The caller is told which backend to use, with a status that says that trying again is in vain.
pub fn a_vm_without_snapshots_says_which_have_them(backend: Backend) {
    let bench = Bench::new(backend);
    let mut machine = bench.machine("refusing", Vec::new(), None);
    machine.boot();
    machine.pause();
    let error = machine.snapshot(&bench.snapshot_dir("snapshot")).unwrap_err();
    assert!(matches!(error, VmmError::CannotSnapshot { .. }), "{}", chain(&error));
    let error = Error::from(error);
    assert_eq!(error.code(), ttrpc::Code::FAILED_PRECONDITION);
    for part in [backend.name(), "cloud-hypervisor"] {
        assert!(chain(&error).contains(part), "{}", chain(&error));
    }
    machine.resume();
    machine.hello();
}

/// Network namespace, cgroup and system calls; its death is noticed.
pub fn a_vmm_is_confined(backend: Backend) {
    let bench = Bench::new(backend);
    let mut machine = bench.machine("confined", Vec::new(), None);
    machine.boot();
    let proc = format!("/proc/{}", machine.vmm_pid());
    let net = |process: &str| fs::read_link(format!("{process}/ns/net")).unwrap();
    assert_ne!(net(&proc), net("/proc/self"), "it has a network namespace of its own");
    let cgroup = fs::read_to_string(format!("{proc}/cgroup")).unwrap();
    assert!(cgroup.contains("/cube/confined-"), "{cgroup}");
    assert_eq!(seccomp_of(&proc, "vcpu0"), "2", "what the guest drives runs under its filter");
    check_death(&machine);
}

/// The mode of seccomp(2) of a thread, 2 for a filter.
fn seccomp_of(proc: &str, thread: &str) -> String {
    let threads = fs::read_dir(format!("{proc}/task")).unwrap().map(|thread| thread.unwrap().path());
    let mut status = threads.map(|task| fs::read_to_string(task.join("status")).unwrap());
    let status = status.find(|status| status.starts_with(&format!("Name:\t{thread}\n"))).expect(thread);
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp:")).unwrap();
    line.trim().to_owned()
}

fn check_death(machine: &Machine<'_>) {
    let begin = Instant::now();
    kill(Pid::from_raw(machine.vmm_pid()), Signal::SIGKILL).unwrap();
    let exit = machine.wait();
    assert!(!exit.expected && exit.description.contains("signal 9"), "{exit:?}");
    assert!(begin.elapsed() < Duration::from_secs(5), "noticed after {:?}", begin.elapsed());
}
