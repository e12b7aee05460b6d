//! Entering another mount namespace.

use std::{fs::File, io};

use nix::sched::{CloneFlags, setns};

use crate::error::CliError;

/// Makes this process see the file systems that process `pid` sees. To be called before any thread
/// is started: setns(2) refuses a mount namespace to a process with several.
pub(crate) fn enter_mounts_of(pid: u32) -> Result<(), CliError> {
    let path = format!("/proc/{pid}/ns/mnt");
    let namespace = File::open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CliError::NoProcess(pid),
        _ => CliError::Namespace { pid, source },
    })?;
    setns(&namespace, CloneFlags::CLONE_NEWNS)
        .map_err(|errno| CliError::Namespace { pid, source: errno.into() })
}
