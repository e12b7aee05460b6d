//! What a sandbox takes of its host.

use std::{
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use cube_shim::vmm::kvm;
use nix::sys::signal::kill;
use protobuf::Message;
use serde_json::Value;

use super::{WAIT, lab_with_waiting_container};
use crate::{
    direct::{Direct, bind_mount},
    lab::Lab,
    leftovers::{self, cgroup2},
    needs::Backend,
};

fn pids(cgroup: &Path) -> Vec<i32> {
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    procs.lines().map(|line| line.parse().unwrap()).collect()
}

fn read(cgroup: &Path, file: &str) -> String {
    let path = cgroup.join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
}

/// Those of the limits' controllers that this host's cgroup2 has.
fn controllers() -> Vec<&'static str> {
    let all = read(&cgroup2(), "cgroup.controllers");
    let has = |name: &&str| all.split_whitespace().any(|word| word == *name);
    ["memory", "cpu", "pids", "io"].into_iter().filter(has).collect()
}

fn status(lab: &Lab) -> Value {
    let text = lab.cubecli(&["cubebox", "status", "--json", "c"]).succeeds().out();
    serde_json::from_str(&text).unwrap()
}

/// The limits are of both; what ends the VM does not end the shim, which tells of it.
pub fn the_shim_counts_with_its_vm_and_is_not_killed_with_it(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let sandbox = leftovers::cgroup(&lab.key("c"));
    let (shim, (_, vmm)) = (lab.shim_pid("c"), lab.task("c").unwrap());
    assert!(pids(&sandbox.join("shim")).contains(&shim.as_raw()), "the shim is elsewhere");
    assert!(pids(&sandbox.join("vm/helpers")).contains(&vmm), "the VMM is elsewhere");
    fs::write(sandbox.join("vm/cgroup.kill"), "1").unwrap();
    lab.wait_for_state("c", Some("STOPPED"));
    assert!(kill(shim, None).is_ok(), "the shim has ended");
    lab.delete_stopped("c", 137);
    assert!(!sandbox.exists(), "{} stays", sandbox.display());
    lab.nothing_is_left();
}

/// Where the host has controllers, below the cgroup that containerd names; where not, it is said.
pub fn a_sandbox_is_limited_as_far_as_its_host_can_or_says_that_it_is_not(backend: Backend) {
    let lab = Lab::new(backend);
    lab.configure("[vm]\nvcpus = 1\nmemory_mib = 256\n[limits]\nmemory_overhead_mib = 300\n");
    lab.detached("c", &WAIT);
    let (limits, controllers) = (status(&lab)["limits"].clone(), controllers());
    let sandbox = PathBuf::from(limits["cgroup"].as_str().unwrap());
    // QEMU without KVM keeps translated code.
    let translates = backend == Backend::Qemu && kvm::probe().is_err();
    let overhead = if translates { 300 + 1024 } else { 300 };
    for (name, key, file, value) in [
        ("memory", "memory_bytes", "memory.max", (256 + 4 + overhead) << 20),
        ("cpu", "cpu_percent", "cpu.max", 200),
        ("pids", "pids", "pids.max", 1028),
    ] {
        if controllers.contains(&name) {
            assert_eq!(limits[key].as_u64(), Some(value), "{limits}");
            let written = if name == "cpu" { "200000 100000".into() } else { value.to_string() };
            assert_eq!(read(&sandbox, file), written, "{file}");
        } else {
            assert!(limits[key].is_null() && !sandbox.join(file).exists(), "{limits}");
            let missing = limits["missing"].as_array().unwrap();
            assert!(missing.iter().any(|missing| missing == name), "{limits}");
        }
    }
    let parent = if controllers.is_empty() { "cube" } else { lab.namespace() };
    assert_eq!(sandbox.parent().unwrap(), cgroup2().join(parent));
    let said = lab.cubecli(&["info"]).succeeds().out();
    let said = said.lines().find(|line| line.starts_with("limits ")).unwrap().to_owned();
    assert_eq!(said.contains("none"), controllers.is_empty(), "{said}");
    lab.remove("c");
    lab.nothing_is_left();
}

