//! How much of everything the agent may use, and with it every container whose spec has no limits.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// As many as `fs.nr_open` allows in a kernel that nobody has configured, and as systemd gives containerd.
const OPEN_FILES: rlim_t = 1 << 20;

/// In a guest: the kernel gives its first process 4096 descriptors, and as many processes as fill half of the
/// threads that a machine of this size may have.
pub(super) fn lift() {
    set(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES);
    set(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY);
}

/// On a host: as far as whoever started it lets the agent go.
pub(super) fn raise() {
    for resource in [Resource::RLIMIT_NOFILE, Resource::RLIMIT_NPROC] {
        match getrlimit(resource) {
            Ok((soft, hard)) if soft < hard => set(resource, hard, hard),
            Ok(_) => {}
            Err(errno) => tracing::warn!("cannot read {resource:?}: {errno}"),
        }
    }
}

/// What cannot be had is done without: it is needed by many processes at once, if at all.
fn set(resource: Resource, soft: rlim_t, hard: rlim_t) {
    if let Err(errno) = setrlimit(resource, soft, hard) {
        tracing::warn!("cannot raise {resource:?} to {hard}: {errno}");
    }
}
