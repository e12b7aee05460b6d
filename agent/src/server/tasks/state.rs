//! The life of a process, as a state machine.

use crate::boot::reaper::Exit;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// An init process that waits in front of `execve`, or an exec that is only registered.
    Created,
    /// A Start is under way.
    Starting,
    /// `execve` has happened.
    Running,
    /// Reaped.
    Stopped(Exit),
}

impl State {
    /// For messages; the words of the runtime specification.
    pub fn name(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Starting => "starting",
            State::Running => "running",
            State::Stopped(_) => "stopped",
        }
    }

    /// How the process ended, if it has.
    pub fn exit(self) -> Option<Exit> {
        match self {
            State::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// A Start begins. `None` if there is none to begin here.
    pub(super) fn starting(self) -> Option<State> {
        matches!(self, State::Created).then_some(State::Starting)
    }

    /// The Start has succeeded. The process may have ended by now: a short one does so before the
    /// answer about its `execve` is read.
    pub(super) fn started(self) -> State {
        match self {
            State::Starting => State::Running,
            other => other,
        }
    }

    /// The Start has failed. An init process dies of that, which the reaper tells; an exec may be
    /// started again or deleted.
    pub(super) fn start_failed(self) -> State {
        match self {
            State::Starting => State::Created,
            other => other,
        }
    }

    /// The process was reaped. A process ends once.
    pub(super) fn exited(self, exit: Exit) -> State {
        match self {
            State::Stopped(_) => self,
            _ => State::Stopped(exit),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    const EXIT: Exit = Exit { status: 3, at: SystemTime::UNIX_EPOCH };
    const ALL: [State; 4] = [State::Created, State::Starting, State::Running, State::Stopped(EXIT)];

    #[test]
    fn only_a_created_process_can_be_started() {
        let can: Vec<State> = ALL.into_iter().filter(|state| state.starting().is_some()).collect();
        assert_eq!(can, [State::Created]);
    }

    #[test]
    fn a_process_that_ended_before_its_start_was_answered_stays_stopped() {
        let state = State::Starting.exited(EXIT);
        assert_eq!(state.started(), State::Stopped(EXIT));
        assert_eq!(state.start_failed(), State::Stopped(EXIT));
    }

    #[test]
    fn a_failed_start_leaves_the_process_as_it_was() {
        assert_eq!(State::Starting.start_failed(), State::Created);
    }

    #[test]
    fn the_first_exit_counts() {
        let second = Exit { status: 0, ..EXIT };
        for state in ALL {
            assert_eq!(state.exited(EXIT).exited(second).exit(), Some(EXIT));
        }
    }
}
