//! The last steps, the same for init and exec: find the program, drop everything, execute it.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    sys::prctl,
    unistd::{AccessFlags, chdir, execve, faccessat, getcwd, setsid},
};
use oci_spec::runtime::Process;

use super::{Failure, Result, Step, identity, protocol::StageEnd, terminal::Terminal};
use crate::container::seccomp;

/// Becomes the program of `process`. The root is the container's by now.
pub(super) fn execute(
    control: &StageEnd,
    process: &Process,
    terminal: Option<Terminal>,
    allow_vsock: bool,
) -> Result<Infallible> {
    match terminal {
        Some(terminal) => terminal.become_stdio()?,
        None => drop(setsid().step(|| "start a session".into())?),
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

    control.ready().step(|| "report to the agent".into())?;
    if !control.await_go().step(|| "wait for the agent".into())? {
        return Err(Failure { action: "wait for a start that never came".into(), errno: Errno::ECANCELED });
    }
    execve(&path, &arguments, &environment).step(action)
}

fn c_string(text: &OsStr) -> nix::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| Errno::EINVAL)
}

fn c_strings(texts: &[String]) -> nix::Result<Vec<CString>> {
    texts.iter().map(|text| c_string(text.as_ref())).collect()
}

/// The variables of the spec, and HOME, which programs expect and login would set.
fn environment(process: &Process) -> Vec<String> {
    let mut variables = process.env().clone().unwrap_or_default();
    if !variables.iter().any(|variable| variable.starts_with("HOME=")) {
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        variables.push(format!("HOME={}", home_of(process.user().uid(), &users).unwrap_or("/")));
    }
    variables
}

fn home_of(uid: u32, passwd: &str) -> Option<&str> {
    let uid = uid.to_string();
    let entry = passwd.lines().find(|line| line.split(':').nth(2) == Some(&uid))?;
    entry.split(':').nth(5).filter(|home| !home.is_empty())
}

/// Finds a program as a shell does. Run as the container's user, so that permissions are the user's.
fn find(name: &str, environment: &[String]) -> Result<PathBuf> {
    if name.contains('/') {
        executable(Path::new(name)).step(|| format!("exec {name}"))?;
        return Ok(name.into());
    }
    let search =
        environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
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
        let passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/nowhere:/bin/false\nodd:x:7\n";
        assert_eq!(home_of(65534, passwd), Some("/nowhere"));
        assert_eq!(home_of(7, passwd), None);
        assert_eq!(home_of(1, passwd), None);
    }

    #[test]
    fn a_program_is_found_in_the_last_path_given_and_its_absence_is_named() {
        let environment = ["PATH=/nowhere".to_owned(), "PATH=/nowhere:relative:/bin".to_owned()];
        assert_eq!(find("sh", &environment).unwrap(), Path::new("/bin/sh"));
        let failure = find("nosuch", &environment).unwrap_err();
        assert_eq!(failure.action, "exec \"nosuch\": executable file not found in $PATH");
        assert_eq!(find("/etc", &environment).unwrap_err().errno, Errno::EISDIR);
        assert_eq!(find("/etc/passwd", &environment).unwrap_err().errno, Errno::EACCES);
    }
}
