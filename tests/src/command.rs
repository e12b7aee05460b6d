//! Programs that a test runs: what they print is kept, and each wait has a deadline.

use std::{
    fmt,
    io::{Read, Write},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::Pid;

/// Bytes that a thread reads while a test looks at them.
#[derive(Debug, Clone, Default)]
pub struct Capture(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Reads `from` to its end in a thread of its own.
    pub fn of(mut from: impl Read + Send + 'static) -> Capture {
        let capture = Capture::default();
        let filled = capture.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            loop {
                // A terminal whose last user has gone reports EIO in place of the end.
                let n = from.read(&mut buffer).unwrap_or(0);
                let (captured, changed) = &*filled.0;
                let mut captured = captured.lock().unwrap();
                captured.bytes.extend_from_slice(&buffer[..n]);
                captured.ended = n == 0;
                changed.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        capture
    }

    /// Everything so far, bytes that are not UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().bytes).into_owned()
    }

    /// Waits until `text` is among the bytes; panics at the end of input or after `limit`.
    pub fn wait_for(&self, text: &str, limit: Duration) {
        self.wait_until(&format!("{text:?}"), limit, |bytes| {
            bytes.windows(text.len()).any(|window| window == text.as_bytes())
        });
    }

    /// Waits until `found` says yes; panics at the end of input or after `limit`.
    pub fn wait_until(&self, what: &str, limit: Duration, found: impl Fn(&[u8]) -> bool) {
        let (captured, changed) = &*self.0;
        let captured = captured.lock().unwrap();
        let waiting = |c: &mut Captured| !c.ended && !found(&c.bytes);
        let (captured, _) = changed.wait_timeout_while(captured, limit, waiting).unwrap();
        if !found(&captured.bytes) {
            let why = if captured.ended { "the output ended" } else { "time is up" };
            let seen = String::from_utf8_lossy(&captured.bytes).into_owned();
            drop(captured);
            panic!("no {what} in the output: {why}; seen:\n{seen}");
        }
    }

    fn wait_end(&self, limit: Duration) -> Option<Vec<u8>> {
        let (captured, changed) = &*self.0;
        let (captured, _) =
            changed.wait_timeout_while(captured.lock().unwrap(), limit, |c| !c.ended).unwrap();
        captured.ended.then(|| captured.bytes.clone())
    }
}

/// A program that runs. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    line: String,
    started: Instant,
    /// What it has printed to stdout.
    pub stdout: Capture,
    /// What it has printed to stderr.
    pub stderr: Capture,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    line: String,
    /// Exit status or signal.
    pub status: ExitStatus,
    /// All of stdout.
    pub stdout: Vec<u8>,
    /// All of stderr.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

/// Starts `command` with stdin, if it has none yet, from /dev/null.
pub fn start(command: &mut Command) -> Running {
    let line = format!("{command:?}");
    let started = Instant::now();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {line}: {e}"));
    let stdout = Capture::of(child.stdout.take().unwrap());
    let stderr = Capture::of(child.stderr.take().unwrap());
    Running { child, line, started, stdout, stderr }
}

impl Running {
    /// The pipe to its stdin; panics if `command` was not given one.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    /// Writes `bytes` to its stdin and closes that, in a thread of its own.
    pub fn feed(&mut self, bytes: Vec<u8>) {
        let mut stdin = self.stdin();
        // A program that ends early does not read it all: its exit status tells.
        thread::spawn(move || stdin.write_all(&bytes).ok());
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end and that of its output; panics after `limit`.
    pub fn wait(mut self, limit: Duration) -> Finished {
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        let output = self.stdout.wait_end(left()).zip(self.stderr.wait_end(left()));
        let status = wait_child(&mut self.child, left());
        let (Some((stdout, stderr)), Some(status)) = (output, status) else {
            let (out, err) = (self.stdout.text(), self.stderr.text());
            panic!("{} did not end in {limit:?}; stdout:\n{out}\nstderr:\n{err}", self.line);
        };
        Finished { line: self.line.clone(), status, stdout, stderr, took: self.started.elapsed() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Finished {
    /// Exit status as a shell has it: 128 + n for signal n.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// stdout as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stderr as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Panics unless the exit status is `code`.
    #[track_caller]
    pub fn exits_with(self, code: i32) -> Finished {
        assert_eq!(self.code(), code, "exit status of {self}");
        self
    }

    /// Panics unless it succeeded.
    #[track_caller]
    pub fn succeeds(self) -> Finished {
        self.exits_with(0)
    }

    /// Panics unless it failed and every one of `words` is in what it printed to stderr.
    #[track_caller]
    pub fn fails_with(self, words: &[&str]) -> Finished {
        assert_ne!(self.code(), 0, "exit status of {self}");
        let text = self.err().to_lowercase();
        for word in words {
            assert!(text.contains(&word.to_lowercase()), "no {word:?} in stderr of {self}");
        }
        self
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).into_owned();
        write!(
            f,
            "{}: {}\nstdout:\n{}\nstderr:\n{}",
            self.line,
            self.status,
            cut(&self.stdout),
            cut(&self.stderr)
        )
    }
}

/// Waits for a child; `None` after `limit`.
pub fn wait_child(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let mut status = None;
    poll(limit, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status
}

/// Asks `done` again and again until it says yes, at most for `limit`. Gives its last answer.
pub fn poll(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    loop {
        if done() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}
