//! Processes by descriptor: unlike a pid, it never means another process.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{sys::signal::Signal, unistd::Pid};

/// pidfd_open(2).
pub(crate) fn open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers and gives a new descriptor, which nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// pidfd_send_signal(2).
pub(crate) fn send(process: &OwnedFd, signal: Signal) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: without a siginfo the kernel fills in that of kill(2), and reads no memory.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal as libc::c_int, none, 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
