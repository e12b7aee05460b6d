//! A sandbox in which everything flows that can, while it is disturbed.

use std::{
    io::{self, Read, Write},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use crate::{command::poll, lab::Lab, logs, pty::Terminal, verify::compare_both};

/// A container that writes as fast as it can to its log and its client, an exec that does the same, one
/// that copies its input, and one on a terminal. `disturb` is called again and again meanwhile with the
/// number of the round, and must let everything go on in the end. Gives the number of bytes that were
/// compared.
pub(super) fn keeps_every_byte(
    lab: &Lab,
    flags: &[&str],
    rounds: u32,
    bytes: u64,
    disturb: impl Fn(u32),
) -> u64 {
    let write = format!("cube-test-writer stream 1 {bytes} 2 {bytes}");
    let wait = "trap 'exit 143' TERM; while :; do sleep 0.1; done";
    let flags = [&["--rm"], flags].concat();
    let mut init = piped(&mut lab.run_command(&flags, "c", &["sh", "-c", &format!("{write}; {wait}")]));
    let readers = compared(lab, &mut init);
    let mut exec = piped(&mut lab.exec_command(&[], "c", &["sh", "-c", &write]));
    let exec_readers = compared(lab, &mut exec);
    let copier = Copier::start(lab);
    let mut terminal = Terminal::start(&mut lab.exec_command(&["--tty"], "c", &["sh"]));
    terminal.wait_for("# ", lab.limit());

    for round in 0..rounds {
        terminal.type_keys(&format!("echo ro''und {round}\r"));
        disturb(round);
        terminal.wait_for(&format!("round {round}\n"), lab.limit());
    }
    terminal.type_keys("exit 42\r");
    assert_eq!(terminal.wait(lab.limit()).code(), Some(42));
    let copied = copier.end();
    assert_eq!(exec_readers.join().unwrap(), (bytes, bytes), "bytes at the exec's client");
    assert!(exec.wait().unwrap().success());
    assert!(poll(lab.limit(), || logged(lab) >= 2 * bytes), "only {} bytes are logged", logged(lab));
    lab.ctr(&["task", "kill", "--signal", "SIGTERM", "c"]).succeeds();
    assert_eq!(readers.join().unwrap(), (bytes, bytes), "bytes at the client");
    assert_eq!(init.wait().unwrap().code(), Some(143));
    for (stream, seed) in [("stdout", 1), ("stderr", 2)] {
        assert_eq!(logs::compare_segments(&lab.log_dir("c"), stream, seed, bytes), 0);
    }
    lab.nothing_is_left();
    6 * bytes + copied
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

/// Returns once there is something to compare.
fn compared(lab: &Lab, child: &mut Child) -> JoinHandle<(u64, u64)> {
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (out, begun) = Heralded::new(out);
    let comparing = thread::spawn(move || compare_both(out, err, |_| ()));
    begun.recv_timeout(lab.limit()).expect("nothing comes");
    comparing
}

/// A reader that tells of its first bytes: a `ctr` that has not got that far is refused by a pause.
struct Heralded<R> {
    reader: R,
    first: Option<mpsc::Sender<()>>,
}

impl<R: Read> Heralded<R> {
    fn new(reader: R) -> (Heralded<R>, mpsc::Receiver<()>) {
        let (first, begun) = mpsc::channel();
        (Heralded { reader, first: Some(first) }, begun)
    }
}

impl<R: Read> Read for Heralded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        if let Some(first) = self.first.take() {
            first.send(()).ok();
        }
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
        let (mut stdout, begun) = Heralded::new(stdout);
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
        begun.recv_timeout(lab.limit()).expect("nothing is copied");
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
