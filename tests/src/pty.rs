//! A terminal as a user has one: the test is the person at the keyboard.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use nix::{
    libc,
    pty::{Winsize, openpty},
    unistd::setsid,
};

use crate::command::{Capture, wait_child};

mod ioctls {
    nix::ioctl_write_ptr_bad!(set_window_size, nix::libc::TIOCSWINSZ, nix::pty::Winsize);
}

/// A program on a terminal of its own. Killed when dropped.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    /// What is on the screen, escape sequences included.
    pub screen: Capture,
}

impl Terminal {
    /// Starts `command` with a new terminal of 80 columns and 24 rows as its controlling one.
    pub fn start(command: &mut Command) -> Terminal {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let stdio = || pty.slave.try_clone().unwrap();
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: setsid and ioctl are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        // The command holds the slave in its stdio: while it does, the screen never ends.
        command.stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        drop(pty.slave);
        let master = File::from(pty.master);
        let screen = Capture::of(master.try_clone().unwrap());
        Terminal { master, child, screen }
    }

    /// Types `keys`.
    pub fn type_keys(&mut self, keys: &str) {
        // The program may have ended meanwhile: what is on the screen tells.
        self.master.write_all(keys.as_bytes()).ok();
    }

    /// Waits for `text` on the screen. Carriage returns do not count: runc's terminals send none, the
    /// kernel's do by default.
    pub fn wait_for(&self, text: &str, limit: Duration) {
        self.screen.wait_until(&format!("{text:?}"), limit, |bytes| {
            String::from_utf8_lossy(bytes).replace('\r', "").contains(text)
        });
    }

    /// Changes the size of the window, of which the kernel tells the program with SIGWINCH.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is a terminal's, the pointer that of a live winsize.
        unsafe { ioctls::set_window_size(self.master.as_raw_fd(), &raw const size) }.unwrap();
    }

    /// Whether the program ends within `limit`.
    pub fn ends_within(&mut self, limit: Duration) -> bool {
        wait_child(&mut self.child, limit).is_some()
    }

    /// Waits for the program to end; panics after `limit`.
    pub fn wait(mut self, limit: Duration) -> ExitStatus {
        let status = wait_child(&mut self.child, limit);
        status
            .unwrap_or_else(|| panic!("it did not end in {limit:?}; on the screen:\n{}", self.screen.text()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
