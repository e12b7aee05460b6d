//! `ctr task pause` and `ctr task resume`.

use std::{
    fs,
    io::{Read, Write},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::sys::signal::{Signal, kill};

use super::lab_with_waiting_container;
use crate::{
    command::{poll, start},
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    pty::Terminal,
    soak,
    verify::compare_both,
};

fn pause(lab: &Lab) {
    lab.ctr(&["task", "pause", "c"]).succeeds();
}

fn resume(lab: &Lab) {
    lab.ctr(&["task", "resume", "c"]).succeeds();
}

fn state(lab: &Lab) -> String {
    lab.task("c").expect("there is no task").0
}

/// Counts into its log, and tells in each line what time it is.
const COUNTING: [&str; 3] = ["sh", "-c", "i=0; while :; do echo $i $(date +%s); i=$((i+1)); done"];

/// As with runc: the state is told, nothing runs meanwhile, and what would need a process is refused.
pub fn a_paused_task_stands_still_until_it_is_resumed(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached("c", &COUNTING);
    let logged = || fs::metadata(lab.log_dir("c").join("stdout")).map_or(0, |log| log.len());
    assert!(poll(lab.limit(), || logged() > 100), "nothing runs");
    pause(&lab);
    assert_eq!(state(&lab), "PAUSED");
    let before = logged();
    lab.exec("c", &["true"]).fails_with(&["paused"]);
    lab.ctr(&["task", "pause", "c"]).fails_with(&["paused"]);
    lab.ctr(&["task", "metrics", "c"]);
    lab.stop_containerd();
    lab.start_containerd();
    assert_eq!(state(&lab), "PAUSED", "after a restart of containerd");
    assert_eq!(logged(), before, "something runs");
    resume(&lab);
    assert_eq!(state(&lab), "RUNNING");
    assert!(poll(lab.limit(), || logged() > before + 100), "nothing runs any more");
    lab.exec("c", &["true"]).succeeds();
    lab.ctr(&["task", "resume", "c"]).fails_with(&["running"]);
    let log = String::from_utf8(logs::read(&lab.log_dir("c"), "stdout")).unwrap();
    for (n, line) in log.lines().enumerate().take(log.matches('\n').count()) {
        assert!(line.starts_with(&format!("{n} ")), "line {n} is {line:?}");
    }
    lab.remove("c");
    lab.nothing_is_left();
}

/// SIGKILL does not wait for a resume.
pub fn a_paused_task_can_be_killed_and_deleted(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    pause(&lab);
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "c"]).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// A SIGTERM that comes during a pause arrives after it.
pub fn a_signal_waits_for_the_resume(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    pause(&lab);
    let term = start(&mut lab.ctr_command(&["task", "kill", "--signal", "SIGTERM", "c"]));
    assert_eq!(state(&lab), "PAUSED");
    resume(&lab);
    term.wait(lab.limit()).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 143);
    lab.nothing_is_left();
}

/// containerd runs `shim delete` then, which finds a guest that answers nothing.
pub fn a_shim_that_is_killed_while_its_sandbox_is_paused_leaves_nothing(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    pause(&lab);
    kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
    let over = || lab.task("c").is_none_or(|(state, _)| state == "STOPPED");
    assert!(poll(lab.limit(), over), "the task lives on");
    lab.ctr(&["task", "delete", "--force", "c"]);
    lab.ctr(&["container", "delete", "c"]).succeeds();
    lab.nothing_is_left();
}

