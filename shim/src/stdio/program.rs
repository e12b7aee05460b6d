//! `binary://`: a log program as containerd's own shim runs it.
//!
//! It reads stdout on fd 3 and stderr on fd 4, closes fd 5 when it is ready, and finds
//! `CONTAINER_ID` and `CONTAINER_NAMESPACE` as its whole environment. See containerd's
//! `docs/runtime-v2` and its `runtime/v2/logging` package.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    process::Stdio,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe2},
};
use tokio::{
    process::{Child, Command},
    time::{Instant, timeout, timeout_at},
};

use super::{fifo::PipeWriter, uri::Program};

/// Time that a program has to become ready; containerd's.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// Where the program finds stdout, stderr and the pipe that tells that it is ready.
const FDS: [i32; 3] = [3, 4, 5];

/// A running log program. Killed when it is dropped.
#[derive(Debug)]
pub(super) struct LogProgram {
    child: Child,
}

/// The write ends of the program's pipes.
pub(super) struct Pipes {
    pub(super) stdout: PipeWriter,
    pub(super) stderr: PipeWriter,
}

impl LogProgram {
    /// Starts the program and waits until it is ready.
    pub(super) async fn start(
        program: &Program,
        namespace: &str,
        container_id: &str,
    ) -> io::Result<(LogProgram, Pipes)> {
        let (stdout, stdout_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, stderr_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (ready, ready_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .env_clear()
            .env("CONTAINER_ID", container_id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let child = spawn_with(&mut command, [stdout, stderr, ready_writer])?;
        await_ready(ready).await?;
        let pipes = Pipes { stdout: non_blocking(stdout_writer)?, stderr: non_blocking(stderr_writer)? };
        Ok((LogProgram { child }, pipes))
    }

    /// Ends the program, whose pipes have been closed: what is still in them is its to read, so it has
    /// half of the time to end by itself; then it gets SIGTERM, and at the deadline SIGKILL.
    pub(super) async fn finish(mut self, deadline: Instant) {
        let half = deadline.saturating_duration_since(Instant::now()) / 2;
        if timeout(half, self.child.wait()).await.is_ok() {
            return;
        }
        if let Some(pid) = self.child.id() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        if timeout_at(deadline, self.child.wait()).await.is_err() {
            tracing::warn!("the log program ignores SIGTERM, killing it");
            let _ = self.child.kill().await;
        }
    }
}

/// Spawns `command` with `fds` as its [`FDS`].
fn spawn_with(command: &mut Command, fds: [OwnedFd; 3]) -> io::Result<Child> {
    // std's own pipe that reports a failed exec must not get one of these numbers: occupy them all.
    let mut occupied: Vec<File> = Vec::new();
    while occupied.last().is_none_or(|file| file.as_raw_fd() <= FDS[2]) {
        occupied.push(File::open("/dev/null")?);
    }
    // dup2 below must not overwrite a source that is still needed.
    let above = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(FDS[2] + 1)).map_err(io::Error::from);
    let mut sources = [0; 3];
    for (source, fd) in sources.iter_mut().zip(&fds) {
        *source = above(fd)?;
    }
    let owned = sources.map(|fd| {
        use std::os::fd::FromRawFd;
        // SAFETY: fcntl has just made this descriptor, nothing else owns it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    });
    let place = move || {
        for (source, target) in sources.into_iter().zip(FDS) {
            // SAFETY: dup2 only works on descriptor numbers; both are valid in the child.
            if unsafe { libc::dup2(source, target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls dup2, which is async-signal-safe, and nothing else.
    unsafe { command.pre_exec(place) };
    let child = command.spawn();
    drop(owned);
    child
}

/// Waits until the program closes fd 5, or writes to it.
async fn await_ready(ready: OwnedFd) -> io::Result<()> {
    let mut ready = tokio::net::unix::pipe::Receiver::from_owned_fd(ready)?;
    let mut byte = [0];
    let read = timeout(READY_LIMIT, tokio::io::AsyncReadExt::read(&mut ready, &mut byte)).await;
    read.map_err(|_| {
        let text = format!("the log program did not close fd {} within {READY_LIMIT:?}", FDS[2]);
        io::Error::new(io::ErrorKind::TimedOut, text)
    })??;
    Ok(())
}

fn non_blocking(fd: OwnedFd) -> io::Result<PipeWriter> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    PipeWriter::pipe(fd)
}
