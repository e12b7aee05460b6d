//! Spawning the init stage: clone3(2) straight into the right cgroup.
//!
//! The agent is a program with a runtime, an allocator and locks, and a forked copy of it must touch
//! none of them. So the child makes a few system calls, all prepared before the clone, and executes the
//! agent's binary afresh.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
};

use super::{
    ContainerError, Spawned,
    stage::protocol::{
        AgentEnd, CONTROL_FD, Instructions, Message, Report, control_sockets, failed_template, unexpected,
    },
};
use crate::stdio::ChildStdio;

static STAGE_EXECUTABLE: OnceLock<PathBuf> = OnceLock::new();

/// Names the program that is executed as the init stage, with the argument `init`. By default it is
/// /proc/self/exe; a test, whose own binary has no such subcommand, sets it once before anything else.
pub fn set_stage_executable(path: PathBuf) {
    // A second call would race with spawns; the first one stays.
    let _ = STAGE_EXECUTABLE.set(path);
}

/// What a stage is started with.
pub(super) struct Launch<'a> {
    pub(super) instructions: &'a Instructions,
    pub(super) stdio: ChildStdio,
    /// Directory of the cgroup that it is born in.
    pub(super) cgroup: OwnedFd,
    /// The stage's fd 5.
    pub(super) extra: OwnedFd,
    /// Whether it is the first process of a new pid namespace.
    pub(super) new_pid_namespace: bool,
}

/// A stage at work, or the child that it has made to become the program. It is killed when this is
/// dropped before [`Child::release`].
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) control: AgentEnd,
    kill: KillOnDrop,
}

/// Kills a process that nobody wants any more: an error, or a request that was cancelled.
#[derive(Debug)]
struct KillOnDrop {
    pidfd: OwnedFd,
    armed: bool,
}

impl KillOnDrop {
    fn new(pidfd: &OwnedFd) -> Result<Self, ContainerError> {
        let pidfd = pidfd.try_clone().map_err(|source| ContainerError::stage("duplicate a pidfd", source))?;
        Ok(Self { pidfd, armed: true })
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if self.armed {
            // A process that is gone already is as good as killed.
            let _ = pidfd_kill(self.pidfd.as_fd());
        }
    }
}

pub(super) fn pidfd_kill(pidfd: BorrowedFd<'_>) -> nix::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a system call on a descriptor that lives; its siginfo may be null.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0) };
    Errno::result(result).map(drop)
}

impl Child {
    /// Waits until only `execve` is left to do. Gives the terminal, if there is one.
    pub(super) async fn await_ready(&mut self) -> Result<Option<OwnedFd>, ContainerError> {
        let mut terminal = None;
        loop {
            let message = self.control.message().await;
            match message
                .map_err(|source| ContainerError::stage("read the report of the init stage", source))?
            {
                Some(Message { report: Report::Failed { action, errno }, .. }) => {
                    return Err(ContainerError::stage(action, io::Error::from_raw_os_error(errno)));
                }
                Some(message) if message.sender != self.pid => return Err(unexpected(&message)),
                Some(Message { report: Report::Terminal(master), .. }) => terminal = Some(master),
                Some(Message { report: Report::Ready(None), .. }) => return Ok(terminal),
                Some(Message { report: Report::Ready(Some(born)), .. }) => {
                    // The stage has nothing left to do but to end.
                    self.kill = KillOnDrop::new(&born.pidfd)?;
                    (self.pid, self.pidfd) = (born.pid, born.pidfd);
                    return Ok(terminal);
                }
                None => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "it was killed or crashed");
                    return Err(ContainerError::stage(
                        "wait for the init stage, which ended without a report",
                        source,
                    ));
                }
            }
        }
    }

    /// The process is what its caller wanted, and the caller's from now on.
    pub(super) fn release(mut self, terminal: Option<OwnedFd>) -> (Spawned, AgentEnd) {
        self.kill.armed = false;
        (Spawned { pid: self.pid, pidfd: self.pidfd, terminal }, self.control)
    }
}

/// Starts a stage.
pub(super) fn spawn(launch: Launch<'_>) -> Result<Child, ContainerError> {
    let prepare = |action: &'static str| move |source: io::Error| ContainerError::stage(action, source);
    let (control, stage_control) = control_sockets()?;
    let instructions =
        launch.instructions.to_memfd().map_err(prepare("write the instructions of the init stage"))?;
    let [stdin, stdout, stderr] = match launch.stdio {
        ChildStdio::Pipes(pipes) => pipes,
        ChildStdio::Terminal => null_stdio().map_err(prepare("open /dev/null"))?,
    };
    let fds = [stdin, stdout, stderr, stage_control, instructions, launch.extra];
    let plan = ExecPlan::new(fds).map_err(prepare("prepare the descriptors of the init stage"))?;

    let namespaces = if launch.new_pid_namespace { libc::CLONE_NEWPID } else { 0 };
    let (pid, pidfd) = clone_into(&plan, launch.cgroup.as_fd(), namespaces)
        .map_err(|errno| ContainerError::stage("clone a process into the container's cgroup", errno))?;
    let kill = KillOnDrop::new(&pidfd)?;
    Ok(Child { pid, pidfd, control, kill })
}

