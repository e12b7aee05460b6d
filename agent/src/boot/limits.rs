//! Resource limits of the agent, which containers inherit whose spec has none.
//!
//! A kernel gives PID 1 1024 open files, 4096 at most, and in a small VM some hundred processes. Under
//! containerd's own service, a container has neither limit (`LimitNOFILE`, `LimitNPROC`), and the agent needs
//! descriptors for each process that it starts.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// The most open files that Linux lets a process have, unless fs.nr_open says otherwise.
const FILES: rlim_t = 1 << 20;

/// Threads that the kernel of a VM may have: `PID_MAX_DEFAULT`. By itself it reckons with the memory, and comes
/// to a few hundred; what a container may have is for its memory and its `pids.max` to say.
const THREADS: &str = "32768";

/// Raises them as far as that is allowed: in a VM as above, on a host up to the hard limit.
pub fn raise() {
    for (name, resource, wanted) in
        [("open files", Resource::RLIMIT_NOFILE, FILES), ("processes", Resource::RLIMIT_NPROC, RLIM_INFINITY)]
    {
        if let Err(error) = raise_one(resource, wanted) {
            tracing::warn!("cannot raise the limit of {name}: {error}");
        }
    }
}

fn raise_one(resource: Resource, wanted: rlim_t) -> nix::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let limit = hard.max(wanted);
    setrlimit(resource, limit, limit).or_else(|_| setrlimit(resource, hard, hard))
}

/// Lets the kernel have as many threads as it has pids for. It is the guest's own.
pub(super) fn raise_threads() {
    let file = "/proc/sys/kernel/threads-max";
    if let Err(error) = fs::write(file, THREADS) {
        tracing::warn!("cannot write {THREADS} to {file}: {error}");
    }
}
