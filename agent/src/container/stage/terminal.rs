//! The terminal of a process, from the container's own devpts, so that its name makes sense inside.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sys::statfs::{FsType, fstatfs},
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use super::{
    Result, Step,
    root::{Root, proc_path},
};

const PTMX: &str = "/dev/pts/ptmx";

// Not in the nix crate, which has no wrapper for these requests.
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_write_ptr_bad!(lock_terminal, libc::TIOCSPTLCK, libc::c_int);
nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);
nix::ioctl_write_int_bad!(open_peer, libc::TIOCGPTPEER);

/// Makes stdin, which is a terminal, the controlling one of this session.
pub(super) fn take_control() -> Result<()> {
    // SAFETY: a request for this kind of file.
    unsafe { set_controlling_terminal(libc::STDIN_FILENO, 0) }
        .step(|| "take the terminal as the controlling one".into())
        .map(drop)
}

/// A pair of pseudo terminal ends.
#[derive(Debug)]
pub(super) struct Terminal {
    pub(super) master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    pub(super) fn open(root: &Root) -> Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW;
        let master = root
            .open_at(PTMX.as_ref(), flags)
            .step(|| format!("open a terminal at {PTMX}, where mounts must have a devpts"))?;
        // The container may have put something else there before an exec.
        let found = fstatfs(&master).step(|| format!("look at {PTMX}"))?.filesystem_type();
        if found != FsType(libc::DEVPTS_SUPER_MAGIC) {
            return Err(Errno::ENOTTY).step(|| format!("open a terminal at {PTMX}, which is not a devpts"));
        }
        // SAFETY: a request for this kind of file, with a pointer to a living int.
        unsafe { lock_terminal(master.as_raw_fd(), &0) }.step(|| "unlock the terminal".into())?;
        // By request and not by its name, which somebody could have mounted over.
        // SAFETY: a request for this kind of file.
        let slave = unsafe { open_peer(master.as_raw_fd(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) }
            .step(|| "open the other end of the terminal".into())?;
        // SAFETY: the request has just made this descriptor.
        Ok(Self { master, slave: unsafe { OwnedFd::from_raw_fd(slave) } })
    }

    /// Sets the window size in characters.
    pub(super) fn resize(&self, width: u64, height: u64) -> Result<()> {
        let saturate = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
        let size =
            libc::winsize { ws_row: saturate(height), ws_col: saturate(width), ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: a request for this kind of file, with a pointer to a living struct.
        unsafe { set_window_size(self.slave.as_raw_fd(), &size) }
            .step(|| "set the window size".into())
            .map(drop)
    }

    /// Makes it the container's /dev/console. Before pivot_root.
    pub(super) fn mount_console(&self, root: &Root) -> Result<()> {
        let console = match root.locate_without_links("/dev/console".as_ref()) {
            // /dev is a bind mount and has none.
            Err(Errno::ENOENT) => return Ok(()),
            console => console.step(|| "find /dev/console".into())?,
        };
        let (slave, console) = (proc_path(&self.slave), proc_path(&console));
        let none = None::<&str>;
        mount(Some(slave.as_str()), console.as_str(), none, MsFlags::MS_BIND, none)
            .step(|| "mount the terminal on /dev/console".into())
    }

    /// Makes it stdin, stdout and stderr.
    pub(super) fn become_stdio(self) -> Result<()> {
        dup2_stdin(&self.slave)
            .and_then(|()| dup2_stdout(&self.slave))
            .and_then(|()| dup2_stderr(&self.slave))
            .step(|| "use the terminal as stdio".into())
    }
}
