//! Work that is ended by a signal, and leaves nothing.

use std::{
    cell::Cell,
    fs,
    io::{self, ErrorKind, Read},
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use crate::error::CliError;

/// What ends work.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Signals that end the work that looks for them, in place of the process.
#[derive(Debug)]
pub(crate) struct Interrupts {
    arrived: SignalFd,
    /// The one that was seen.
    signal: Cell<Option<i32>>,
}

impl Interrupts {
    /// From now on signals wait to be looked for. To be called before any thread is started, which would take
    /// them as before.
    pub(crate) fn watch() -> Result<Interrupts, CliError> {
        let ignored = ignored();
        let mut set = SigSet::empty();
        // As nohup(1) and shells have it, what is ignored ends nothing.
        SIGNALS.into_iter().filter(|signal| !is_in(ignored, *signal)).for_each(|signal| set.add(signal));
        let failed = |errno: nix::errno::Errno| CliError::Signal(errno.into());
        set.thread_block().map_err(failed)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let arrived = SignalFd::with_flags(&set, flags).map_err(failed)?;
        Ok(Interrupts { arrived, signal: Cell::new(None) })
    }

    /// An error if a signal has come.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.signal.get().is_none()
            && let Some(seen) = self.arrived.read_signal()?
        {
            self.signal.set(i32::try_from(seen.ssi_signo).ok());
        }
        // Not of the kind Interrupted, which is tried again.
        self.signal.get().map_or(Ok(()), |_| Err(io::Error::other("interrupted")))
    }

    /// `input`, waiting for which a signal ends.
    pub(crate) fn input<R: Read + AsFd>(&self, input: R) -> Input<'_, R> {
        Input { inner: input, interrupts: self }
    }

    /// What work that has failed is to be reported as.
    pub(crate) fn explain(&self, error: impl Into<CliError>) -> CliError {
        self.signal.get().map_or_else(|| error.into(), |signal| CliError::Interrupted { signal })
    }
}

/// See [`Interrupts::input`].
pub(crate) struct Input<'a, R> {
    inner: R,
    interrupts: &'a Interrupts,
}

impl<R: Read + AsFd> Read for Input<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        wait(self.inner.as_fd(), self.interrupts.arrived.as_fd())?;
        self.interrupts.check()?;
        self.inner.read(buffer)
    }
}

/// Returns when there is something on either.
fn wait(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<()> {
    let mut fds = [a, b].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    loop {
        match poll(&mut fds, PollTimeout::NONE).map_err(io::Error::from) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            polled => return polled.map(drop),
        }
    }
}

/// The signals that this process ignores, as proc_pid_status(5) has them; none if it cannot be read.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn is_in(mask: u64, signal: Signal) -> bool {
    mask & (1 << (signal as u32 - 1)) != 0
}
