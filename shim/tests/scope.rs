//! Scopes, of a real systemd: see `tests/systemd/run`.

#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use cube_shim::cgroup::{Hierarchy, SandboxCgroup};

const LIMIT: Duration = Duration::from_secs(60);

/// The name of the test, which runs itself in there.
const TEST: &str = "a_scope_of_systemd_holds_shim_and_vm_and_nothing_stays_of_it";

/// Set in there.
const INSIDE: &str = "CUBE_TEST_INSIDE_SYSTEMD";

#[test]
fn a_scope_of_systemd_holds_shim_and_vm_and_nothing_stays_of_it() {
    if env::var_os(INSIDE).is_some() {
        return inside();
    }
    for needed in ["/lib/systemd/systemd", "/usr/bin/busctl", "/usr/bin/dbus-daemon"] {
        if !Path::new(needed).exists() {
            return eprintln!("skipped: this host has no {needed}");
        }
    }
    let job = tempfile::tempdir().unwrap();
    fs::copy(env::current_exe().unwrap(), job.path().join("test")).unwrap();
    let run = format!("#!/bin/sh\n{INSIDE}=1 exec /job/test --exact {TEST} --nocapture\n");
    fs::write(job.path().join("run"), run).unwrap();
    Command::new("chmod").arg("+x").arg(job.path().join("run")).status().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/systemd/run");
    let log = fs::File::create(job.path().join("log")).unwrap();
    let mut command = Command::new(script);
    command.arg(job.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut machine = Machine(command.spawn().unwrap());
    let read = |name: &str| fs::read_to_string(job.path().join(name)).unwrap_or_default();
    let over = || machine.0.try_wait().unwrap().is_some() || read("output").contains("ended: ");
    wait_until("the test inside has ended", over);
    let (output, log) = (read("output"), read("log"));
    assert!(output.ends_with("ended: 0\n"), "{output}\nsystemd: {log}");
}

/// unshare(1), which takes all of it along, and the cgroup that it was in.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let pid = self.0.id();
        let _ = self.0.kill();
        let _ = self.0.wait();
        let dir = Hierarchy::find().unwrap().root().join(format!("cube-systemd-{pid}"));
        let _ = SandboxCgroup::at(dir).destroy(LIMIT, None);
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// As the shim does it, twice: the second time comes when systemd may still be at the end of the first.
fn inside() {
    let hierarchy = Hierarchy::find().unwrap();
    let home = hierarchy.own().unwrap();
    let scope = hierarchy.root().join("kubepods.slice/kubepods-podx.slice/cube-0123.scope");
    for _ in 0..2 {
        let cgroup = SandboxCgroup::at(scope.join("vm"));
        cgroup.create_with_shim().unwrap();
        assert_eq!(own(), scope.join("shim"));
        assert_eq!(unit_property("Delegate"), "yes");
        let script = format!("echo 0 > {}/cgroup.procs; exec sleep 1000", cgroup.helpers().display());
        let mut vmm = Command::new("sh").arg("-c").arg(script).spawn().unwrap();
        wait_until("the VMM is there", || cgroup.has_processes());
        cgroup.destroy(LIMIT, Some(&home)).unwrap();
        vmm.wait().unwrap();
        assert_eq!(own(), home);
        assert!(!scope.exists());
    }
    wait_until("systemd has forgotten the scope", || unit_property("LoadState") == "not-found");
}

fn own() -> PathBuf {
    Hierarchy::find().unwrap().own().unwrap()
}

fn unit_property(name: &str) -> String {
    let output = Command::new("systemctl").args(["show", "-P", name, "cube-0123.scope"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
