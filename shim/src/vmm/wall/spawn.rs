//! Starting a process behind a wall.
//!
//! clone3(2) by hand: what the standard library starts cannot be the first process of a pid namespace, and
//! would have to be moved into its cgroup, which takes the kernel milliseconds; here it is born there.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{SigSet, SigmaskHow, pthread_sigmask},
    unistd::pipe2,
};

use super::{Wall, root::text, step::Step};

/// `CLONE_INTO_CGROUP`, Linux 5.7.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Signals are numbered below.
const SIGNALS: libc::c_int = 65;

/// What the new process reports before it ends: number of the step, errno.
type Report = [u8; 8];

/// Numbers of steps that are no [`Step`].
const SETTING_UP: u32 = u32::MAX;
const EXECUTING: u32 = u32::MAX - 1;

/// Why a process does not run.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A path or word with a zero byte in it.
    #[error("{name:?} has a zero byte in it")]
    Name {
        /// The text.
        name: PathBuf,
    },
    /// This process could not start another one.
    #[error("cannot {action}")]
    Start {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A step of the new process failed.
    #[error("it cannot {step}")]
    Step {
        /// What it is.
        step: String,
        /// Why.
        source: io::Error,
    },
    /// The filter of system calls could not be made.
    #[error("no system call filter can be made")]
    Filter(#[from] seccompiler::BackendError),
}

/// A process that runs its program.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
}

/// What the new process needs, made before it is there.
struct Plan {
    steps: Vec<Step>,
    program: CString,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    stdio: [OwnedFd; 3],
    inherited: Vec<RawFd>,
    report: OwnedFd,
}

/// Runs `program` behind `wall`: in the cgroup directory `cgroup`, in a session of its own, with standard input,
/// output and error of `stdio`, and the descriptors of `inherited` under the numbers that they have here.
///
/// Returns when the program runs. Blocks for a millisecond or two.
pub(crate) fn spawn(
    wall: &Wall,
    program: &Path,
    arguments: &[OsString],
    environment: Vec<(OsString, OsString)>,
    cgroup: &File,
    stdio: [OwnedFd; 3],
    inherited: Vec<RawFd>,
) -> Result<Started, SpawnError> {
    let start = |action| move |errno: Errno| SpawnError::Start { action, source: errno.into() };
    let word = |word: OsString| {
        CString::new(word.into_vec())
            .map_err(|error| SpawnError::Name { name: OsString::from_vec(error.into_vec()).into() })
    };
    let program = text(program)?;
    let mut words = vec![program.clone()];
    words.extend(arguments.iter().cloned().map(word).collect::<Result<Vec<_>, _>>()?);
    let variables: Vec<CString> = environment
        .into_iter()
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            word(name)
        })
        .collect::<Result<_, _>>()?;
    let pointers = |words: &[CString]| {
        let null = std::iter::once(std::ptr::null());
        words.iter().map(|word| word.as_ptr()).chain(null).collect::<Vec<_>>()
    };
    let (reports, report) = pipe2(OFlag::O_CLOEXEC).map_err(start("make a pipe"))?;
    let [stdin, stdout, stderr] = stdio.map(above_stdio);
    let plan = Plan {
        steps: wall.steps()?,
        program,
        arguments: pointers(&words),
        environment: pointers(&variables),
        stdio: [stdin?, stdout?, stderr?],
        inherited,
        report: above_stdio(report)?,
    };

    let mut pidfd: libc::c_int = -1;
    let mut arguments = libc::clone_args {
        flags: (libc::CLONE_PIDFD | wall.namespaces) as u64 | CLONE_INTO_CGROUP,
        pidfd: &raw mut pidfd as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.as_raw_fd() as u64,
    };
    // No handler of this process may run in the new one.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
        .map_err(start("block signals"))?;
    // SAFETY: like fork(2), without a new stack; the child makes system calls only, and never returns.
    let cloned = unsafe {
        let pid = libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>());
        if pid == 0 {
            enter(&plan);
        }
        Errno::result(pid)
    };
    let restored = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    let pid = cloned.map_err(start("make a process in its cgroup and namespaces"))?;
    // SAFETY: the kernel has just made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    restored.map_err(start("unblock signals"))?;

    let Plan { steps, report, stdio, .. } = plan;
    drop((report, stdio));
    let mut told: Report = [0; 8];
    let started = Started { pid: pid as u32, pidfd };
    match File::from(reports).read_exact(&mut told) {
        // Closed by execve.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(started),
        Err(source) => Err(SpawnError::Start { action: "hear of the new process", source }),
        Ok(()) => {
            // It has ended, or is about to.
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None);
            let [a, b, c, d, e, f, g, h] = told;
            let source = io::Error::from_raw_os_error(i32::from_ne_bytes([e, f, g, h]));
            let step = match u32::from_ne_bytes([a, b, c, d]) {
                SETTING_UP => "set its session and descriptors up".to_owned(),
                EXECUTING => "execute the program".to_owned(),
                number => steps.get(number as usize).map(ToString::to_string).unwrap_or_default(),
            };
            Err(SpawnError::Step { step, source })
        }
    }
}

/// A copy of a descriptor that is none of 0, 1 and 2, which are about to be taken.
fn above_stdio(fd: OwnedFd) -> Result<OwnedFd, SpawnError> {
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    let copied = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(3));
    let copied =
        copied.map_err(|errno| SpawnError::Start { action: "copy a descriptor", source: errno.into() })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copied) })
}

/// The new process, until it runs its program.
fn enter(plan: &Plan) -> ! {
    let (step, errno) = match set_up(plan) {
        Err(errno) => (SETTING_UP, errno),
        Ok(()) => match first_failure(&plan.steps) {
            Some((number, errno)) => (number, errno),
            None => (EXECUTING, execute(plan)),
        },
    };
    let mut told: Report = [0; 8];
    told[..4].copy_from_slice(&step.to_ne_bytes());
    told[4..].copy_from_slice(&(errno as i32).to_ne_bytes());
    // SAFETY: a descriptor and bytes of ours; then the process ends without running anything of its parent's.
    unsafe {
        libc::write(plan.report.as_raw_fd(), told.as_ptr().cast(), told.len());
        libc::_exit(127)
    }
}

fn first_failure(steps: &[Step]) -> Option<(u32, Errno)> {
    steps.iter().enumerate().find_map(|(number, step)| Some((number as u32, step.take().err()?)))
}

fn set_up(plan: &Plan) -> Result<(), Errno> {
    // SAFETY: system calls with numbers, and structures that outlive them.
    unsafe {
        // Handlers point to memory of a program that is about to be replaced, and ignored signals would stay
        // ignored. Two signals are the C library's own, which it does not let anybody have.
        let default: libc::sigaction = std::mem::zeroed();
        for signal in 1..SIGNALS {
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        // Signals that a terminal or a supervisor sends to the shim's group are not meant for it.
        Errno::result(libc::setsid())?;
        libc::umask(0o022);
        for (fd, number) in plan.stdio.iter().zip(0..) {
            Errno::result(libc::dup2(fd.as_raw_fd(), number))?;
        }
        for fd in &plan.inherited {
            Errno::result(libc::fcntl(*fd, libc::F_SETFD, 0))?;
        }
        Ok(())
    }
}

/// Does not return unless that fails.
fn execute(plan: &Plan) -> Errno {
    // SAFETY: lists that end with a null of texts that end with a zero.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::execve(plan.program.as_ptr(), plan.arguments.as_ptr(), plan.environment.as_ptr());
    }
    Errno::last()
}
