//! The init stage: a fresh, single-threaded execution of the agent's binary that turns itself into a
//! process of a container, step by step, and reports the first step that fails.
//!
//! A process of the container with `CAP_SYS_PTRACE` may take over every process that it sees: read its
//! memory, use its descriptors, act with its capabilities. `PR_SET_DUMPABLE` does not stop it, for both are
//! in the same user namespace. So a stage is never seen. It is alone in a pid namespace of its own, as its
//! first process; or it stays in the agent's, and only a child that it makes as the last step
//! ([`program`]) is born into the container's.

mod copy_up;
mod devices;
mod identity;
mod mounts;
mod paths;
mod program;
pub(super) mod protocol;
mod root;
mod rootfs;
mod terminal;

use std::{
    convert::Infallible,
    fs,
    io::{self, Write},
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
};
use oci_spec::runtime::{Process, Spec};

use self::{
    program::Becoming,
    protocol::{CONTROL_FD, EXTRA_FD, Exec, INSTRUCTIONS_FD, Init, Instructions, StageEnd},
    root::Root,
    terminal::Terminal,
};
use super::{
    namespaces::{Namespaces, Pid},
    spec,
};

// Of the kernel, which counts up to 64 and takes a set as 64 bits.
const LAST_SIGNAL: libc::c_int = 64;
const SIGNAL_SET_SIZE: usize = 8;

/// The step that failed, and why.
#[derive(Debug)]
struct Failure {
    action: String,
    errno: Errno,
}

type Result<T> = std::result::Result<T, Failure>;

/// Says of a failed system call what it was for.
trait Step<T> {
    fn step(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Step<T> for nix::Result<T> {
    fn step(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Failure { action: action(), errno })
    }
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| match error.raw_os_error() {
            Some(errno) => Failure { action: action(), errno: Errno::from_raw(errno) },
            // Not from the kernel: its text is all there is to say.
            None => Failure { action: format!("{}: {error}", action()), errno: Errno::EINVAL },
        })
    }
}

/// Runs the stage on the descriptors that [`protocol`] lists. Only the agent starts it.
pub fn init_stage() -> ! {
    let Some([control, instructions, extra]) = inherited([CONTROL_FD, INSTRUCTIONS_FD, EXTRA_FD]) else {
        eprintln!("cube-agent init is run by the agent itself, to start the processes of containers");
        std::process::exit(2);
    };
    let control = StageEnd::new(control);
    let Err(failure) = run(&control, instructions, extra);
    control.failed(&failure.action, failure.errno);
    std::process::exit(1);
}

/// Takes the descriptors over, CLOEXEC; `None` if one of them is not open.
fn inherited<const N: usize>(fds: [RawFd; N]) -> Option<[OwnedFd; N]> {
    for fd in fds {
        // SAFETY: fcntl(F_SETFD) has no effect but on the flags of a descriptor.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return None;
        }
    }
    // SAFETY: they are open, and at the start of this process nothing else owns them.
    Some(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn run(control: &StageEnd, instructions: OwnedFd, extra: OwnedFd) -> Result<Infallible> {
    restore_signals()?;
    let instructions =
        Instructions::from_memfd(instructions).step(|| "read the instructions of the init stage".into())?;
    match instructions {
        Instructions::Init(init) => become_init(control, &init, extra),
        Instructions::Exec(exec) => become_exec(control, &exec, extra),
    }
}

/// The agent blocks signals around the clone, and its runtime ignores SIGPIPE; both would be inherited
/// by the container's program. So would what the agent itself has inherited.
fn restore_signals() -> Result<()> {
    // struct sigaction of the kernel: SIG_DFL, no flags, no restorer, an empty mask. The C library would
    // not let us touch the two signals that its threads use.
    let default = [0u64; 4];
    for signal in 1..=LAST_SIGNAL {
        let no_old = std::ptr::null_mut::<u64>();
        // SAFETY: the kernel reads the living array, of the size that it expects, and writes nothing.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), no_old, SIGNAL_SET_SIZE)
        };
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            Errno::result(result).step(|| format!("reset signal {signal}"))?;
        }
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).step(|| "unblock signals".into())
}

fn become_init(control: &StageEnd, init: &Init, leaf_procs: OwnedFd) -> Result<Infallible> {
    let spec = &init.spec;
    let process = process_of(spec)?;
    // The score is set through the agent's /proc, which is out of sight after pivot_root.
    set_oom_score(process)?;
    // In the guest's tree, before the stage leaves it.
    mounts::keep_proc(&init.proc)?;
    enter_namespaces(&init.namespaces)?;
    enter_leaf(&init.namespaces, leaf_procs)?;

    let terminal = {
        let root = rootfs::prepare(&init.rootfs, spec)?;
        let late = mounts::mount_all(&root, spec, &init.proc)?;
        devices::populate(&root, spec)?;
        let terminal = open_terminal(control, &root, process)?;
        if let Some(terminal) = &terminal {
            terminal.mount_console(&root)?;
        }
        set_sysctls(spec)?;
        late.finish(&root)?;
        paths::restrict(&root, spec)?;
        root.ensure_directory(process.cwd()).step(|| format!("make {}", process.cwd().display()))?;
        rootfs::pivot(&root, spec)?;
        terminal
    };
    set_uts(spec)?;
    let becoming = match init.namespaces.pid {
        Pid::New | Pid::Guest => Becoming::Itself,
        Pid::Join(_) => Becoming::Child,
    };
    program::execute(control, process, terminal, init.allow_vsock, becoming)
}

