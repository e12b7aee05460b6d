//! A process as containerd sees it.

use std::path::PathBuf;

use cube_protocol::guest::TaskExit;

use super::Reply;
use crate::{state::now_ns, stdio::ProcessIo};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n for death by signal n.
    pub status: u32,
    /// Nanoseconds since 1970.
    pub at_ns: u64,
}

impl Exit {
    /// Death by SIGKILL, now: of a process whose own end nobody saw.
    pub fn killed() -> Exit {
        Exit { status: 128 + libc::SIGKILL as u32, at_ns: now_ns() }
    }

    /// What the guest tells of a process that was created at `created_ns`, as far as it can be true: a
    /// status of 256 would be success to a shell, and the guest's clock is not ours.
    pub(super) fn told(exit: &TaskExit, created_ns: u64) -> Exit {
        let now = now_ns();
        let at_ns = exit.exited_at_ns.min(now).max(created_ns.min(now));
        Exit { status: exit.exit_status.min(255), at_ns }
    }
}

/// Paths and URIs as containerd gave them; State answers them unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Path or empty.
    pub stdin: String,
    /// Path, URI or empty.
    pub stdout: String,
    /// Path, URI or empty.
    pub stderr: String,
}

/// What containerd calls the status of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Exists, does not run yet.
    Created,
    /// Runs.
    Running,
    /// Is being brought to rest.
    Pausing,
    /// Stands still with its sandbox.
    Paused,
    /// Has exited.
    Stopped,
}

/// Answer to State.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// Bundle of its container.
    pub bundle: PathBuf,
    /// Pid that containerd is told.
    pub pid: u32,
    /// Where it is in its life.
    pub status: Status,
    /// As given at Create or Exec.
    pub stdio: Stdio,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

/// Signals that ask a process to end: whoever sends one does not want to wait for a reader.
const ENDING: [i32; 5] = [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// A job is making it; containerd does not know it yet.
    Creating,
    /// Waits for Start.
    Created,
    /// A job is starting it.
    Starting,
    /// Runs.
    Running,
    /// Has exited.
    Stopped(Exit),
    /// A job is deleting it.
    Deleting(Exit),
}

impl Phase {
    /// For programs.
    pub(super) fn label(self) -> &'static str {
        match self {
            Phase::Creating => "creating",
            Phase::Created => "created",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Stopped(_) => "stopped",
            Phase::Deleting(_) => "deleting",
        }
    }

    /// For sentences.
    pub(super) fn name(self) -> &'static str {
        match self {
            Phase::Creating => "being created",
            Phase::Created => "created",
            Phase::Starting => "being started",
            Phase::Running => "running",
            Phase::Stopped(_) => "stopped",
            Phase::Deleting(_) => "being deleted",
        }
    }
}

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) phase: Phase,
    pub(super) stdio: Stdio,
    /// Pid in the guest; 0 before the guest has told.
    pub(super) guest_pid: u32,
    /// From the end of [`Phase::Creating`] to the begin of [`Phase::Deleting`].
    pub(super) io: Option<ProcessIo>,
    /// An exit that came before containerd may hear of it: TaskExit follows TaskStart, and what its
    /// reader is taking.
    early_exit: Option<Exit>,
    /// Those of [`ENDING`] that it was sent.
    killed_by: Vec<u32>,
    waiters: Vec<Reply<Exit>>,
}

impl Process {
    pub(super) fn new(stdio: Stdio) -> Process {
        Process {
            phase: Phase::Creating,
            stdio,
            guest_pid: 0,
            io: None,
            early_exit: None,
            killed_by: Vec::new(),
            waiters: Vec::new(),
        }
    }

