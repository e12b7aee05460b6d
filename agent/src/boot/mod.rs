//! What the agent does before it serves: as PID 1 of a guest, or of the namespaces of the `process`
//! backend.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::container;

pub mod cgroup;
pub mod cmdline;
pub mod console;
mod executable;
mod hardening;
pub mod limits;
pub mod modules;
mod mounts;
pub mod power;
pub mod process;
pub mod reaper;
mod root;

/// Why the agent cannot begin to serve.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A system call failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot mount a file system on" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The `process` backend's agent was not started in namespaces of its own.
    #[error(
        "`cube-agent process` has pid {0}, not 1: start it in fresh pid, mount, uts, ipc, net and cgroup namespaces"
    )]
    NotPidOne(u32),
}

impl BootError {
    fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> BootError {
        let path = path.as_ref().to_owned();
        move |source| BootError::Io { action, path, source }
    }

    fn sys(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(nix::Error) -> BootError {
        let failed = BootError::io(action, path);
        move |errno| failed(errno.into())
    }
}

/// Makes a usable system of a freshly booted kernel. To be called by PID 1, with one thread.
///
/// Runs twice where the kernel was booted with an initramfs: the first run loads the modules, moves
/// to a new root and executes the agent again, and does not return.
pub fn guest() -> Result<(), BootError> {
    mounts::early()?;
    let cmdline =
        fs::read_to_string("/proc/cmdline").map_err(BootError::io("cannot read", "/proc/cmdline"))?;
    let options = cmdline::Options::parse(&cmdline);
    console::init_logging(options.log);
    if root::is_rootfs()? {
        modules::load()?;
        match root::switch()? {}
    }
    for option in &options.ignored {
        tracing::warn!("the kernel command line has {option}, which is unknown: ignored");
    }
    mounts::all()?;
    hardening::apply();
    cgroup::set_up()?;
    limits::raise_threads();
    limits::raise();
    power::keep_ctrl_alt_del_from_resetting();
    container::set_stage_executable(executable::protect()?);
    Ok(())
}