fn null_stdio() -> io::Result<[OwnedFd; 3]> {
    let null = OwnedFd::from(File::options().read(true).write(true).open("/dev/null")?);
    Ok([null.try_clone()?, null.try_clone()?, null])
}

/// Everything that the child needs between clone and execve, made beforehand.
struct ExecPlan {
    executable: OwnedFd,
    /// The child's fds from 0 on. Each is above all targets, so that no `dup2` overwrites a source.
    fds: [OwnedFd; STAGE_FDS],
    failure: Vec<u8>,
}

const STAGE_FDS: usize = 6;
const ARGV: [&CStr; 2] = [c"cube-agent", c"init"];

impl ExecPlan {
    fn new(fds: [OwnedFd; STAGE_FDS]) -> io::Result<Self> {
        let path = STAGE_EXECUTABLE.get().map_or(Path::new("/proc/self/exe"), PathBuf::as_path);
        let executable = lift(&File::open(path)?.into())?;
        let [a, b, c, d, e, f] = &fds;
        let fds = [lift(a)?, lift(b)?, lift(c)?, lift(d)?, lift(e)?, lift(f)?];
        let failure = failed_template(&format!("execute {} as the init stage", path.display()));
        Ok(Self { executable, fds, failure })
    }
}

/// The same file at a descriptor above those that the stage uses.
fn lift(fd: &OwnedFd) -> io::Result<OwnedFd> {
    let lifted = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(STAGE_FDS as RawFd))?;
    // SAFETY: fcntl has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(lifted) })
}

/// linux/sched.h. The libc crate's constant overflows its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Clones a child into a cgroup and lets it execute the stage. Gives its pid and pidfd.
fn clone_into(
    plan: &ExecPlan,
    cgroup: BorrowedFd<'_>,
    namespaces: libc::c_int,
) -> nix::Result<(i32, OwnedFd)> {
    let argv = [ARGV[0].as_ptr(), ARGV[1].as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null()];
    let sources: [RawFd; STAGE_FDS] = std::array::from_fn(|target| plan.fds[target].as_raw_fd());
    let mut failure = plan.failure.clone();
    let mut pidfd: RawFd = -1;

    // SAFETY: clone_args is plain data, for which all zeros means "nothing asked for".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP | namespaces as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;

    // A signal handler of the agent's runtime must not run in the child: it would write into the pipe
    // that wakes the agent. The stage unblocks them again.
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    // SAFETY: without CLONE_VM the child runs on a copy of this thread's memory. It only calls
    // `execute_stage`, which is async-signal-safe and never returns. The size is that of `args`.
    let result = unsafe {
        let result = libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>());
        if result == 0 {
            execute_stage(&sources, plan.executable.as_raw_fd(), argv.as_ptr(), envp.as_ptr(), &mut failure);
        }
        Errno::result(result)
    };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    let pid = result? as i32;
    // SAFETY: clone3 succeeded with CLONE_PIDFD and has stored a new descriptor there.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// The child, between clone and execve: system calls only.
///
/// # Safety
/// `argv` and `envp` end with a null pointer and point to C strings; `failure` is a message of
/// [`failed_template`].
unsafe fn execute_stage(
    sources: &[RawFd; STAGE_FDS],
    executable: RawFd,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
    failure: &mut [u8],
) -> ! {
    // SAFETY: the caller vouches for the pointers; the rest are system calls on plain numbers.
    unsafe {
        let mut ok = true;
        for (target, source) in sources.iter().enumerate() {
            ok &= libc::dup2(*source, target as RawFd) >= 0;
        }
        ok &= libc::close_range(STAGE_FDS as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) == 0;
        if ok {
            libc::syscall(libc::SYS_execveat, executable, c"".as_ptr(), argv, envp, libc::AT_EMPTY_PATH);
        }
        let errno = (*libc::__errno_location()).to_ne_bytes();
        for (place, byte) in failure.iter_mut().skip(1).zip(errno) {
            *place = byte;
        }
        libc::write(CONTROL_FD, failure.as_ptr().cast(), failure.len());
        libc::_exit(127)
    }
}