/// A container that writes as fast as it can to its log and its client, an exec that does the same, one
/// that copies its input, and one on a terminal.
pub fn pauses_in_full_flow_cost_and_double_no_byte(backend: Backend) {
    let log = "segment_bytes = 67108864\nsegments = 40".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    let rounds = if backend.is_vm() { soak::rounds(4, 200) } else { soak::rounds(20, 200) };
    let bytes: u64 = if backend.is_vm() { 16 << 20 } else { 128 << 20 };
    let write = format!("cube-test-writer stream 1 {bytes} 2 {bytes}");
    let wait = "trap 'exit 143' TERM; while :; do sleep 0.1; done";
    let mut init = piped(&mut lab.run_command(&["--rm"], "c", &["sh", "-c", &format!("{write}; {wait}")]));
    let readers = compared(&mut init);
    lab.wait_for_state("c", Some("RUNNING"));
    let mut exec = piped(&mut lab.exec_command(&[], "c", &["sh", "-c", &write]));
    let exec_readers = compared(&mut exec);
    let copier = Copier::start(&lab);
    let mut terminal = Terminal::start(&mut lab.exec_command(&["--tty"], "c", &["sh"]));
    terminal.wait_for("# ", lab.limit());

    for round in 0..rounds {
        terminal.type_keys(&format!("echo ro''und {round}\r"));
        pause(&lab);
        resume(&lab);
        terminal.wait_for(&format!("round {round}\n"), lab.limit());
    }
    terminal.type_keys("exit 42\r");
    assert_eq!(terminal.wait(lab.limit()).code(), Some(42));
    let copied = copier.end();
    assert_eq!(exec_readers.join().unwrap(), (bytes, bytes), "bytes at the exec's client");
    assert!(exec.wait().unwrap().success());
    assert!(poll(lab.limit(), || logged(&lab) >= 2 * bytes), "only {} bytes are logged", logged(&lab));
    lab.ctr(&["task", "kill", "--signal", "SIGTERM", "c"]).succeeds();
    assert_eq!(readers.join().unwrap(), (bytes, bytes), "bytes at the client");
    assert_eq!(init.wait().unwrap().code(), Some(143));
    for (stream, seed) in [("stdout", 1), ("stderr", 2)] {
        assert_eq!(logs::compare_segments(&lab.log_dir("c"), stream, seed, bytes), 0);
    }
    lab.nothing_is_left();
    let name = format!("pauses in full flow, {}", backend.name());
    soak::record(&name, "pauses", rounds);
    soak::record(&name, "bytes compared", 6 * bytes + copied);
}

fn logged(lab: &Lab) -> u64 {
    let end = |stream| {
        let segments = logs::try_segments(&lab.log_dir("c"), stream).unwrap_or_default();
        segments.last().map_or(0, |last| last.header.first_offset + last.len)
    };
    end("stdout") + end("stderr")
}

fn piped(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn compared(child: &mut Child) -> JoinHandle<(u64, u64)> {
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    thread::spawn(move || compare_both(out, err, |_| ()))
}

/// `cat` in the container, fed without end.
struct Copier {
    child: Child,
    enough: Arc<AtomicBool>,
    feeder: JoinHandle<u64>,
    checker: JoinHandle<u64>,
}

impl Copier {
    fn start(lab: &Lab) -> Copier {
        let mut command = lab.exec_command(&[], "c", &["cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let enough = Arc::new(AtomicBool::new(false));
        let feeder = thread::spawn({
            let enough = enough.clone();
            move || {
                let (mut at, mut piece) = (0, vec![0; 10_007]);
                while !enough.load(Ordering::Relaxed) {
                    cube_test_writer::fill(7, at, &mut piece);
                    stdin.write_all(&piece).unwrap();
                    at += piece.len() as u64;
                }
                at
            }
        });
        let checker = thread::spawn(move || {
            let (mut at, mut got, mut expected) = (0, vec![0; 64 << 10], vec![0; 64 << 10]);
            loop {
                let n = stdout.read(&mut got).unwrap();
                if n == 0 {
                    return at;
                }
                cube_test_writer::fill(7, at, &mut expected[..n]);
                assert!(got[..n] == expected[..n], "the copy differs between {at} and {}", at + n as u64);
                at += n as u64;
            }
        });
        Copier { child, enough, feeder, checker }
    }

    /// Ends the input, and gives the bytes that were copied.
    fn end(mut self) -> u64 {
        self.enough.store(true, Ordering::Relaxed);
        let (fed, copied) = (self.feeder.join().unwrap(), self.checker.join().unwrap());
        assert_eq!(copied, fed, "bytes copied");
        assert!(self.child.wait().unwrap().success());
        copied
    }
}