fn become_exec(control: &StageEnd, exec: &Exec, init: OwnedFd) -> Result<Infallible> {
    let process = &exec.process;
    set_oom_score(process)?;
    // Joining one that the agent shares with the container is allowed. The pid namespace is that of the
    // children from now on.
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWPID;
    setns(&init, namespaces).step(|| "join the namespaces of the container's init process".into())?;
    drop(init);
    let terminal = {
        let root = Root::open("/".as_ref()).step(|| "open the container's root".into())?;
        open_terminal(control, &root, process)?
    };
    program::execute(control, process, terminal, exec.allow_vsock, Becoming::Child)
}

fn process_of(spec: &Spec) -> Result<&Process> {
    spec.process()
        .as_ref()
        .ok_or_else(|| Failure { action: "find process in the spec".into(), errno: Errno::EINVAL })
}

fn open_terminal(control: &StageEnd, root: &Root, process: &Process) -> Result<Option<Terminal>> {
    if !process.terminal().unwrap_or(false) {
        return Ok(None);
    }
    let terminal = Terminal::open(root)?;
    if let Some(size) = process.console_size() {
        terminal.resize(size.width(), size.height())?;
    }
    control.terminal(&terminal.master).step(|| "hand over the terminal".into())?;
    Ok(Some(terminal))
}

fn set_oom_score(process: &Process) -> Result<()> {
    const PATH: &str = "/proc/self/oom_score_adj";
    let current = fs::read_to_string(PATH).step(|| format!("read {PATH}"))?;
    let current: i32 = current.trim().parse().unwrap_or_default();
    // Unset, a container has no part in a protection that the agent may have given itself.
    let wanted = process.oom_score_adj().unwrap_or(current.max(0));
    if wanted == current {
        return Ok(());
    }
    fs::write(PATH, wanted.to_string()).step(|| format!("write {wanted} to {PATH}"))
}

fn enter_namespaces(namespaces: &Namespaces) -> Result<()> {
    // The paths are the guest's: all are opened before the first one is joined.
    let mut opened = Vec::new();
    for join in &namespaces.join {
        let file = fs::File::open(&join.path).step(|| format!("open {}", join.path.display()))?;
        opened.push((file, join));
    }
    if let Pid::Join(path) = &namespaces.pid {
        let file = fs::File::open(path).step(|| format!("open {}", path.display()))?;
        setns(file, CloneFlags::CLONE_NEWPID).step(|| format!("join the namespace {}", path.display()))?;
    }
    for (file, join) in opened {
        let kind = CloneFlags::from_bits_truncate(join.kind);
        setns(file, kind).step(|| format!("join the namespace {}", join.path.display()))?;
    }
    unshare(namespaces.unshare_first()).step(|| "make namespaces".into())
}

/// Makes the container's cgroup the root of the cgroup namespace, and leaves it for its leaf.
fn enter_leaf(namespaces: &Namespaces, leaf_procs: OwnedFd) -> Result<()> {
    if namespaces.unshare_cgroup() {
        unshare(CloneFlags::CLONE_NEWCGROUP).step(|| "make a cgroup namespace".into())?;
    }
    // Opened by the agent, so that its view and rights count, not those of the new namespace.
    fs::File::from(leaf_procs).write_all(b"0").step(|| "enter the leaf of the container's cgroup".into())
}

fn set_sysctls(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref();
    for (name, value) in linux.and_then(|linux| linux.sysctl().as_ref()).into_iter().flatten() {
        // The guest's /proc shows those of the namespaces that the writer is in.
        let path = format!("/proc/sys/{}", spec::sysctl_path(name));
        fs::write(&path, value).step(|| format!("write {value:?} to {path}"))?;
    }
    Ok(())
}

fn set_uts(spec: &Spec) -> Result<()> {
    if let Some(name) = spec.hostname().as_deref().filter(|name| !name.is_empty()) {
        nix::unistd::sethostname(name).step(|| format!("set the host name {name}"))?;
    }
    if let Some(name) = spec.domainname().as_deref().filter(|name| !name.is_empty()) {
        // SAFETY: the pointer and length are those of a living string.
        let result = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
        Errno::result(result).step(|| format!("set the domain name {name}"))?;
    }
    Ok(())
}
