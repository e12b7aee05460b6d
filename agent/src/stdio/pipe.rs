//! System calls on pipes and terminals.
//!
//! `O_NONBLOCK` belongs to the open file description. The two ends of a pipe are two descriptions,
//! so the agent's end may have it while the child's does not: on the child's it would make ordinary
//! programs fail with EAGAIN (pipe(7), fcntl(2)).

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        stat::Mode,
        uio::{readv, writev},
    },
    unistd::pipe2,
};

/// Size of output pipes; /proc/sys/fs/pipe-max-size by default, so no privilege is needed.
const OUTPUT_PIPE_LEN: i32 = 1024 * 1024;

mod ioctl {
    nix::ioctl_read_bad!(fionread, nix::libc::FIONREAD, nix::libc::c_int);
    nix::ioctl_write_ptr_bad!(tiocswinsz, nix::libc::TIOCSWINSZ, nix::libc::winsize);
}

/// The agent's and the child's end of one pipe, in this order.
pub(super) type Ends = (OwnedFd, OwnedFd);

/// A pipe that the child writes to.
pub(super) fn output() -> io::Result<Ends> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    // A kernel that refuses leaves 64 KiB: slower, not wrong.
    if let Err(error) = fcntl(&read, FcntlArg::F_SETPIPE_SZ(OUTPUT_PIPE_LEN)) {
        tracing::debug!(%error, size = OUTPUT_PIPE_LEN, "an output pipe keeps its default size");
    }
    set_nonblocking(&read)?;
    Ok((read, write))
}

/// A pipe that the child reads from.
pub(super) fn input() -> io::Result<Ends> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    set_nonblocking(&write)?;
    Ok((write, read))
}

/// /dev/null.
pub(super) fn null() -> io::Result<OwnedFd> {
    Ok(open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Makes reads and writes through `fd`'s description fail with EAGAIN where they would wait.
pub(super) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Reads once. 0 is the end: no writer is left, or (EIO, from a terminal's master) nobody has the
/// terminal open any more.
pub(super) fn read(fd: impl AsFd, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    match retry(|| readv(&fd, into)) {
        Err(Errno::EIO) => Ok(0),
        result => Ok(result?),
    }
}

/// Writes once.
pub(super) fn write(fd: impl AsFd, from: &[IoSlice<'_>]) -> io::Result<usize> {
    Ok(retry(|| writev(&fd, from))?)
}

/// What there is to read. Never waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pending {
    /// At least one byte.
    pub(super) data: bool,
    /// No writer is left, so nothing will be added.
    pub(super) writers_gone: bool,
}

/// Asks what there is to read from `fd`.
pub(super) fn pending(fd: impl AsFd) -> io::Result<Pending> {
    let ask = || {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        retry(|| poll(&mut fds, PollTimeout::ZERO))?;
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        Ok(Pending {
            data: events.contains(PollFlags::POLLIN),
            writers_gone: events.contains(PollFlags::POLLHUP),
        })
    };
    match ask() {
        // The kernel looks at the data first and at the writers second, without a lock: the last
        // writer may have written and left in between. A second look sees what it wrote.
        Ok(Pending { data: false, writers_gone: true }) => ask(),
        result => result,
    }
}

/// Bytes that could be read now.
pub(super) fn unread(fd: impl AsFd) -> io::Result<usize> {
    let mut len = 0;
    // SAFETY: FIONREAD writes one int, to `len`, which outlives the call.
    retry(|| unsafe { ioctl::fionread(fd.as_fd().as_raw_fd(), &mut len) })?;
    Ok(usize::try_from(len).unwrap_or(0))
}

/// Whether a writer would have to wait until something is read. How many bytes are unread does not tell: a write
/// that does not fit into the last page of a pipe begins another. Of a terminal nothing tells but that there is
/// something.
pub(super) fn is_full(fd: impl AsFd) -> io::Result<bool> {
    if fcntl(&fd, FcntlArg::F_GETPIPE_SZ).is_err() {
        return Ok(unread(fd)? > 0);
    }
    // Another write end, to ask it. For a moment: whoever waits for the end hears of it when this one goes.
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let write = open(path.as_str(), OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut fds = [PollFd::new(write.as_fd(), PollFlags::POLLOUT)];
    retry(|| poll(&mut fds, PollTimeout::ZERO))?;
    Ok(!fds[0].revents().unwrap_or(PollFlags::empty()).contains(PollFlags::POLLOUT))
}

/// Sets the window size of the terminal whose master is `fd`, in characters.
pub(super) fn set_window(fd: impl AsFd, width: u16, height: u16) -> io::Result<()> {
    let size = nix::libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, from `size`, which outlives the call.
    retry(|| unsafe { ioctl::tiocswinsz(fd.as_fd().as_raw_fd(), &size) })?;
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(fd: &OwnedFd) -> OFlag {
        OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap())
    }

    #[test]
    fn the_child_s_ends_block_and_the_agent_s_do_not() {
        for (agent, child) in [output().unwrap(), input().unwrap()] {
            assert!(flags(&agent).contains(OFlag::O_NONBLOCK));
            assert!(!flags(&child).contains(OFlag::O_NONBLOCK));
            for fd in [&agent, &child] {
                assert_eq!(fcntl(fd, FcntlArg::F_GETFD).unwrap() & nix::libc::FD_CLOEXEC, 1);
            }
        }
    }

    #[test]
    fn a_pipe_is_full_when_a_write_would_wait_and_not_before() {
        for size in [1000, 2049, 3000, 4096, 4097, 6000, 65_536] {
            let (read, write) = output().unwrap();
            let nonblocking = write.try_clone().unwrap();
            set_nonblocking(&nonblocking).unwrap();
            let bytes = vec![0; size];
            let fits = || super::write(&nonblocking, &[IoSlice::new(&bytes)]).is_ok_and(|n| n == size);
            for _ in 0..600_000 / size {
                assert!(fits() || size < 4096);
            }
            assert!(size < 4096 || !is_full(&read).unwrap(), "more than half, in writes of {size} bytes");
            while fits() {}
            assert!(is_full(&read).unwrap(), "writes of {size} bytes, {:?} unread", unread(&read));
            // Nobody is taken for a writer who is none.
            drop((write, nonblocking));
            assert!(pending(&read).unwrap().writers_gone);
        }
    }

    #[test]
    fn pending_tells_data_from_the_end() {
        let (read, write) = output().unwrap();
        assert_eq!(pending(&read).unwrap(), Pending { data: false, writers_gone: false });
        assert_eq!(unread(&read).unwrap(), 0);
        super::write(&write, &[IoSlice::new(b"abc")]).unwrap();
        assert_eq!(pending(&read).unwrap(), Pending { data: true, writers_gone: false });
        assert_eq!(unread(&read).unwrap(), 3);
        drop(write);
        assert_eq!(pending(&read).unwrap(), Pending { data: true, writers_gone: true });
        let mut buffer = [0; 8];
        assert_eq!(super::read(&read, &mut [IoSliceMut::new(&mut buffer)]).unwrap(), 3);
        assert_eq!(pending(&read).unwrap(), Pending { data: false, writers_gone: true });
        assert_eq!(super::read(&read, &mut [IoSliceMut::new(&mut buffer)]).unwrap(), 0);
    }
}
