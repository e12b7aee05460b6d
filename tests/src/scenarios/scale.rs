//! Many sandboxes, many execs, many lives of one id: what they cost while they are there, and that
//! nothing of it stays.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use nix::{
    sys::inotify::{InitFlags, Inotify},
    unistd::Pid,
};

use super::lab_with_waiting_container;
use crate::{
    command::{Capture, poll, start},
    lab::Lab,
    leftovers, logs,
    needs::Backend,
    soak,
    usage::{self, Usage, Watched},
};

/// Budgets of an idle sandbox, KiB.
const SHIM_BUDGET: u64 = 12 << 10;
const AGENT_BUDGET: u64 = 3 << 10;

/// Memory that a long life may add, KiB: half a KiB for each exec of a soak, which is less than what one
/// forgotten record of an exec and its streams takes. An allocator's fragments are about 200 KiB after
/// the first thousand execs, and hardly more after the second.
const GROWTH: u64 = 512;

/// containerd is not the product, and its collector decides how large it is: only descriptors count.
const ANY_GROWTH: u64 = u64::MAX / 2;

/// All of them alive at once, each with output that nobody has read yet.
pub fn many_sandboxes_come_and_go(backend: Backend) {
    let experiment = if backend.is_vm() { "VMs at once" } else { "sandboxes" };
    let (count, at_once) =
        if backend.is_vm() { (3, 3) } else { (soak::rounds(20, 100), soak::rounds(10, 20)) };
    let lab = Lab::new(backend);
    lab.run("warm", &["true"]).succeeds();
    let containerd = Watched::new("containerd", || Usage::of(containerd(&lab)));
    let ids: Vec<String> = (0..count).map(|n| format!("c{n}")).collect();

    for batch in ids.chunks(at_once as usize) {
        let run = |id: &String| {
            let argv = writes_when_told(&format!("echo out {id}; echo err {id} >&2"));
            start(&mut lab.run_command(&["--detach"], id, &argv.each_ref().map(String::as_str)))
        };
        finish(&lab, batch.iter().map(run).collect());
    }
    soak::record(experiment, "alive at once", ids.len());
    for batch in ids.chunks(at_once as usize) {
        let tell = |id: &String| start(&mut lab.exec_command(&[], id, &TELL));
        for (running, id) in batch.iter().map(tell).collect::<Vec<_>>().into_iter().zip(batch) {
            assert_eq!(running.wait(lab.limit()).succeeds().out(), "told\n", "exec in {id}");
        }
    }
    for (id, stream, text) in written(&ids) {
        let log = lab.log_dir(id);
        assert!(poll(lab.limit(), || logs::read(&log, stream) == text.as_bytes()), "{stream} of {id}");
    }
    stays_within_budgets(&lab, &ids, experiment);
    for (id, stream, text) in written(&ids) {
        Capture::of(File::open(fifo(&lab, id, stream)).unwrap()).wait_for(&text, lab.limit());
    }
    for batch in ids.chunks(at_once as usize) {
        let ctr = |args: &[&str]| start(&mut lab.ctr_command(args));
        finish(&lab, batch.iter().map(|id| ctr(&["task", "delete", "--force", id])).collect());
        finish(&lab, batch.iter().map(|id| ctr(&["container", "delete", id])).collect());
    }
    lab.nothing_is_left_but_fifos();
    for (id, stream, text) in written(&ids) {
        assert_eq!(logs::read(&lab.log_dir(id), stream), text.as_bytes(), "{stream} of {id}");
    }
    containerd.has_not_grown(experiment, ANY_GROWTH);
}

/// What [`many_sandboxes_come_and_go`] has each sandbox write to each stream.
fn written(ids: &[String]) -> impl Iterator<Item = (&String, &'static str, String)> {
    ids.iter().flat_map(|id| [(id, "stdout", format!("out {id}\n")), (id, "stderr", format!("err {id}\n"))])
}

/// A container that runs `script` after [`TELL`]: until `ctr run --detach` has ended it reads the FIFOs,
/// and takes what it has read along.
fn writes_when_told(script: &str) -> [String; 3] {
    let script = format!("mkfifo /told; read line < /told; {script}; exec sleep 100000");
    ["sh".into(), "-c".into(), script]
}

/// What makes a container of [`writes_when_told`] write; as an exec.
const TELL: [&str; 3] = ["sh", "-c", "until [ -p /told ]; do sleep 0.05; done; echo > /told; echo told"];

fn finish(lab: &Lab, running: Vec<crate::command::Running>) {
    for running in running {
        running.wait(lab.limit()).succeeds();
    }
}

fn stays_within_budgets(lab: &Lab, ids: &[String], experiment: &str) {
    let (mut shim, mut agent, mut instances) = (0, 0, 0);
    for id in ids {
        let pid = lab.shim_pid(id);
        shim = shim.max(Usage::of(pid).rss_kib);
        agent = agent.max(Usage::of_agent(lab, id).rss_kib);
        instances += usage::inotify_instances(pid);
    }
    soak::record(experiment, "largest shim RSS, KiB", shim);
    soak::record(experiment, "largest agent RSS, KiB", agent);
    soak::record(experiment, "inotify instances of all shims", instances);
    assert!(shim <= SHIM_BUDGET, "a shim has {shim} KiB");
    assert!(agent <= AGENT_BUDGET, "an agent has {agent} KiB");
}

