//! The host name of a container that is alive.

use std::{io, os::fd::OwnedFd, thread};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    unistd::{gethostname, sethostname},
};

/// Gives the uts namespace of `process`, a pidfd, the name `new` if it has the name `old`.
pub(super) fn replace(process: &OwnedFd, old: &str, new: &str) -> io::Result<()> {
    let replace = || match setns(process, CloneFlags::CLONE_NEWUTS) {
        // It has ended, and nobody looks any more.
        Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno),
        Ok(()) if gethostname()? == *old => sethostname(new),
        Ok(()) => Ok(()),
    };
    // A thread enters a namespace for itself alone, setns(2): this one ends in it.
    let thread = thread::Builder::new().name("hostname".to_owned());
    let replaced = thread::scope(|scope| thread.spawn_scoped(scope, replace).map(|thread| thread.join()))?;
    Ok(replaced.map_err(|_| io::Error::other("the thread panicked"))??)
}
