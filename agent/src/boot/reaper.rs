//! Reaps every child, and tells whoever started one how it ended.
//!
//! PID 1 inherits the orphans of all containers, so children are reaped whether anyone asked or not.
//! A process may therefore be gone before its starter even knows the pid. No exit is lost all the
//! same: a starter takes [`Reaper::spawning`] before it spawns; while any such guard lives, the exits
//! that nobody watches are kept, and [`Spawning::watch`] finds its own among them.

use std::{
    collections::HashMap,
    io, mem,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::errors::lock;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n for death by signal n.
    pub status: u8,
    /// When it was reaped, by the guest's clock.
    pub at: SystemTime,
}

/// The one place of the agent that waits for children.
#[derive(Debug, Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    /// At most one per pid, and only while `spawning` is not 0.
    unclaimed: HashMap<i32, Exit>,
    spawning: usize,
}

/// Keeps exits from being forgotten while a process is being spawned.
#[derive(Debug)]
pub struct Spawning {
    reaper: Arc<Reaper>,
}

impl Reaper {
    /// Reaps from now on, in a task of the current runtime. Once per process, which must not wait for
    /// children in any other way: they would be stolen from it.
    pub fn start() -> io::Result<Arc<Reaper>> {
        let mut children = signal(SignalKind::child())?;
        let reaper = Arc::new(Reaper::default());
        let reaping = reaper.clone();
        tokio::spawn(async move {
            loop {
                reaping.reap();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(reaper)
    }

    /// To be called before a process is spawned.
    pub fn spawning(self: &Arc<Self>) -> Spawning {
        lock(&self.state).spawning += 1;
        Spawning { reaper: self.clone() }
    }

    /// One SIGCHLD may stand for many children.
    fn reap(&self) {
        while let Some((pid, status)) = wait_any() {
            self.deliver(pid, Exit { status, at: SystemTime::now() });
        }
    }

    fn deliver(&self, pid: i32, exit: Exit) {
        let mut state = lock(&self.state);
        match state.watched.remove(&pid) {
            // The watcher may have lost interest.
            Some(watcher) => drop(watcher.send(exit)),
            None if state.spawning > 0 => drop(state.unclaimed.insert(pid, exit)),
            None => tracing::debug!(pid, status = exit.status, "reaped an orphan"),
        }
    }
}

impl Spawning {
    /// The end of the child `pid`, which was spawned under this guard. Never answers if it was not.
    pub fn watch(self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = lock(&self.reaper.state);
        match state.unclaimed.remove(&pid) {
            Some(exit) => drop(sender.send(exit)),
            None => drop(state.watched.insert(pid, sender)),
        }
        drop(state);
        receiver
    }
}

impl Drop for Spawning {
    fn drop(&mut self) {
        let mut state = lock(&self.reaper.state);
        state.spawning -= 1;
        if state.spawning == 0 {
            mem::take(&mut state.unclaimed);
        }
    }
}

/// Reaps one child that has ended, if there is one: its pid and status.
///
/// Not nix's `waitid`: it fails for a child that died of a realtime signal, after having reaped it.
fn wait_any() -> Option<(i32, u8)> {
    loop {
        // SAFETY: siginfo_t is plain data, for which all zeros is a valid value.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        // SAFETY: `info` is valid for writes for the duration of the call.
        let result = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOHANG) };
        match result {
            0 => {
                // SAFETY: waitid filled in a SIGCHLD siginfo, or left si_pid 0 for "no child yet".
                let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
                return (pid != 0).then(|| (pid, exit_status(info.si_code, status)));
            }
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            // ECHILD: no children at all.
            _ => return None,
        }
    }
}

/// As a shell tells it: 128 + n for death by signal n.
fn exit_status(code: i32, status: i32) -> u8 {
    let status = if code == libc::CLD_EXITED { status } else { 128 + status };
    u8::try_from(status & 0xff).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_that_nobody_can_ask_for_any_more_are_forgotten() {
        let reaper = Arc::new(Reaper::default());
        let (first, second) = (reaper.spawning(), reaper.spawning());
        reaper.deliver(7, Exit { status: 0, at: SystemTime::UNIX_EPOCH });
        drop(first);
        assert_eq!(lock(&reaper.state).unclaimed.len(), 1);
        drop(second);
        assert!(lock(&reaper.state).unclaimed.is_empty());
    }

    #[test]
    fn a_signal_counts_from_128() {
        assert_eq!(exit_status(libc::CLD_EXITED, 3), 3);
        assert_eq!(exit_status(libc::CLD_KILLED, 9), 137);
        assert_eq!(exit_status(libc::CLD_DUMPED, 11), 139);
        assert_eq!(exit_status(libc::CLD_KILLED, 64), 192);
    }
}
