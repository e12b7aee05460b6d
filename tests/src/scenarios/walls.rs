//! What each process of a sandbox may do on the host. The table is also in docs/architecture.md.

use std::{collections::BTreeMap, fs, path::Path};

use super::lab_with_waiting_container;
use crate::{
    command::poll,
    lab::Lab,
    leftovers::{self, Process},
    needs::Backend,
};

/// What a process must be like.
struct Wall {
    /// How its command line begins, behind the path.
    process: &'static str,
    /// `CapEff`, `CapPrm` and `CapBnd`.
    capabilities: u64,
    /// Whether it has a user that no other sandbox has.
    own_user: bool,
    /// Whether some thread of it is under a filter of system calls.
    filtered: bool,
    /// What its root may have in it.
    root: &'static [&'static str],
}

const LIBRARIES: [&str; 4] = ["lib", "lib64", "usr", "etc"];
const KEEPER: Wall =
    Wall { process: "exe keep ", capabilities: 0, own_user: true, filtered: false, root: &[] };
/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
const FILES: u64 = 1 << 31 | 0b1101_1011;
const VIRTIOFSD: Wall = Wall {
    process: "virtiofsd",
    capabilities: FILES,
    own_user: false,
    filtered: true,
    root: &["proc", "dev", "RUN", "PROGRAM"],
};
const VSOCK: Wall = Wall {
    process: "vhost-device-vsock",
    capabilities: 0,
    own_user: true,
    filtered: true,
    root: &["dev", "RUN", "PROGRAM"],
};
const QEMU: Wall = Wall {
    process: "qemu-system",
    capabilities: 0,
    own_user: true,
    filtered: true,
    root: &["dev", "RUN", "PROGRAM"],
};
const CLOUD_HYPERVISOR: Wall = Wall {
    process: "cloud-hypervisor",
    capabilities: 0,
    own_user: true,
    filtered: true,
    root: &["proc", "dev", "RUN", "PROGRAM"],
};

/// Users, capabilities, namespaces, roots, system calls and limits, of every process but the agent of the
/// process backend, which makes containers as root.
pub fn every_process_of_a_sandbox_is_behind_its_wall(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let walls: &[&Wall] = match backend {
        Backend::Process => &[&KEEPER],
        Backend::Qemu => &[&KEEPER, &QEMU, &VSOCK, &VIRTIOFSD],
        Backend::CloudHypervisor => &[&KEEPER, &CLOUD_HYPERVISOR, &VIRTIOFSD],
    };
    // KVM has a thread of the kernel's in the cgroup of its VMM.
    let is_program = |process: &Process| {
        status(Path::new(&format!("/proc/{}/status", process.pid))).contains_key("VmSize")
    };
    let processes = leftovers::helpers(&lab.key("c"));
    let processes: Vec<Process> = processes.into_iter().filter(is_program).collect();
    for process in &processes {
        let agent = backend == Backend::Process && process.line.contains(" process --listen ");
        match walls.iter().find(|wall| is(process, wall)) {
            Some(wall) => check(&lab, process.pid, wall),
            None => assert!(agent, "nobody knows {process}"),
        }
    }
    for wall in walls {
        let count = processes.iter().filter(|process| is(process, wall)).count();
        assert_eq!(count, 1, "{} in {processes:?}", wall.process);
    }
    lab.remove("c");
    lab.nothing_is_left();
}

fn is(process: &Process, wall: &Wall) -> bool {
    let (program, arguments) = process.line.split_once(' ').unwrap_or((&process.line, ""));
    let name = program.rsplit('/').next().unwrap_or_default();
    format!("{name} {arguments}").starts_with(wall.process)
}

fn check(lab: &Lab, pid: i32, wall: &Wall) {
    let name = wall.process;
    let status = status(Path::new(&format!("/proc/{pid}/status")));
    let field = |key: &str| status.get(key).unwrap_or_else(|| panic!("{key} of {name}")).as_str();
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let found = u64::from_str_radix(field(set), 16).unwrap();
        assert_eq!(found & !wall.capabilities, 0, "{set} of {name} is {found:x}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set} of {name}");
    }
    assert_eq!(field("NoNewPrivs"), "1", "NoNewPrivs of {name}");
    let uids: Vec<u32> = field("Uid").split_whitespace().map(|uid| uid.parse().unwrap()).collect();
    let range = if wall.own_user { 1_900_000_001..2_000_000_000 } else { 0..1 };
    assert!(uids.iter().all(|uid| range.contains(uid)), "{name} is {uids:?}");
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let filtered = threads.any(|task| self::status(&task.unwrap().path().join("status"))["Seccomp"] == "2");
    assert!(filtered || !wall.filtered, "{name} has no filter");
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "the {namespace} namespace of {name}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{name}");
    check_root(lab, pid, wall);
}

fn check_root(lab: &Lab, pid: i32, wall: &Wall) {
    let name = wall.process;
    let root = format!("/proc/{pid}/root");
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let first = |path: &Path| path.components().nth(1).unwrap().as_os_str().to_string_lossy().into_owned();
    let mut allowed: Vec<String> = LIBRARIES.iter().map(ToString::to_string).collect();
    for entry in wall.root {
        allowed.extend(match *entry {
            "RUN" => vec![first(&lab.run_dir()), first(&crate::paths::guest_dir())],
            "PROGRAM" => vec![first(&program)],
            entry => vec![entry.to_owned()],
        });
    }
    let entries = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name());
    let entries: Vec<String> = entries.map(|entry| entry.to_string_lossy().into_owned()).collect();
    match wall.root {
        [] => assert!(entries.is_empty(), "{name} sees {entries:?}"),
        _ => assert!(entries.iter().all(|entry| allowed.contains(entry)), "{name} sees {entries:?}"),
    }
    for secret in ["etc/shadow", "etc/passwd", "root/.ssh", "usr/bin/env", "sys", "run/containerd"] {
        assert!(!Path::new(&root).join(secret).exists(), "{name} sees /{secret}");
    }
    // Neither the state of its own sandbox, nor what other sandboxes have.
    let run_dir = Path::new(&root).join(lab.run_dir().strip_prefix("/").unwrap());
    let others = fs::read_dir(&run_dir).into_iter().flatten().flatten();
    let others: Vec<_> = others.filter(|entry| entry.file_name() != *lab.key("c")).collect();
    assert!(others.is_empty(), "{name} sees {others:?}");
    assert!(!run_dir.join(lab.key("c")).join("state.json").exists(), "{name} sees the state");
}

fn status(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

/// `nerdctl cp` goes through the root of the pid that it is told.
pub fn the_pid_that_clients_are_told_leads_to_no_file(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let (_, pid) = lab.task("c").unwrap();
    let root = format!("/proc/{pid}/root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    let written = fs::write(format!("{root}/file"), "x").unwrap_err();
    assert_eq!(written.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(fs::read(format!("{root}/etc/shadow")).is_err() && !Path::new("/file").exists());
    // And lives no longer than the sandbox.
    lab.remove("c");
    assert!(poll(lab.limit(), || !Path::new(&format!("/proc/{pid}")).exists()), "{pid} lives on");
    lab.nothing_is_left();
}
