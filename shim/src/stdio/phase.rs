//! How far the process has come, as far as its stdio is concerned, and how long that makes a sink wait.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::flow;

/// Time without progress of a reader after which nothing waits for it any more: the log runs ahead of
/// it, and once the process has exited, its FIFO is closed.
pub(super) const READER_PATIENCE: Duration = Duration::from_secs(2);

/// Time without a byte from the guest after which sinks that containerd's client waits for are closed,
/// once the process has exited. The agent ends every stream 2 s after the exit, so this long a silence
/// means that the guest hangs or is gone.
pub(super) const GUEST_PATIENCE: Duration = Duration::from_secs(4);

/// How long a reader may take for its next bytes, or for its first: clients open their ends in the
/// background, and a process can be over before they have.
pub(super) const TAKEN_PATIENCE: Duration = Duration::from_millis(500);

/// Only ever goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The process may write and read.
    Running,
    /// It has exited; output may still come.
    Exited(Instant),
    /// Delete: whoever does not read now never will.
    Finishing(Instant),
    /// The time for Delete is over: everything ends at once.
    Abandoned,
}

impl Phase {
    /// Increases from phase to phase.
    pub(super) fn rank(self) -> u8 {
        match self {
            Phase::Running => 0,
            Phase::Exited(_) => 1,
            Phase::Finishing(_) => 2,
            Phase::Abandoned => 3,
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
        let exit = match *self.phase.borrow() {
            Phase::Exited(exit) | Phase::Finishing(exit) => exit,
            Phase::Running | Phase::Abandoned => return,
        };
        let (mut flow, mut pause) = (self.flow.clone(), self.flow.clone());
        let patience_ends = async {
            loop {
                let flowing = flow.flowing().await;
                tokio::select! {
                    () = sleep_until(exit.max(last_progress).max(flowing) + patience) => return,
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
