//! A host with logs and sandboxes in a temporary directory, and `cubecli` run against it.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code, though not in a test function")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use cube_shim::{
    control::sandbox_ttrpc::{Sandbox, create_sandbox},
    log::format::{Record, RecordKind, SegmentHeader},
    state::{ContainerState, FORMAT, RunDir, State},
};
use tokio::sync::oneshot;
use ttrpc::r#async::Server;

/// Much longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Lets a shim serve its socket until what it gives is dropped.
pub fn serve(socket: &Path, shim: impl Sandbox + Send + 'static) -> oneshot::Sender<()> {
    let address = format!("unix://{}", socket.display());
    let (stop, stopped) = oneshot::channel();
    let (ready, is_ready) = mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let service = create_sandbox(Arc::new(shim));
            let mut server = Server::new().bind(&address).unwrap().register_service(service);
            server.start().await.unwrap();
            ready.send(()).unwrap();
            let _ = stopped.await;
        });
    });
    is_ready.recv_timeout(LIMIT).unwrap();
    stop
}

pub struct Host {
    temp: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Host {
        let host = Host { temp: tempfile::tempdir().unwrap() };
        host.configure("");
        host
    }

    pub fn configure(&self, extra: &str) {
        let [run, logs, templates] = ["run", "logs", "templates"].map(|name| self.path(name));
        let templates = format!("[log]\ntemplate_dir = {templates:?}");
        let text = if extra.contains("[log]") {
            format!("run_dir = {run:?}\n{}\n", extra.replace("[log]", &templates))
        } else {
            format!("run_dir = {run:?}\n{templates}\ndir = {logs:?}\n{extra}\n")
        };
        fs::write(self.path("config.toml"), text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub fn log_dir(&self, id: &str) -> PathBuf {
        self.path("logs/default").join(id)
    }

    pub fn template_log(&self, id: &str, stream: &str) -> Log {
        Log::create(&self.path("templates").join(id), stream)
    }

    pub fn log(&self, id: &str, stream: &str) -> Log {
        Log::create(&self.log_dir(id), stream)
    }

    /// The state file of a sandbox with one container, as its shim writes it.
    pub fn sandbox(&self, id: &str, log_dir: PathBuf) -> RunDir {
        let dir = RunDir::of(&self.path("run"), "/test", "default", id);
        dir.create().unwrap();
        let container = ContainerState {
            bundle: self.path("bundle"),
            log_dir: Some(log_dir),
            created_ns: 1,
            guest_id: None,
        };
        dir.save(&State {
            format: FORMAT,
            namespace: "default".into(),
            sandbox_id: id.into(),
            cgroup: self.path("no-such-cgroup"),
            shim_home: None,
            backend: "process".into(),
            user: 0,
            vmm_pid: 4242,
            timeline: 1,
            past_timelines: Vec::new(),
            suspended: None,
            created_ns: 1,
            containers: BTreeMap::from([(id.into(), container)]),
        })
        .unwrap();
        dir
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cubecli"));
        command.args(args).env("CUBE_CONFIG", self.path("config.toml"));
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What is printed by a run that must succeed without a word on standard error.
    pub fn ok(&self, args: &[&str]) -> Vec<u8> {
        let output = self.run(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && errors.is_empty(), "{args:?}: {}: {errors}", output.status);
        output.stdout
    }

    pub fn text(&self, args: &[&str]) -> String {
        String::from_utf8(self.ok(args)).unwrap()
    }

    /// The exit code and the message of a run that must fail.
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// `cubecli` in the background.
    pub fn start(&self, args: &[&str]) -> Running {
        Running::new(self.command(args).stdout(Stdio::piped()).spawn().unwrap())
    }
}

/// One stream of a log, written with the file names and the order of work of the format.
pub struct Log {
    dir: PathBuf,
    stream: String,
    number: u64,
    offset: u64,
    file_offset: u64,
    time_ns: u64,
    data: File,
    index: File,
}

impl Log {
    pub fn create(dir: &Path, stream: &str) -> Log {
        fs::create_dir_all(dir).unwrap();
        let (data, index) = begin(dir, stream, 1, 0, 0);
        Log {
            dir: dir.into(),
            stream: stream.into(),
            number: 1,
            offset: 0,
            file_offset: 0,
            time_ns: 0,
            data,
            index,
        }
    }

    pub fn write(&mut self, time_ns: u64, bytes: &[u8]) {
        self.data.write_all(bytes).unwrap();
        self.record(RecordKind::Write, time_ns);
        self.offset += bytes.len() as u64;
        self.file_offset += bytes.len() as u64;
    }

    pub fn gap(&mut self, time_ns: u64, lost: u64) {
        self.offset += lost;
        self.record(RecordKind::Gap, time_ns);
    }

    pub fn rotate(&mut self) {
        let closed = format!("{}.{}", self.stream, self.number);
        let rename = |from: String, to: String| fs::rename(self.dir.join(from), self.dir.join(to)).unwrap();
        rename(format!("{}.idx", self.stream), format!("{closed}.idx"));
        rename(self.stream.clone(), closed);
        self.number += 1;
        (self.data, self.index) = begin(&self.dir, &self.stream, self.number, self.offset, self.time_ns);
        self.file_offset = 0;
    }

    fn record(&mut self, kind: RecordKind, time_ns: u64) {
        self.time_ns = time_ns;
        let record = Record { kind, stream_offset: self.offset, file_offset: self.file_offset, time_ns };
        self.index.write_all(&record.encode()).unwrap();
    }
}

fn begin(dir: &Path, stream: &str, number: u64, first_offset: u64, created_ns: u64) -> (File, File) {
    let header = SegmentHeader { number, first_offset, timeline: 1, epoch: 1, created_ns };
    let mut index = File::create(dir.join(format!("{stream}.idx"))).unwrap();
    index.write_all(&header.encode()).unwrap();
    (File::create(dir.join(stream)).unwrap(), index)
}

/// A process whose output is collected.
pub struct Running {
    pub child: Child,
    output: mpsc::Receiver<Vec<u8>>,
    pub seen: Vec<u8>,
}

impl Running {
    fn new(mut child: Child) -> Running {
        let output = collect(child.stdout.take().unwrap());
        Running { child, output, seen: Vec::new() }
    }

    /// Waits until `count` bytes have been printed in all.
    pub fn wait_for(&mut self, count: usize) {
        let deadline = Instant::now() + LIMIT;
        while self.seen.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            self.seen.extend(self.output.recv_timeout(left).expect("output in time"));
        }
    }

    /// Waits for the end; the status, and all that was printed.
    pub fn finish(mut self) -> (std::process::ExitStatus, Vec<u8>) {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.child.kill().unwrap();
                    panic!("cubecli did not end in time");
                }
            }
        }
        (self.child.wait().unwrap(), std::mem::take(&mut self.seen))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: ChildStdout) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            if sender.send(buffer[..read].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}