/// A guest that uses all of its memory is in its right; a VM that takes more ends, and its shim tells.
pub fn a_vm_may_use_all_of_its_memory_and_no_more(backend: Backend) {
    if !controllers().contains(&"memory") {
        eprintln!("skipped: the cgroup2 of this host has no memory controller");
        return;
    }
    let lab = lab_with_waiting_container(backend);
    let sandbox = leftovers::cgroup(&lab.key("c"));
    // Until the guest has no more.
    lab.exec("c", &["cube-test-writer", "hog", "4096"]);
    lab.exec("c", &["cube-test-writer", "stream", "1", "33554432"]);
    for part in ["", "vm/helpers", "shim"] {
        let cgroup = sandbox.join(part);
        let stat = read(&cgroup, "memory.stat");
        let value = |name: &str| {
            let line = stat.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
            line.and_then(|value| value.parse::<u64>().ok()).unwrap_or_default() >> 10
        };
        let figures: Vec<_> = ["anon", "shmem", "kernel", "pagetables", "sock", "file"]
            .iter()
            .map(|name| format!("{name} {}", value(name)))
            .collect();
        let current = read(&cgroup, "memory.current").parse::<u64>().unwrap() >> 10;
        let threads = read(&cgroup, "pids.current");
        eprintln!("limits of {part:?}: current {current} KiB, {} KiB, {threads} threads", figures.join(", "));
    }
    eprintln!("limits: peak {}, max {}", read(&sandbox, "memory.peak"), read(&sandbox, "memory.max"));
    let events = read(&sandbox, "memory.events");
    assert!(events.lines().any(|line| line == "oom_kill 0"), "the host has killed: {events}");
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");

    lab.remove("c");
    lab.nothing_is_left();

    lab.detached("c", &WAIT);
    let sandbox = leftovers::cgroup(&lab.key("c"));
    let shim = lab.shim_pid("c");
    let current: u64 = read(&sandbox, "memory.current").parse().unwrap();
    fs::write(sandbox.join("memory.max"), (current + (8 << 20)).to_string()).unwrap();
    lab.exec("c", &["cube-test-writer", "hog", "4096"]);
    lab.wait_for_state("c", Some("STOPPED"));
    assert!(kill(shim, None).is_ok(), "the shim was killed for its VM");
    assert!(pids(&sandbox.join("vm/helpers")).is_empty(), "a part of the VM lives on");
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// As `containerd.runc.v1.Options` have it: whoever configures containerd knows best.
pub fn a_shim_stays_in_the_cgroup_that_the_runtime_options_name(backend: Backend) {
    let lab = Lab::new(backend);
    let name = format!("cube-test-shims-{}", std::process::id());
    let shims = cgroup2().join(&name);
    let options = |path: &str| {
        let value = [&[0x1a, u8::try_from(path.len()).unwrap()], path.as_bytes()].concat();
        let type_url = "containerd.runc.v1.Options".into();
        Any { type_url, value, ..Default::default() }.write_to_bytes().unwrap()
    };
    let mut direct = Direct::new(&lab, "c", &WAIT);
    let rootfs = direct.unpack_image();
    direct.input = options(&format!("/{name}"));
    let refused = direct.shim("start");
    assert!(refused.code() != 0 && refused.err().contains(&name), "{refused}");

    fs::create_dir(&shims).unwrap();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    let shim = lab.shim_pid("c");
    assert_eq!(pids(&shims), [shim.as_raw()]);
    assert!(!leftovers::cgroup(&direct.key()).join("shim").exists());
    direct.finish();
    assert!(crate::command::poll(lab.limit(), || fs::remove_dir(&shims).is_ok()), "the shim lives on");
    lab.nothing_is_left();
}
