//! The pipeline without our features: a writer, a pipe of 1 MiB, a relay that reads 64 KiB at a time, a
//! Unix socket, and a receiver that writes a file.
//!
//! Relay and receiver are processes of their own, as agent and shim are.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cube_tests::{command::poll, paths};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::resource::{UsageWho, getrusage},
    sys::time::TimeVal,
    unistd::pipe2,
};

use crate::{flow::Flow, polling};

/// Bytes of the pipe, as the agent's.
const PIPE: i32 = 1 << 20;

/// Bytes moved at a time, the body of one DATA frame.
const CHUNK: usize = 64 << 10;

/// First argument of this program when it is one end of a pipeline.
pub(crate) const ROLE: &str = "role";

/// What carries the bytes from relay to receiver.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transport {
    /// write(2) and read(2).
    Bare,
    /// A ttrpc request for each 4 KiB.
    Polling,
}

impl Transport {
    fn roles(self) -> [&'static str; 2] {
        match self {
            Transport::Bare => ["bare-receiver", "bare-relay"],
            Transport::Polling => ["polling-receiver", "polling-relay"],
        }
    }
}

/// Moves `bytes` through the pipeline into a file in `dir`.
pub(crate) fn run(transport: Transport, dir: &Path, bytes: u64) -> Flow {
    let (socket, file) = (dir.join("pipeline.sock"), dir.join("pipeline.out"));
    let [receiver, relay] = transport.roles();
    let spawn = |role: &str, args: &[&Path]| -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([ROLE, role]).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    };
    // Whoever listens comes first; the receiver dials the relay where it asks for the bytes.
    let amount = PathBuf::from(bytes.to_string());
    let relay_args: [&Path; 2] = [&socket, &amount];
    let receiver_args: [&Path; 2] = [&socket, &file];
    let (first, second) = match transport {
        Transport::Bare => (receiver, relay),
        Transport::Polling => (relay, receiver),
    };
    let args_of = |role| if role == relay { &relay_args } else { &receiver_args };
    let first = spawn(first, args_of(first));
    assert!(poll(Duration::from_secs(10), || socket.exists()), "no {}", socket.display());
    let second = spawn(second, args_of(second));
    let watched = Flow::watch(&file, bytes, &[]);
    let cpu = cpu_told_by(first) + cpu_told_by(second);
    std::fs::remove_file(&file).unwrap();
    std::fs::remove_file(&socket).ok();
    Flow { cpu, cpu_bytes: bytes, ..watched }
}

/// Each role prints the CPU time that it has used, its children's not included, when it is done.
fn cpu_told_by(child: Child) -> Duration {
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    Duration::from_nanos(String::from_utf8(ended.stdout).unwrap().trim().parse().unwrap())
}

/// Plays the role that `args` name.
pub(crate) fn play(args: &[String]) {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["bare-receiver", socket, file] => receive(socket.as_ref(), file.as_ref()),
        ["bare-relay", socket, bytes] => relay(socket.as_ref(), bytes),
        ["polling-receiver", socket, file] => polling::receive(socket.as_ref(), file.as_ref()),
        ["polling-relay", socket, bytes] => polling::relay(socket.as_ref(), bytes),
        _ => panic!("no such role: {args:?}"),
    }
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let nanos = |time: TimeVal| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()) as u64);
    println!("{}", (nanos(usage.user_time()) + nanos(usage.system_time())).as_nanos());
}

/// The writer, and the end of its pipe.
pub(crate) fn writer(bytes: &str) -> (Child, OwnedFd) {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&read, FcntlArg::F_SETPIPE_SZ(PIPE)).unwrap();
    let mut command = Command::new(paths::writer());
    command.args(["blocks", &CHUNK.to_string(), bytes]).stdout(write);
    (command.spawn().unwrap(), read)
}

fn relay(socket: &Path, bytes: &str) {
    let mut socket = UnixStream::connect(socket).unwrap();
    let (mut writer, pipe) = writer(bytes);
    copy(File::from(pipe), &mut socket).unwrap();
    assert!(writer.wait().unwrap().success());
}

fn receive(socket: &Path, file: &Path) {
    let (socket, _) = UnixListener::bind(socket).unwrap().accept().unwrap();
    copy(socket, &mut File::create_new(file).unwrap()).unwrap();
}

/// std::io::copy would splice, which no relay can that keeps what it has sent.
fn copy(mut from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n])?,
        }
    }
}

/// How long something took, in seconds.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed().as_secs_f64(), result)
}
