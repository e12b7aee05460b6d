//! Where stdin comes from: a FIFO that clients open, close and open again.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::registration::{register, register_again};

/// The reading end of a stdin.
#[derive(Debug)]
pub(super) struct Source {
    input: Input,
    /// Our own write end. While it is open the FIFO does not end, whoever else closes theirs.
    keeper: Option<File>,
}

#[derive(Debug)]
enum Input {
    /// A FIFO, or anything else that can be waited for. `None` only while it is registered anew.
    Polled(Option<AsyncFd<File>>),
    /// A regular file or /dev/null, which epoll(7) refuses: it is read on a thread, and ends at its end.
    Plain { file: Arc<File>, position: u64 },
}

impl Source {
    /// Opens `path`; never waits.
    pub(super) fn open(path: &Path) -> io::Result<Source> {
        use std::os::unix::fs::FileTypeExt;
        let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let file: File = open(path, flags | OFlag::O_RDONLY, Mode::empty())?.into();
        let keeper = if file.metadata()?.file_type().is_fifo() {
            Some(open(path, flags | OFlag::O_WRONLY, Mode::empty())?.into())
        } else {
            None
        };
        let input = match register(file, Interest::READABLE) {
            Ok(polled) => Input::Polled(Some(polled)),
            Err((file, e)) if e.raw_os_error() == Some(libc::EPERM) => {
                Input::Plain { file: Arc::new(file), position: 0 }
            }
            Err((_, e)) => return Err(e),
        };
        Ok(Source { input, keeper })
    }

    /// From now on the FIFO ends when nobody else has it open for writing and it is empty.
    pub(super) fn let_end(&mut self) {
        self.keeper = None;
    }

    /// Waits for bytes and reads at most `limit` of them; none mean the end. Cancel safe: nothing is
    /// read by a call that does not return.
    pub(super) async fn read(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        match &mut self.input {
            Input::Polled(fd) => read_polled(fd, limit).await,
            Input::Plain { file, position } => {
                let (file, at) = (file.clone(), *position);
                // Positioned, so that a read whose result nobody awaited any more is simply repeated.
                let read =
                    tokio::task::spawn_blocking(move || read_with(limit, |bytes| file.read_at(bytes, at)));
                let bytes = read.await.map_err(io::Error::other)??;
                *position += bytes.len() as u64;
                Ok(bytes)
            }
        }
    }
}

async fn read_polled(slot: &mut Option<AsyncFd<File>>, limit: usize) -> io::Result<Vec<u8>> {
    loop {
        let fd = slot.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let mut guard = fd.readable().await?;
        let mut file = guard.get_inner();
        match read_with(limit, |bytes| file.read(bytes)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
        let latched = guard.ready().is_read_closed();
        guard.clear_ready();
        drop(guard);
        if latched {
            register_again(slot, Interest::READABLE)?;
        }
    }
}

fn read_with(limit: usize, mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; limit];
    let n = loop {
        match read(&mut bytes) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    bytes.truncate(n);
    Ok(bytes)
}
