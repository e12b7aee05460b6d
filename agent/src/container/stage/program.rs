//! The last steps, the same for init and exec: find the program, drop everything, execute it.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr, OsString},
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

fn c_strings<T: AsRef<OsStr>>(texts: &[T]) -> nix::Result<Vec<CString>> {
    texts.iter().map(|text| c_string(text.as_ref())).collect()
}

/// The variables of the spec, and HOME, which programs expect and login would set.
fn environment(process: &Process) -> Vec<OsString> {
    let given = process.env().iter().flatten();
    let mut variables: Vec<OsString> = given.map(OsString::from).collect();
    if !variables.iter().any(|variable| variable.as_bytes().starts_with(b"HOME=")) {
        let users = fs::read("/etc/passwd").unwrap_or_default();
        let home = home_of(process.user().uid(), &users).unwrap_or(b"/");
        variables.push(OsStr::from_bytes(&[b"HOME=", home].concat()).to_owned());
    }
    variables
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
    fn a_program_is_found_in_the_last_path_given_and_its_absence_is_named() {
        let environment = ["PATH=/nowhere", "PATH=/nowhere:relative:/bin"].map(OsString::from);
        assert_eq!(find("sh", &environment).unwrap(), Path::new("/bin/sh"));
        let failure = find("nosuch", &environment).unwrap_err();
        assert_eq!(failure.action, "exec \"nosuch\": executable file not found in $PATH");
        assert_eq!(find("/etc", &environment).unwrap_err().errno, Errno::EISDIR);
        assert_eq!(find("/etc/passwd", &environment).unwrap_err().errno, Errno::EACCES);
    }
}
