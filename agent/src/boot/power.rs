//! The end of the guest.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};

/// How long a file system that does not answer (a dead virtiofsd) may hold up the power-off.
const SYNC_LIMIT: Duration = Duration::from_secs(5);

/// Writes out file systems, for a bounded time, then powers off.
pub fn sync_and_off() {
    let started = Instant::now();
    let (done, synced) = mpsc::channel();
    thread::spawn(move || {
        nix::unistd::sync();
        // The receiver is gone if this took too long.
        let _ = done.send(());
    });
    match synced.recv_timeout(SYNC_LIMIT) {
        Ok(()) => tracing::debug!(elapsed = ?started.elapsed(), "file systems are written out"),
        Err(_) => {
            tracing::warn!("file systems are not written out after {SYNC_LIMIT:?}: powering off anyway")
        }
    }
    off();
}

/// Powers off at once. Returns only if the kernel refuses.
pub fn off() {
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("cube-agent: cannot power off: {}", errno.desc());
}

/// Lets Ctrl-Alt-Del reach PID 1 as SIGINT instead of resetting the machine under it.
pub fn keep_ctrl_alt_del_from_resetting() {
    if let Err(errno) = set_cad_enabled(false) {
        tracing::warn!("cannot turn off Ctrl-Alt-Del: {}", errno.desc());
    }
}
