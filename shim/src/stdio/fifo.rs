//! The write end of a FIFO or pipe whose reader may be slow, go away and come back.
//!
//! fifo(7): opening for writing without a reader fails with ENXIO, and when all ends are closed
//! unread bytes are gone. So the FIFO is opened for both first, then for writing, and the first is
//! closed: the write end then lives on without a reader, keeps what is unread, and a write with no
//! reader fails with EPIPE instead of being swallowed.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::Instant,
};

use super::{
    opens::{OPENS, Opens},
    registration::{register, register_again},
};

/// How often a new reader is looked for where inotify cannot be had.
const POLL: Duration = Duration::from_secs(1);

/// How often the last bytes in a pipe are looked at.
const LOOK: Duration = Duration::from_millis(1);

nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);

/// What became of bytes that were offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// So many were taken, at least one.
    Taken(usize),
    /// None: the reader is slow.
    Full,
    /// None: nobody reads.
    NoReader,
}

/// A write end.
#[derive(Debug)]
pub(super) struct PipeWriter {
    // `None` only while it is registered anew.
    fd: Option<AsyncFd<File>>,
    /// Tells when another reader opens it; `None` for a pipe, which nobody can open.
    opens: Option<&'static Opens>,
    /// Whether there was a reader at any time that is known of.
    was_read: bool,
}

impl PipeWriter {
    /// Opens the FIFO at `path`; never waits.
    pub(super) fn open(path: &Path) -> io::Result<PipeWriter> {
        PipeWriter::open_with(path, &OPENS)
    }

    pub(super) fn open_with(path: &Path, opens: &'static Opens) -> io::Result<PipeWriter> {
        let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let both = open(path, flags | OFlag::O_RDWR, Mode::empty())?;
        let write = open(path, flags | OFlag::O_WRONLY, Mode::empty())?;
        drop(both);
        Ok(PipeWriter { fd: Some(registered(write.into())?), opens: Some(opens), was_read: false })
    }

    /// Takes the write end of a pipe, which must be non-blocking.
    pub(super) fn pipe(fd: OwnedFd) -> io::Result<PipeWriter> {
        Ok(PipeWriter { fd: Some(registered(fd.into())?), opens: None, was_read: true })
    }

    /// Offers bytes without waiting.
    pub(super) fn offer(&mut self, bytes: &[u8]) -> io::Result<Offer> {
        loop {
            match self.fd()?.get_ref().write(bytes) {
                Ok(n) => {
                    self.was_read = true;
                    return Ok(Offer::Taken(n));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Offer::Full),
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Offer::NoReader),
                Err(e) => return Err(e),
            }
        }
    }

    /// Waits after [`Offer::Full`] until an offer makes sense again. Cancel safe.
    pub(super) async fn drained(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.fd()?.writable().await?;
            if !is_full(guard.get_inner())? {
                return Ok(());
            }
            let latched = guard.ready().is_write_closed();
            guard.clear_ready();
            drop(guard);
            if latched {
                register_again(&mut self.fd, Interest::WRITABLE)?;
            }
        }
    }

    /// Waits until the reader has taken what is in the pipe, is gone, or has taken nothing for
    /// `patience`. Cancel safe.
    pub(super) async fn emptied(&mut self, patience: Duration) -> io::Result<()> {
        let (mut left, mut since) = (0, Instant::now());
        loop {
            let file = self.fd()?.get_ref();
            let unread = unread(file)?;
            if unread == 0 || !has_reader(file)? {
                return Ok(());
            }
            if unread != left {
                (left, since) = (unread, Instant::now());
            } else if since.elapsed() >= patience {
                return Ok(());
            }
            // The kernel tells a writer when there is room, not when there is nothing left.
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether there is a reader.
    pub(super) fn is_read(&mut self) -> io::Result<bool> {
        let is_read = has_reader(self.fd()?.get_ref())?;
        self.was_read |= is_read;
        Ok(is_read)
    }

    /// Whether there was a reader, at any time that is known of.
    pub(super) fn was_read(&self) -> bool {
        self.was_read
    }

    /// Whether anybody could ever become a reader again.
    pub(super) fn may_return(&self) -> bool {
        self.opens.is_some()
    }

    /// Waits after [`Offer::NoReader`] for somebody to open the FIFO. May return without. Cancel safe.
    pub(super) async fn reader(&mut self) -> io::Result<()> {
        let Some(opens) = self.opens else { return std::future::pending().await };
        let file = self.fd()?.get_ref();
        // Watch first, look second: a reader that comes between is then seen by one of the two.
        match opens.watch(file) {
            Some(mut watch) => {
                if !has_reader(file)? {
                    watch.opened().await;
                }
            }
            None => tokio::time::sleep(POLL).await,
        }
        register_again(&mut self.fd, Interest::WRITABLE)
    }

    fn fd(&self) -> io::Result<&AsyncFd<File>> {
        self.fd.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

fn registered(file: File) -> io::Result<AsyncFd<File>> {
    register(file, Interest::WRITABLE).map_err(|(_, e)| e)
}

fn poll(file: &File) -> io::Result<nix::poll::PollFlags> {
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout};
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
    nix::poll::poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// Bytes in the pipe, ioctl_pipe(2).
fn unread(file: &File) -> io::Result<libc::c_int> {
    let mut bytes = 0;
    // SAFETY: FIONREAD writes an int, and `bytes` is one that lives.
    unsafe { fionread(file.as_raw_fd(), &mut bytes) }?;
    Ok(bytes)
}

/// pipe(7): POLLERR on a write end means that there is no read end.
fn has_reader(file: &File) -> io::Result<bool> {
    Ok(!poll(file)?.contains(nix::poll::PollFlags::POLLERR))
}

fn is_full(file: &File) -> io::Result<bool> {
    Ok(poll(file)?.is_empty())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    static EXHAUSTED: Opens = Opens::new(|| Err(io::Error::from_raw_os_error(libc::EMFILE)));

    #[tokio::test]
    async fn without_inotify_a_reader_is_found_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut writer = PipeWriter::open_with(&path, &EXHAUSTED).unwrap();
        assert_eq!(writer.offer(b"x").unwrap(), Offer::NoReader);
        let reader = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::open(path).and_then(|mut file| file.read_to_string(&mut text)).map(|_| text)
        });
        let offered = async {
            while writer.offer(b"all of it").unwrap() == Offer::NoReader {
                writer.reader().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(30), offered).await.unwrap();
        drop(writer);
        assert_eq!(reader.await.unwrap().unwrap(), "all of it");
    }
}
