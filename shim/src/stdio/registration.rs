//! Registering files with tokio's reactor.

use std::{fs::File, io};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers `file`, which epoll(7) refuses with EPERM if it is a regular file; then it is given back.
pub(super) fn register(file: File, interest: Interest) -> Result<AsyncFd<File>, (File, io::Error)> {
    // SAFETY: a `File` keeps its descriptor open and the same until it is dropped.
    unsafe { AsyncFd::register_with_interest(file, interest) }.map_err(|e| e.into_parts())
}

/// Registers anew. tokio never forgets that the other side of a file has closed, which for a FIFO is
/// not final: the old registration would be ready for ever, and whoever waits for it would spin.
pub(super) fn register_again(slot: &mut Option<AsyncFd<File>>, interest: Interest) -> io::Result<()> {
    if let Some(fd) = slot.take() {
        *slot = Some(register(fd.into_inner(), interest).map_err(|(_, e)| e)?);
    }
    Ok(())
}
