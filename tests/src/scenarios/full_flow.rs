//! A sandbox in which everything flows at once, for whatever is done to it meanwhile.

use std::{
    io::{self, Read, Write},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use crate::{command::poll, lab::Lab, logs, pty::Terminal, verify::compare_both};

/// Runs container `c`, with these flags of `ctr run`, that writes as fast as it can to its log and its
/// client, an exec that does the same, one that copies its input, and one on a terminal; and `disturb` in
/// each round, with all of it in flow. Compares every byte, and gives their number.
pub(super) fn run(lab: &Lab, flags: &[&str], rounds: u32, mut disturb: impl FnMut(u32)) -> u64 {
    let write = |totals: &str| format!("cube-test-writer until /stop 1 2 {totals}");
    let wait = "trap 'exit 143' TERM; while :; do sleep 0.1; done";
    let script = format!("{}; {wait}", write("/init"));
    let mut init = piped(&mut lab.run_command(&[&["--rm"], flags].concat(), "c", &["sh", "-c", &script]));
    let readers = compared(lab, &mut init);
    // Clients of containerd 1.6 close their ends when they hear of an exit, whatever is on its way.
    let script = format!("{}; until [ -e /taken ]; do sleep 0.1; done", write("/exec"));
    let mut exec = piped(&mut lab.exec_command(&[], "c", &["sh", "-c", &script]));
    let exec_readers = compared(lab, &mut exec);
    let copier = Copier::start(lab);
    let mut terminal = Terminal::start(&mut lab.exec_command(&["--tty"], "c", &["sh"]));
    terminal.wait_for("# ", lab.limit());

    let more = if lab.backend().is_vm() { 256 << 10 } else { 4 << 20 };
    for round in 0..rounds {
        let before = logged(lab);
        assert!(poll(lab.limit(), || logged(lab) > before + more), "nothing flows in round {round}");
        terminal.type_keys(&format!("echo ro''und {round}\r"));
        disturb(round);
        terminal.wait_for(&format!("round {round}\n"), lab.limit());
    }
    terminal.type_keys("touch /stop; exit 42\r");
    assert_eq!(terminal.wait(lab.limit()).code(), Some(42));
    let copied = copier.end();
    let (by_exec, written) = (totals(lab, "/exec"), totals(lab, "/init"));
    exec_readers.have_had(lab, by_exec);
    super::make_file(lab, "c", "/taken");
    assert_eq!(exec_readers.end(), by_exec, "bytes at the exec's client");
    assert!(exec.wait().unwrap().success());
    let all = written.0 + written.1;
    assert!(poll(lab.limit(), || logged(lab) >= all), "of {all} bytes {} are logged", logged(lab));
    readers.have_had(lab, written);
    lab.ctr(&["task", "kill", "--signal", "SIGTERM", "c"]).succeeds();
    assert_eq!(readers.end(), written, "bytes at the client");
    assert_eq!(init.wait().unwrap().code(), Some(143));
    logs::compare_segments(&lab.log_dir("c"), "stdout", 1, written.0);
    logs::compare_segments(&lab.log_dir("c"), "stderr", 2, written.1);
    2 * all + by_exec.0 + by_exec.1 + copied
}

/// What the writer says that it has written to stdout and to stderr.
fn totals(lab: &Lab, file: &str) -> (u64, u64) {
    let script = format!("until [ -s {file} ]; do sleep 0.1; done; cat {file}");
    let said = lab.exec("c", &["sh", "-c", &script]).succeeds().out();
    let mut numbers = said.split_whitespace().map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
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

/// Compares what a client's two outputs have with the streams 1 and 2.
struct Readers {
    counts: [Arc<AtomicU64>; 2],
    comparing: JoinHandle<(u64, u64)>,
}

/// Returns once there is something to compare: a `ctr` that has not got that far is refused by a pause.
fn compared(lab: &Lab, child: &mut Child) -> Readers {
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (out, err) = (Counted::new(out), Counted::new(err));
    let counts = [out.count.clone(), err.count.clone()];
    let comparing = thread::spawn(move || compare_both(out, err, |_| ()));
    assert!(poll(lab.limit(), || counts[0].load(Ordering::Relaxed) > 0), "nothing comes");
    Readers { counts, comparing }
}

impl Readers {
    /// Waits for so many bytes.
    fn have_had(&self, lab: &Lab, (out, err): (u64, u64)) {
        let counts = || self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let had = || counts().iter().zip([out, err]).all(|(count, wanted)| *count >= wanted);
        // The comparison says itself what is wrong if it ends early.
        let over = || had() || self.comparing.is_finished();
        assert!(poll(lab.limit(), over), "of {:?} bytes {:?} have come", (out, err), counts());
    }

    /// What it was, in all.
    fn end(self) -> (u64, u64) {
        self.comparing.join().unwrap()
    }
}

/// Counts what is read.
struct Counted<R> {
    reader: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Counted<R> {
    fn new(reader: R) -> Counted<R> {
        Counted { reader, count: Arc::default() }
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
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
        let (mut stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut stdout = Counted::new(stdout);
        let copied = stdout.count.clone();
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
        assert!(poll(lab.limit(), || copied.load(Ordering::Relaxed) > 0), "nothing is copied");
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
