//! The last steps, the same for init and exec: find the program, drop everything, and execute it, or have
//! a child do so.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    sys::prctl,
    unistd::{AccessFlags, chdir, execve, faccessat, getcwd, setsid},
};
use oci_spec::runtime::Process;

use super::{
    Failure, Result, Step, identity,
    protocol::{Born, CONTROL_FD, StageEnd},
    terminal::{self, Terminal},
};
use crate::container::seccomp;

/// The longest /etc/passwd that is looked into. The container may have put anything there.
const PASSWD_MAX: u64 = 1 << 20;

/// Who becomes the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Becoming {
    /// The stage itself.
    Itself,
    /// A child, born into the pid namespace that is set for the stage's children.
    Child,
}

/// Becomes the program of `process`. The root is the container's by now.
pub(super) fn execute(
    control: &StageEnd,
    process: &Process,
    terminal: Option<Terminal>,
    allow_vsock: bool,
    becoming: Becoming,
) -> Result<Infallible> {
    let has_terminal = terminal.is_some();
    if let Some(terminal) = terminal {
        terminal.become_stdio()?;
    }
    let environment = environment(process);
    let cwd = process.cwd();
    identity::limit(process)?;
    identity::own_stdio(process.user())?;
    // Before the user changes: root reaches directories that the user does not. If root does not
    // (root-squashed NFS), the user may.
    let entered = chdir(cwd);
    if process.no_new_privileges().unwrap_or(false) {
        prctl::set_no_new_privs().step(|| "set no_new_privs".into())?;
    }
    if !allow_vsock {
        // Without no_new_privs this takes CAP_SYS_ADMIN, which goes next.
        seccomp::install().step(|| "install the system call filter".into())?;
    }
    identity::assume(process)?;
    if let Err(errno) = entered {
        let again = if errno == Errno::EACCES { chdir(cwd) } else { Err(errno) };
        again.step(|| format!("enter the working directory {}", cwd.display()))?;
    }
    // A link through /proc could lead to a directory outside that some descriptor still refers to.
    getcwd().step(|| format!("enter {}, which is outside of the container", cwd.display()))?;

    let arguments = process.args().as_deref().unwrap_or_default();
    let program = find(arguments.first().map_or("", String::as_str), &environment)?;
    let program_text = program.display().to_string();
    let action = || format!("exec {program_text}");
    let path = c_string(program.as_os_str()).step(action)?;
    let arguments = c_strings(arguments).step(action)?;
    let environment = c_strings(&environment).step(action)?;

    if becoming == Becoming::Child {
        hand_over(control)?;
    }
    setsid().step(|| "start a session".into())?;
    if has_terminal {
        terminal::take_control()?;
    }
    if becoming == Becoming::Itself {
        control.ready().step(|| "report to the agent".into())?;
    }
    if !control.await_go().step(|| "wait for the agent".into())? {
        return Err(Failure { action: "wait for a start that never came".into(), errno: Errno::ECANCELED });
    }
    execve(&path, &arguments, &environment).step(action)
}

/// Makes a child that goes on in the place of this process, which tells the agent of it and ends. The child
/// is in sight of the container from its first moment on: it has the container's capabilities, user and
/// directories, stdio and the control socket, and its memory is a copy of that of this stage, never of the
/// agent.
fn hand_over(control: &StageEnd) -> Result<()> {
    // Where the user is the container's, but not CAP_SYS_PTRACE, this keeps the socket from it. A change of
    // user may have undone it, and execve does.
    prctl::set_dumpable(false).step(|| "protect the process from ptrace".into())?;
    // SAFETY: whoever owns one of these descriptors is not dropped any more: both processes end, or execute.
    let closed = unsafe { libc::close_range(CONTROL_FD as libc::c_uint + 1, libc::c_uint::MAX, 0) };
    Errno::result(closed).step(|| "close what is not the container's".into())?;
    match clone_sibling() {
        Ok(None) => Ok(()),
        Ok(Some(child)) => {
            control.born(&child).step(|| "report to the agent".into())?;
            std::process::exit(0)
        }
        // Its first process, which all others of a pid namespace end with.
        Err(Errno::ENOMEM) => Err(Errno::ESRCH).step(|| "enter the container, which has ended".into()),
        Err(errno) => Err(errno).step(|| "clone a process into the container".into()),
    }
}

/// Forks; the child is one of the agent's. `None` in the child.
fn clone_sibling() -> nix::Result<Option<Born>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data, for which all zeros means "nothing asked for".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_PARENT | libc::CLONE_PIDFD) as u64;
    args.pidfd = &raw mut pidfd as u64;
    // SAFETY: this process has a single thread, so its copy may do whatever it may do itself. The size is
    // that of `args`.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match Errno::result(pid)? {
        0 => Ok(None),
        // SAFETY: clone3 succeeded with CLONE_PIDFD and has stored a new descriptor there.
        pid => Ok(Some(Born { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })),
    }
}