    /// How it ended, if it has.
    pub(super) fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Stopped(exit) | Phase::Deleting(exit) => Some(exit),
            _ => None,
        }
    }

    pub(super) fn status(&self) -> Status {
        match self.phase {
            Phase::Creating | Phase::Created | Phase::Starting => Status::Created,
            Phase::Running => Status::Running,
            Phase::Stopped(_) | Phase::Deleting(_) => Status::Stopped,
        }
    }

    /// Answers now or at the exit.
    pub(super) fn wait(&mut self, reply: Reply<Exit>) {
        match self.exit() {
            // Whoever waited may have gone away, here and below.
            Some(exit) => drop(reply.send(Ok(exit))),
            None => self.waiters.push(reply),
        }
    }

    /// Whether the guest has told the exit, also if containerd does not know it yet.
    pub(super) fn is_over(&self) -> bool {
        self.exit().is_some() || self.early_exit.is_some()
    }

    /// Whether it has exited and containerd is not told yet, for a reader has not taken its output.
    pub(super) fn is_held(&self) -> bool {
        self.phase == Phase::Running && self.early_exit.is_some()
    }

    /// It is being sent `signal`.
    pub(super) fn signalled(&mut self, signal: u32) {
        if !ENDING.iter().any(|ending| ending.cast_unsigned() == signal) {
            return;
        }
        if !self.killed_by.contains(&signal) {
            self.killed_by.push(signal);
        }
        if self.is_held() {
            self.end_wanted();
        }
    }

    /// Whoever waits for its end waits for its readers no longer than they have then.
    pub(super) fn end_wanted(&self) {
        self.io.iter().for_each(ProcessIo::end_wanted);
    }

    /// Notes that the process has exited, and gives what to await before [`exited`](Process::exited): the
    /// readers of its output, for clients may close their ends of the FIFOs, or delete an exec, as soon as
    /// they hear of the exit, and would lose what is on its way to them.
    pub(super) fn exiting(&mut self, exit: Exit) -> Option<impl Future<Output = ()> + Send + use<>> {
        let io = self.io.as_ref().filter(|_| self.phase == Phase::Running)?;
        self.early_exit.get_or_insert(exit);
        io.process_exited();
        // SIGKILL leaves no choice. What a process does about the others may be to finish its work.
        let died_of = |signal: &u32| *signal == libc::SIGKILL.cast_unsigned() || exit.status == 128 + signal;
        if self.killed_by.iter().any(died_of) {
            io.end_wanted();
        }
        Some(io.taken())
    }

    /// Whether it has output that its readers have not taken.
    pub(super) fn is_behind(&self) -> bool {
        self.io.as_ref().is_some_and(ProcessIo::is_behind)
    }

    /// Notes that the process has exited. Tells whether containerd may and must hear of it now.
    pub(super) fn exited(&mut self, exit: Exit) -> bool {
        match self.phase {
            Phase::Creating | Phase::Starting => {
                self.early_exit.get_or_insert(exit);
                false
            }
            Phase::Created | Phase::Running => {
                let exit = self.early_exit.take().unwrap_or(exit);
                self.stop(exit);
                true
            }
            Phase::Stopped(_) | Phase::Deleting(_) => false,
        }
    }

    /// It has been started. Gives the exit that came meanwhile.
    pub(super) fn run(&mut self) -> Option<Exit> {
        self.phase = Phase::Running;
        self.early_exit.take()
    }

    /// Leaves a phase in which exits are held back. Gives the exit that was, which is now in force.
    pub(super) fn settle(&mut self, phase: Phase) -> Option<Exit> {
        self.phase = phase;
        let exit = self.early_exit.take()?;
        self.stop(exit);
        Some(exit)
    }

    /// Begins the deletion. Gives the exit, and whether it is news to containerd.
    pub(super) fn delete(&mut self) -> (Exit, bool) {
        let known = self.exit();
        let exit = known.or_else(|| self.early_exit.take()).unwrap_or_else(Exit::killed);
        self.stop(exit);
        self.phase = Phase::Deleting(exit);
        (exit, known.is_none())
    }

    fn stop(&mut self, exit: Exit) {
        self.phase = Phase::Stopped(exit);
        if let Some(io) = &self.io {
            io.process_exited();
        }
        for waiter in self.waiters.drain(..) {
            let _ = waiter.send(Ok(exit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_told_as_it_was_unless_it_cannot_be() {
        let created = now_ns() - 1_000_000;
        let told = |exit_status, exited_at_ns| {
            Exit::told(&TaskExit { exit_status, exited_at_ns, ..Default::default() }, created)
        };
        assert_eq!(told(143, created + 5), Exit { status: 143, at_ns: created + 5 });
        assert_eq!(told(256, 0), Exit { status: 255, at_ns: created });
        let future = told(u32::MAX, u64::MAX);
        assert!(future.status == 255 && (created..=now_ns()).contains(&future.at_ns), "{future:?}");
    }
}
