//! Containers: from an OCI spec to running processes.

use std::{os::fd::OwnedFd, path::PathBuf};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use oci_spec::runtime::{LinuxResources, Process, Spec};

use crate::stdio::ChildStdio;

/// What a container is made from.
#[derive(Debug)]
pub struct Config {
    /// Checked by the caller: one path component.
    pub id: String,
    /// config.json.
    pub spec: Spec,
    /// The mounted root file system.
    pub rootfs: PathBuf,
    /// cgroup v2 directory in which the container's own is made; `None` where there is no cgroup v2.
    pub cgroup_parent: PathBuf,
    /// Whether its processes may create `AF_VSOCK` sockets.
    pub allow_vsock: bool,
}

/// A process that has been spawned. It is a child of this process, which must reap it.
#[derive(Debug)]
pub struct Spawned {
    /// Pid in the agent's pid namespace.
    pub pid: i32,
    /// The same process, safe against reuse of the pid.
    pub pidfd: OwnedFd,
    /// Master of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// A container. Its init process is spawned but waits in front of `execve` until [`Container::start`].
#[derive(Debug)]
pub struct Container {}

impl Container {
    /// Checks the spec, makes cgroup and namespaces, and runs the init stage up to `execve`. On an
    /// error nothing is left. Everything that can be known to fail before start fails here: a field
    /// that is not supported, a mount, a user, a program that does not exist.
    pub async fn create(_config: Config, _stdio: ChildStdio) -> Result<(Container, Spawned), ContainerError> {
        todo!()
    }

    /// Lets the init process go on to `execve`, and returns when that has happened. Once.
    pub async fn start(&mut self) -> Result<(), ContainerError> {
        todo!()
    }

    /// Runs another process in the container, and returns when its `execve` has happened.
    pub async fn exec(&self, _process: &Process, _stdio: ChildStdio) -> Result<Spawned, ContainerError> {
        todo!()
    }

    /// Pids in the agent's pid namespace of every process in the container's cgroup.
    pub fn pids(&self) -> Result<Vec<i32>, ContainerError> {
        todo!()
    }

    /// Signals every process of the container; SIGKILL by `cgroup.kill`.
    pub fn kill_all(&self, _signal: i32) -> Result<(), ContainerError> {
        todo!()
    }

    /// cgroup v2 metrics as containerd's own shim reports them.
    pub fn stats(&self) -> Result<Metrics, ContainerError> {
        todo!()
    }

    /// Changes the limits of the cgroup.
    pub fn update(&self, _resources: &LinuxResources) -> Result<(), ContainerError> {
        todo!()
    }

    /// Resolves when the kernel has killed a process of the container for want of memory, after more
    /// than `seen` such kills in all; gives the new count. Cancel safe. Never resolves without a
    /// memory controller.
    pub async fn oom_kills_after(&self, _seen: u64) -> u64 {
        todo!()
    }

    /// Kills what still runs, and removes the cgroup. Can be repeated. The rootfs stays mounted.
    pub async fn delete(&mut self) -> Result<(), ContainerError> {
        todo!()
    }
}

/// What creating or running a container can fail with. Mapped to ttrpc codes by the server.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A field of the spec that this version cannot honour.
    #[error("{field} is not supported{}", hint.map(|h| format!(": {h}")).unwrap_or_default())]
    Unsupported {
        /// Path of the field in config.json.
        field: String,
        /// What to do, if anything.
        hint: Option<&'static str>,
    },
    /// A field of the spec that makes no sense.
    #[error("{field} is {value:?}: {reason}")]
    Invalid {
        /// Path of the field in config.json.
        field: String,
        /// The value found.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The init stage failed: what it did, to what, and the errno.
    #[error("{action}")]
    Stage {
        /// "exec /bin/nosuch", "mount proc on /proc".
        action: String,
        /// The errno.
        source: std::io::Error,
    },
    /// A cgroup operation failed.
    #[error("{action} {path}")]
    Cgroup {
        /// "cannot write 4096 to", for example.
        action: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The container is not in the state that the call needs.
    #[error("the container is {state}, it must be {needed}")]
    State {
        /// Its state.
        state: &'static str,
        /// The state needed.
        needed: &'static str,
    },
}
