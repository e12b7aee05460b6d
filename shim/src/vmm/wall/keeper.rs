//! The process whose pid clients are told.
//!
//! Clients of containerd take a task's pid for one of the container's, and go through `/proc/<pid>/root`:
//! `nerdctl cp` reads and writes files there. So the pid that they are told is that of a process which does
//! nothing, has an empty root that nobody can write to, and lives exactly as long as the VMM.

use std::{
    ffi::OsString,
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    process::ExitCode,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{User, Wall, empty, make_dir};
use crate::{
    errors::chain,
    vmm::{
        VmmError,
        helper::{Helper, Launch},
    },
};

/// The argument by which the shim's program knows that it is to be this.
pub const ARGUMENT: &str = "keep";

/// The program that runs now, whatever was installed meanwhile.
const PROGRAM: &str = "/proc/self/exe";

/// Starts one for `vmm`. It is behind its wall when this returns.
pub(crate) async fn launch(
    vmm: &Helper,
    user: User,
    root: &Path,
    cgroup: std::path::PathBuf,
) -> Result<Helper, VmmError> {
    make_dir(root)?;
    let pipe = |source: std::io::Error| VmmError::Io { action: "cannot make", path: "a pipe".into(), source };
    let (ready, readiness) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| pipe(errno.into()))?;
    let mut ready = tokio::net::unix::pipe::Receiver::from_owned_fd(ready).map_err(pipe)?;
    let process = vmm.pidfd().as_fd().try_clone_to_owned().map_err(pipe)?;
    let numbers = [process.as_raw_fd(), readiness.as_raw_fd()];
    let mut args: Vec<OsString> = vec![ARGUMENT.into(), root.into()];
    args.extend([user.uid, user.gid].map(|id| id.to_string().into()));
    args.extend(numbers.map(|fd| fd.to_string().into()));
    let keeper = Helper::launch(Launch {
        program: PROGRAM.into(),
        args,
        cgroup,
        fds: vec![process, readiness],
        wall: Wall::agent(),
        stdout: None,
    })?;
    let mut byte = [0];
    match tokio::io::AsyncReadExt::read(&mut ready, &mut byte).await {
        Ok(1) => Ok(keeper),
        _ => Err(keeper.died().await),
    }
}

/// The process itself, when the arguments say so.
pub fn run(arguments: &[OsString]) -> Option<ExitCode> {
    let [argument, root, uid, gid, process, ready] = arguments else { return None };
    if argument != ARGUMENT {
        return None;
    }
    let number = |word: &OsString| word.to_str().and_then(|word| word.parse::<u32>().ok());
    let [Some(uid), Some(gid), Some(process), Some(ready)] = [uid, gid, process, ready].map(number) else {
        eprintln!("{ARGUMENT}: a number was expected");
        return Some(ExitCode::FAILURE);
    };
    Some(keep(Path::new(root), User { uid, gid }, process as RawFd, ready as RawFd))
}

fn keep(root: &Path, user: User, process: RawFd, ready: RawFd) -> ExitCode {
    // SAFETY: whoever started this has passed both descriptors on for it alone.
    let (process, ready) = unsafe { (OwnedFd::from_raw_fd(process), OwnedFd::from_raw_fd(ready)) };
    let steps = match empty(root, user) {
        Ok(steps) => steps,
        Err(error) => {
            eprintln!("{}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    for step in &steps {
        if let Err(errno) = step.take() {
            eprintln!("cannot {step}: {errno}");
            return ExitCode::FAILURE;
        }
    }
    let told = File::from(ready).write_all(b"1");
    // Whoever waits for it has ended.
    if told.is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(1..) => return ExitCode::SUCCESS,
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}