fn c_string(text: &OsStr) -> nix::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| Errno::EINVAL)
}

fn c_strings<T: AsRef<OsStr>>(texts: &[T]) -> nix::Result<Vec<CString>> {
    texts.iter().map(|text| c_string(text.as_ref())).collect()
}

/// The variables of the spec, and HOME, which programs expect and login would set.
fn environment(process: &Process) -> Vec<OsString> {
    let given = process.env().iter().flatten();
    let mut variables: Vec<OsString> = given.map(OsString::from).collect();
    if !variables.iter().any(|variable| variable.as_bytes().starts_with(b"HOME=")) {
        let users = read_users(Path::new("/etc/passwd")).unwrap_or_default();
        let home = home_of(process.user().uid(), &users).unwrap_or(b"/");
        variables.push(OsStr::from_bytes(&[b"HOME=", home].concat()).to_owned());
    }
    variables
}

/// Reads a file that the container may have replaced by anything: a FIFO that nobody ever writes into, a
/// file without an end.
fn read_users(path: &Path) -> io::Result<Vec<u8>> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > PASSWD_MAX {
        return Err(Errno::EINVAL.into());
    }
    let mut users = Vec::new();
    // One that grows, or that does not tell its length, as those of /proc, ends there.
    file.take(PASSWD_MAX).read_to_end(&mut users)?;
    Ok(users)
}

/// Whatever bytes the other fields have: names of people need not be UTF-8.
fn home_of(uid: u32, passwd: &[u8]) -> Option<&[u8]> {
    let uid = uid.to_string();
    let mut lines = passwd.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b':'));
    let mut entry = lines.find(|fields| fields.clone().nth(2) == Some(uid.as_bytes()))?;
    entry.nth(5).filter(|home| !home.is_empty())
}

/// Finds a program as a shell does. Run as the container's user, so that permissions are the user's.
fn find(name: &str, environment: &[OsString]) -> Result<PathBuf> {
    if name.contains('/') {
        executable(Path::new(name)).step(|| format!("exec {name}"))?;
        return Ok(name.into());
    }
    let search = environment
        .iter()
        .rev()
        .find_map(|variable| variable.to_str()?.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut outcome = Errno::ENOENT;
    for directory in search.split(':').filter(|directory| directory.starts_with('/')) {
        let candidate = Path::new(directory).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => outcome = Errno::EACCES,
            Err(_) => {}
        }
    }
    Err(outcome).step(|| match outcome {
        Errno::ENOENT => format!("exec {name:?}: executable file not found in $PATH"),
        _ => format!("exec {name:?}"),
    })
}

fn executable(path: &Path) -> nix::Result<()> {
    let found = nix::sys::stat::stat(path)?;
    if found.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_that_of_the_user_id() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nm:x:9:9:M\xfcller:/h\xf6me:/bin/sh\n\
            nobody:x:65534:65534::/nowhere:/bin/false\nodd:x:7\n";
        assert_eq!(home_of(65534, passwd), Some(&b"/nowhere"[..]));
        assert_eq!(home_of(9, passwd), Some(&b"/h\xf6me"[..]));
        assert_eq!(home_of(7, passwd), None);
        assert_eq!(home_of(1, passwd), None);
    }

    #[test]
    fn what_is_no_list_of_users_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passwd");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read_users(&path).is_err(), "a FIFO");
        assert!(read_users(directory.path()).is_err(), "a directory");
        assert!(read_users(Path::new("/dev/zero")).is_err(), "a device");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "x".repeat(1 << 20)).unwrap();
        assert_eq!(read_users(&path).unwrap().len(), 1 << 20);
        std::fs::write(&path, "x".repeat((1 << 20) + 1)).unwrap();
        assert!(read_users(&path).is_err(), "too long");
    }

    #[test]
    fn a_program_is_found_in_the_last_path_given_and_its_absence_is_named() {
        let environment = ["PATH=/nowhere", "PATH=/nowhere:relative:/bin"].map(OsString::from);
        assert_eq!(find("sh", &environment).unwrap(), Path::new("/bin/sh"));
        let failure = find("nosuch", &environment).unwrap_err();
        assert_eq!(failure.action, "exec \"nosuch\": executable file not found in $PATH");
        assert_eq!(find("/etc", &environment).unwrap_err().errno, Errno::EISDIR);
        assert_eq!(find("/etc/passwd", &environment).unwrap_err().errno, Errno::EACCES);
    }
}
