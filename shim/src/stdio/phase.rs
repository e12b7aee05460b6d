//! How far the process has come, as far as its stdio is concerned, and how long that makes a sink wait.
//!
//! ```text
//! Running -> Exited: a reader that is attached is waited for, for as long as it takes
//!         -> Ended: somebody wants the end; a reader that takes nothing has 2 s
//!         -> Finishing: Delete; nobody is waited for to come
//!         -> Abandoned
//! ```

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::flow;

/// Time without progress of a reader after which nothing waits for it any more: the log runs ahead of
/// it, and once the process's end is wanted, its FIFO is closed.
pub(super) const READER_PATIENCE: Duration = Duration::from_secs(2);

/// Time without a byte from the guest after which sinks that containerd's client waits for are closed,
/// once the process has exited. The agent ends every stream 2 s after the exit, unless a reader holds up
/// who writes there, so this long a silence means that the guest hangs or is gone.
pub(super) const GUEST_PATIENCE: Duration = Duration::from_secs(4);

/// Time in which no reader holds anything up that an exit leaves a guest for the rest of the output: it may send on
/// and on, and never an end.
pub(super) const GUEST_LIMIT: Duration = Duration::from_secs(10);

/// How long a reader may take for the last bytes, which are in its pipe, and how long an exit waits for a
/// first reader: clients open their ends in the background, and a process can be over before they have.
pub(super) const TAKEN_PATIENCE: Duration = Duration::from_millis(500);

/// Only ever goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The process may write and read.
    Running,
    /// It has exited; output may still come, and readers have the time that they need.
    Exited(Instant),
    /// Somebody wants its end: readers have a limited time from then on.
    Ended(Times),
    /// Delete: whoever does not read now never will.
    Finishing(Times),
    /// The time for Delete is over: everything ends at once.
    Abandoned,
}

/// What waits are counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Times {
    /// When the process exited.
    pub(super) exit: Instant,
    /// When its end was wanted.
    pub(super) end: Instant,
}

impl Phase {
    /// Increases from phase to phase.
    fn rank(self) -> u8 {
        match self {
            Phase::Running => 0,
            Phase::Exited(_) => 1,
            Phase::Ended(_) => 2,
            Phase::Finishing(_) => 3,
            Phase::Abandoned => 4,
        }
    }

    /// Goes to what `next` makes of this phase, if that is further on. Tells whether it is.
    pub(super) fn advance(&mut self, next: impl FnOnce(Times) -> Phase) -> bool {
        let next = next(self.times());
        let forward = self.rank() < next.rank();
        if forward {
            *self = next;
        }
        forward
    }

    /// Those of this phase; what has not been yet is now.
    fn times(self) -> Times {
        let now = Instant::now();
        match self {
            Phase::Running | Phase::Abandoned => Times { exit: now, end: now },
            Phase::Exited(exit) => Times { exit, end: now },
            Phase::Ended(times) | Phase::Finishing(times) => times,
        }
    }
}

/// One task's view of the phase.
#[derive(Debug, Clone)]
pub(super) struct Phases {
    phase: watch::Receiver<Phase>,
    flow: flow::Watch,
}

impl Phases {
    pub(super) fn new(phase: watch::Receiver<Phase>, flow: flow::Watch) -> Phases {
        Phases { phase, flow }
    }

    /// Resolves when the process has exited.
    pub(super) async fn exited(&mut self) {
        self.reached(|phase| phase != Phase::Running).await;
    }

    /// Resolves when the streams flow, with the time since when. Cancel safe.
    pub(super) async fn flowing(&mut self) -> Instant {
        self.flow.flowing().await
    }

    /// Whether the process has exited.
    pub(super) fn have_exited(&self) -> bool {
        *self.phase.borrow() != Phase::Running
    }

    /// Resolves when Delete is under way.
    pub(super) async fn finishing(&mut self) {
        self.reached(|phase| matches!(phase, Phase::Finishing(_) | Phase::Abandoned)).await;
    }

    /// Resolves when everything must end.
    pub(super) async fn abandoned(&mut self) {
        self.reached(|phase| phase == Phase::Abandoned).await;
    }

    /// Resolves when the process has exited and since then, and since `last_progress`, `patience` has
    /// passed; or when everything must end. While the streams rest nothing is to be expected of anybody.
    pub(super) async fn exhausted(&mut self, last_progress: Instant, patience: Duration) {
        self.exited().await;
        self.passed(|times| times.exit, last_progress, patience).await;
    }

    /// As [`exhausted`](Phases::exhausted), from when the end of the process was wanted: for who waits for a
    /// reader that is attached.
    pub(super) async fn overdue(&mut self, last_progress: Instant, patience: Duration) {
        self.ended().await;
        self.passed(|times| times.end, last_progress, patience).await;
    }

    /// Resolves `limit` after the end of the process was wanted, whatever goes forward.
    pub(super) async fn over(&mut self, limit: Duration) {
        self.ended().await;
        let end = self.phase.borrow().times().end;
        tokio::select! {
            () = sleep_until(end + limit) => {}
            () = self.abandoned() => {}
        }
    }

    /// Resolves when somebody wants the end of the process, which has exited.
    async fn ended(&mut self) {
        self.reached(|phase| !matches!(phase, Phase::Running | Phase::Exited(_))).await;
    }

    async fn passed(
        &mut self,
        from: impl FnOnce(Times) -> Instant,
        last_progress: Instant,
        patience: Duration,
    ) {
        let phase = *self.phase.borrow();
        if phase == Phase::Abandoned {
            return;
        }
        let from = from(phase.times()).max(last_progress);
        let (mut flow, mut pause) = (self.flow.clone(), self.flow.clone());
        let patience_ends = async {
            loop {
                let flowing = flow.flowing().await;
                tokio::select! {
                    () = sleep_until(from.max(flowing) + patience) => return,
                    () = pause.resting() => {}
                }
            }
        };
        tokio::select! {
            () = patience_ends => {}
            () = self.abandoned() => {}
        }
    }

    // An owner that is gone has abandoned the stream.
    async fn reached(&mut self, condition: impl Fn(Phase) -> bool) {
        let _ = self.phase.wait_for(|phase| condition(*phase) || *phase == Phase::Abandoned).await;
    }
}
