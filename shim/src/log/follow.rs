//! Waiting for a log to grow.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use inotify::{EventMask, Inotify, WatchMask};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::reader::Dir;

/// Time between looks where inotify is not to be had, and between looks at whether the container
/// still exists where it is.
const PERIOD: Duration = Duration::from_millis(500);
const PERIOD_WITHOUT_INOTIFY: Duration = Duration::from_millis(100);

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// A file of the directory may have changed.
    Changed,
    /// Nothing has happened for a while.
    Quiet,
    /// The directory was removed or renamed: what is written to this log from now on is elsewhere.
    Gone,
    /// The reader of the output has closed its end.
    ReaderGone,
}

/// Tells when something happens in a log directory. To be made before the first look at its files,
/// so that no change falls in between.
#[derive(Debug)]
pub struct Watch {
    inotify: Option<Inotify>,
    gone: bool,
}

impl Watch {
    /// Watches `dir`. Falls back to looking regularly where inotify is not available, for the number
    /// of instances is limited per user.
    pub fn new(dir: &Dir) -> Watch {
        Watch { inotify: watch(dir).ok(), gone: false }
    }

    /// Waits for a change in `dir`, or until the reader of `output` is gone.
    pub fn wait(&mut self, dir: &Dir, output: BorrowedFd<'_>) -> io::Result<Wake> {
        if !self.gone && dir.is_removed() {
            self.gone = true;
            return Ok(Wake::Gone);
        }
        // With no events asked for, poll(2) tells of errors alone: nobody reads the pipe, a hangup.
        let mut fds = vec![PollFd::new(output, PollFlags::empty())];
        let mut period = PERIOD_WITHOUT_INOTIFY;
        if let Some(inotify) = &self.inotify
            && !self.gone
        {
            fds.push(PollFd::new(inotify.as_fd(), PollFlags::POLLIN));
            period = PERIOD;
        }
        let timeout = PollTimeout::try_from(period).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let seen = |n: usize| fds.get(n).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        if seen(0).intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
            return Ok(Wake::ReaderGone);
        }
        let changed = seen(1).contains(PollFlags::POLLIN);
        drop(fds);
        match &self.inotify {
            _ if self.gone => Ok(Wake::Gone),
            Some(_) if changed => self.read_events(),
            _ => Ok(Wake::Quiet),
        }
    }

    fn read_events(&mut self) -> io::Result<Wake> {
        let Some(inotify) = &mut self.inotify else { return Ok(Wake::Quiet) };
        let mut buffer = [0; 4096];
        let ended = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
        match inotify.read_events(&mut buffer) {
            Ok(mut events) => self.gone |= events.any(|event| event.mask.intersects(ended)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        // The caller takes what was written before that, then asks again.
        Ok(Wake::Changed)
    }
}

fn watch(dir: &Dir) -> io::Result<Inotify> {
    let inotify = Inotify::init()?;
    // Not dir.path(): what has that name may be another directory by now.
    let path = format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd());
    let files = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVE | WatchMask::DELETE;
    let itself = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
    inotify.watches().add(path, files | itself)?;
    Ok(inotify)
}
