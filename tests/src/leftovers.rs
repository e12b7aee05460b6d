//! What of a lab exists on the host: processes, mounts, files and cgroups.
//!
//! Taken before and after a scenario, the difference is what the product left behind.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sha2::{Digest, Sha256};

/// A process of a lab.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// On this host.
    pub pid: i32,
    /// Command line, words separated by spaces; the name in brackets for a zombie.
    pub line: String,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.line)
    }
}

/// Everything in or of `dir`: processes, mounts, files below what the product and containerd use for
/// running tasks, and cgroups of the sandboxes `keys`. Each as a line of text.
pub fn take(dir: &Path, keys: &[String]) -> BTreeSet<String> {
    let mut found: BTreeSet<String> =
        processes(dir).iter().map(|process| format!("process {process}")).collect();
    found.extend(mounts(dir).iter().map(|mount| format!("mount {}", mount.display())));
    for below in [
        "run",
        "cache/sandboxes",
        "fifo",
        "state/io.containerd.runtime.v2.task",
        "root/io.containerd.runtime.v2.task",
    ] {
        // A directory per namespace is containerd's and stays.
        let entries = files(&dir.join(below), if below.ends_with("v2.task") { 1 } else { 0 });
        found.extend(entries.iter().map(|file| format!("file {}", file.display())));
    }
    // Snapshots stay when their sandbox goes. What has no name yet, or never gets one, does not.
    let hidden = |file: &&PathBuf| file.file_name().is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
    let stored = files(&dir.join("snapshots"), 0);
    found.extend(stored.iter().filter(hidden).map(|file| format!("file {}", file.display())));
    for cgroup in cgroups(keys) {
        found.insert(format!("cgroup {}", cgroup.display()));
        let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        found.extend(pids.lines().map(|pid| format!("process {pid} in {}", cgroup.display())));
    }
    found
}

/// Name of a sandbox's run directory and cgroup: see "Words" in docs/architecture.md.
pub fn key(ttrpc_address: &str, namespace: &str, id: &str) -> String {
    let digest = Sha256::digest(format!("{ttrpc_address}\0{namespace}\0{id}"));
    digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// Processes with `dir` in their command line or environment, as everything has it that a lab's
/// containerd starts, or in a cgroup of the lab's namespace, as runc's containers are.
pub fn processes(dir: &Path) -> Vec<Process> {
    let me = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<i32>() else { continue };
        if name == me {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let namespace = format!("/{}/", dir.file_name().unwrap_or_default().to_string_lossy());
        if contains(&line, dir) || contains(&environment, dir) || cgroups.contains(&namespace) {
            let line = String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned();
            found.push(Process { pid, line });
        }
    }
    found
}

/// The VMM of the sandbox `key`, or its agent on the process backend, and its helpers.
pub fn helpers(key: &str) -> Vec<Process> {
    let pids = fs::read_to_string(cgroup(key).join("vm/helpers/cgroup.procs")).unwrap();
    let line = |pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned()
    };
    pids.lines().map(|pid| pid.parse().unwrap()).map(|pid| Process { pid, line: line(pid) }).collect()
}

fn contains(bytes: &[u8], dir: &Path) -> bool {
    let dir = dir.as_os_str().as_bytes();
    bytes.windows(dir.len()).any(|window| window == dir)
}

/// Mount points below `dir`, the last mounted first.
pub fn mounts(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    points.reverse();
    points
}

/// Files of any kind below `dir`; directories too, but not those `spared` levels deep.
fn files(dir: &Path, spared: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_dir || spared == 0 {
            found.push(entry.path());
        }
        // What is inside a rootfs is not ours to list: the mount and its directory tell enough.
        if is_dir && entry.file_name() != "rootfs" {
            found.extend(files(&entry.path(), spared.saturating_sub(1)));
        }
    }
    found
}

/// The cgroup2 mount of this host.
pub fn cgroup2() -> PathBuf {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.contains(" - cgroup2 "));
    line.and_then(|line| line.split(' ').nth(4)).expect("no cgroup2 is mounted").into()
}

/// The cgroup of the sandbox with this key, which exists or not: below the parent that containerd names where the host
/// has controllers, else with all others.
pub fn cgroup(key: &str) -> PathBuf {
    let (root, name) = (cgroup2(), format!("cube-{key}"));
    let placed = fs::read_dir(&root).into_iter().flatten().flatten().map(|entry| entry.path().join(&name));
    placed.into_iter().find(|dir| dir.exists()).unwrap_or_else(|| root.join("cube").join(key))
}

/// cgroups of these sandboxes, parents first.
pub fn cgroups(keys: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = keys.iter().map(|key| cgroup(key)).collect();
    while let Some(dir) = open.pop() {
        if !dir.is_dir() {
            continue;
        }
        let below = fs::read_dir(&dir).into_iter().flatten().flatten();
        open.extend(below.map(|entry| entry.path()).filter(|path| path.is_dir()));
        found.push(dir);
    }
    found
}

/// Kills the processes of a lab, whatever state they are in.
pub fn kill_processes(dir: &Path) {
    for process in processes(dir) {
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).ok();
    }
}

/// Ends, unmounts and removes everything that [`take`] lists, so that a failed test costs the next
/// one nothing.
pub fn remove_all(dir: &Path, keys: &[String]) -> io::Result<()> {
    for cgroup in cgroups(keys) {
        fs::write(cgroup.join("cgroup.kill"), "1").ok();
    }
    crate::command::poll(std::time::Duration::from_secs(5), || {
        kill_processes(dir);
        processes(dir).is_empty()
    });
    for cgroup in cgroups(keys).iter().rev() {
        fs::remove_dir(cgroup).ok();
    }
    for mount in mounts(dir) {
        umount2(&mount, MntFlags::MNT_DETACH).ok();
    }
    fs::remove_dir_all(dir)
}

/// runc makes a cgroup for each namespace in every hierarchy, and leaves it there.
pub fn remove_cgroups_of_runc(namespace: &str) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines().filter(|line| line.contains(" - cgroup")) {
        let Some(hierarchy) = line.split(' ').nth(4) else { continue };
        let parent = Path::new(hierarchy).join(namespace);
        for container in fs::read_dir(&parent).into_iter().flatten().flatten() {
            fs::remove_dir(container.path()).ok();
        }
        fs::remove_dir(parent).ok();
    }
}
