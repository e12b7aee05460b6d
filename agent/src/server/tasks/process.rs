//! One process of a container: its init process, or an exec.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Mutex, OnceLock},
};

use oci_spec::runtime;
use tokio::sync::watch;

use super::state::State;
use crate::{
    boot::reaper::Exit,
    errors::lock,
    server::error::Error,
    stdio::{ChildStdio, ProcessId, Request},
};

/// See the module. Its state may be read and watched by anyone, at any time.
#[derive(Debug)]
pub struct Process {
    /// Its ids.
    pub id: ProcessId,
    /// The streams it asked for.
    pub request: Request,
    /// What an exec runs; the init process is part of the container.
    pub exec: Option<runtime::Process>,
    /// Made when an exec is registered, so that the host can open its streams before it starts it.
    stdio: Mutex<Option<ChildStdio>>,
    handle: OnceLock<Handle>,
    state: watch::Sender<State>,
}

#[derive(Debug)]
struct Handle {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// An init process that has been spawned, and waits to be started.
    pub(super) fn init(id: ProcessId, request: Request, pid: i32, pidfd: OwnedFd) -> Process {
        let process = Process::new(id, request, None, None);
        process.spawned(pid, pidfd);
        process
    }

    /// An exec that is to be spawned when it is started.
    pub(super) fn exec(
        id: ProcessId,
        request: Request,
        exec: runtime::Process,
        stdio: ChildStdio,
    ) -> Process {
        Process::new(id, request, Some(exec), Some(stdio))
    }

    fn new(
        id: ProcessId,
        request: Request,
        exec: Option<runtime::Process>,
        stdio: Option<ChildStdio>,
    ) -> Process {
        let state = watch::Sender::new(State::Created);
        Process { id, request, exec, stdio: Mutex::new(stdio), handle: OnceLock::new(), state }
    }

    /// Pid in the agent's pid namespace; 0 for an exec that was never started.
    pub fn pid(&self) -> i32 {
        self.handle.get().map_or(0, |handle| handle.pid)
    }

    /// Its state now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Resolves when it has ended. Cancel safe.
    pub async fn wait(&self) -> Option<Exit> {
        let mut state = self.state.subscribe();
        let stopped = state.wait_for(|state| state.exit().is_some()).await;
        stopped.ok().and_then(|state| state.exit())
    }

    /// Sends `signal` to this process alone.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        if self.state().exit().is_some() {
            return Err(Error::Finished(self.id.clone()));
        }
        let Some(handle) = self.handle.get() else {
            return Err(self.wrong_state("it must be started to be signalled"));
        };
        match send_signal(&handle.pidfd, signal) {
            Ok(()) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Reaped, although we have not been told yet.
                Some(libc::ESRCH) => Err(Error::Finished(self.id.clone())),
                Some(libc::EINVAL) => Err(Error::Invalid {
                    field: "signal",
                    value: signal.to_string(),
                    reason: "no such signal",
                }),
                _ => Err(Error::System { action: "send a signal", source: error }),
            },
        }
    }

    /// The error of a call that the state does not allow.
    pub(super) fn wrong_state(&self, needed: &'static str) -> Error {
        Error::State { process: self.id.clone(), state: self.state().name(), needed }
    }

    /// Begins a Start; exactly one of several callers gets it.
    pub(super) fn begin_start(&self) -> Result<(), Error> {
        let mut begun = false;
        self.state.send_if_modified(|state| match state.starting() {
            Some(starting) => {
                *state = starting;
                begun = true;
                true
            }
            None => false,
        });
        if begun { Ok(()) } else { Err(self.wrong_state("it must be created to be started")) }
    }

    pub(super) fn spawned(&self, pid: i32, pidfd: OwnedFd) {
        // Set once: a process is spawned by whoever begins its only successful start.
        let _ = self.handle.set(Handle { pid, pidfd });
    }

    pub(super) fn started(&self) {
        self.state.send_modify(|state| *state = state.started());
    }

    pub(super) fn start_failed(&self) {
        self.state.send_modify(|state| *state = state.start_failed());
    }

    pub(super) fn exited(&self, exit: Exit) {
        self.state.send_modify(|state| *state = state.exited(exit));
    }

    /// The child's ends that were made at registration; `None` if a start has used them up.
    pub(super) fn take_stdio(&self) -> Option<ChildStdio> {
        lock(&self.stdio).take()
    }
}

fn send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed: a null siginfo means the one that kill(2) would send.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
