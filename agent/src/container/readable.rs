//! Waiting on descriptors that tokio has no type for.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// A descriptor from which something comes now and then.
#[derive(Debug)]
pub(super) struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// Reads of `fd` must not block. Needs a tokio runtime.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd refers to one open file for as long as it lives, and lives in the AsyncFd.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?))
    }

    /// Repeats `read` when there is something to read, until it does not answer `WouldBlock`. Cancel safe
    /// if a `read` that answers so takes nothing.
    pub(super) async fn read<T>(
        &self,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|fd| read(fd.as_fd())) {
                return result;
            }
        }
    }
}

impl AsRawFd for Readable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