/// The kernel's limit holds for everything that a user runs, so somebody else may reach it.
pub fn a_late_reader_gets_its_output_when_inotify_is_exhausted(backend: Backend) {
    let lab = Lab::new(backend);
    let mut taken = Vec::new();
    while let Ok(instance) = Inotify::init(InitFlags::IN_CLOEXEC) {
        taken.push(instance);
    }
    let argv = writes_when_told("i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done");
    start(&mut lab.run_command(&["--detach"], "c", &argv.each_ref().map(String::as_str)))
        .wait(lab.limit())
        .succeeds();
    lab.exec("c", &TELL).succeeds();
    let expected: String = (0..2000).map(|n| format!("line {n}\n")).collect();
    let reader = Capture::of(File::open(fifo(&lab, "c", "stdout")).unwrap());
    reader.wait_for("line 1999\n", lab.limit());
    assert_eq!(reader.text(), expected);
    assert_eq!(lab.exec("c", &["echo", "still here"]).succeeds().out(), "still here\n");
    lab.remove("c");
    lab.nothing_is_left_but_fifos();
    drop(taken);
}

/// Each with its own output and exit status, five at a time.
pub fn execs_leave_neither_memory_nor_descriptors_behind(backend: Backend) {
    let (warm_up, count) = match backend.is_vm() {
        true => (5, soak::rounds(10, 200)),
        false => (soak::rounds(10, 100), soak::rounds(50, 1000)),
    };
    let experiment = if backend.is_vm() { "execs in a VM" } else { "execs" };
    let lab = lab_with_waiting_container(backend);
    run_execs(&lab, 0..warm_up);
    let watched = [
        Watched::new("shim", || Usage::of(lab.shim_pid("c"))),
        Watched::new("agent", || Usage::of_agent(&lab, "c")),
        Watched::new("containerd", || Usage::of(containerd(&lab))),
    ];
    run_execs(&lab, warm_up..warm_up + count);
    soak::record(experiment, "run, output and status checked", count);
    for (process, growth) in watched.iter().zip([GROWTH, GROWTH, ANY_GROWTH]) {
        process.has_not_grown(experiment, growth);
    }
    lab.remove("c");
    lab.nothing_is_left();
}

fn run_execs(lab: &Lab, numbers: std::ops::Range<u32>) {
    let numbers: Vec<u32> = numbers.collect();
    for batch in numbers.chunks(5) {
        let running: Vec<_> = batch
            .iter()
            .map(|n| {
                let script = format!("echo out {n}; echo err {n} >&2; exit {}", n % 200);
                start(&mut lab.exec_command(&[], "c", &["sh", "-c", &script]))
            })
            .collect();
        for (running, n) in running.into_iter().zip(batch) {
            let finished = running.wait(lab.limit()).exits_with((n % 200) as i32);
            assert_eq!(finished.out(), format!("out {n}\n"));
            assert_eq!(finished.err(), format!("err {n}\n"));
        }
    }
}

/// As fast as one follows the other; the log of each is kept.
pub fn one_id_lives_again_and_again(backend: Backend) {
    let count = soak::rounds(10, 100);
    let lab = Lab::new(backend);
    lab.run("c", &["echo", "0"]).succeeds();
    let containerd = Watched::new("containerd", || Usage::of(containerd(&lab)));
    for n in 1..count {
        assert_eq!(lab.run("c", &["echo", &n.to_string()]).succeeds().out(), format!("{n}\n"));
    }
    lab.nothing_is_left();
    containerd.has_not_grown("one id", ANY_GROWTH);
    let parent = lab.log_dir("c").parent().unwrap().to_owned();
    let kept = fs::read_dir(parent).unwrap().flatten().map(|entry| logs::read(&entry.path(), "stdout"));
    let mut kept: Vec<u32> =
        kept.map(|log| String::from_utf8(log).unwrap().trim().parse().unwrap()).collect();
    kept.sort_unstable();
    assert_eq!(kept, (0..count).collect::<Vec<_>>());
    soak::record("one id", "created, run and deleted", count);
}

/// The FIFO that `ctr run --detach` made for a stream: `<fifo dir>/<random>/<id>-<stream>`.
fn fifo(lab: &Lab, id: &str, stream: &str) -> PathBuf {
    let name = format!("{id}-{stream}");
    let dirs = fs::read_dir(lab.dir().join("fifo")).unwrap().flatten();
    dirs.map(|dir| dir.path().join(&name))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("no FIFO {name}"))
}

fn containerd(lab: &Lab) -> Pid {
    let found = leftovers::processes(lab.dir());
    let daemon = found.iter().find(|process| process.line.starts_with("containerd --config "));
    Pid::from_raw(daemon.expect("no containerd").pid)
}
