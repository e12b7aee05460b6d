//! Bringing the guest to rest, and setting it going again.
//!
//! ```text
//!            quiesce: fence, freeze, hold the clock, sync
//!   Running ────────────────────────────────────────────► Quiesced
//!           ◄────────────────────────────────────────────
//!            thaw: renew, unfreeze, release the clock, open the fence
//! ```
//!
//! A step that fails undoes those before it, so there is nothing between the two states.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};

use super::{
    disks,
    gate::{Closed, Gate, Pass},
    storage::StorageError,
};
use crate::{
    container::{ContainerError, Freezer},
    stdio::Hub,
};

/// Why the guest cannot be quiesced, or thawed.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// Calls that were let through before are still at work.
    #[error(
        "calls that change the sandbox are still under way after {limit:?}: try again once they are done"
    )]
    Busy {
        /// How long they were given.
        limit: Duration,
    },
    /// A process does not stand still, or cannot be told to go on.
    #[error(transparent)]
    Freezer(#[from] ContainerError),
    /// The disks take too long.
    #[error("the disks of the guest are not written out after {limit:?}")]
    SlowDisks {
        /// How long they were given.
        limit: Duration,
    },
    /// A disk cannot be written out.
    #[error(transparent)]
    Disks(#[from] StorageError),
    /// A defect: the code that wrote the disks out panicked.
    #[error("writing out the disks ended unexpectedly")]
    Panicked(#[from] tokio::task::JoinError),
}

/// Whose the kernel is, and with it its clock, its random generator and its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// This guest's.
    Own,
    /// The host's, on the `process` backend: nothing of it is touched.
    Host,
}

/// See the module. One per agent.
#[derive(Debug)]
pub struct Quiescence {
    gate: Gate,
    freezer: Freezer,
    hub: Arc<Hub>,
    kernel: Kernel,
    /// Locked for as long as a transition takes, so that they come one after the other.
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Running,
    Quiesced { _fence: Closed },
}

/// What [`Quiescence::thaw`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thawed {
    /// It was quiesced, and runs.
    Now,
    /// It ran; nothing was done.
    Before,
}

impl Quiescence {
    /// For a guest that runs, whose processes `freezer` freezes and whose stdio `hub` has.
    pub fn new(freezer: Freezer, hub: Arc<Hub>, kernel: Kernel) -> Quiescence {
        Quiescence { gate: Gate::default(), freezer, hub, kernel, state: Mutex::new(State::Running) }
    }

    /// Whose the kernel is.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Whether the guest is at rest.
    pub fn is_quiesced(&self) -> bool {
        self.hub.clock().is_held()
    }

    /// Lets a call that changes state through, unless the guest is quiesced or about to be.
    pub fn pass(&self) -> Option<Pass> {
        self.gate.pass()
    }

    /// Brings the guest to rest, and with `sync` writes out its disks. On an error it is as before.
    /// Must not be cancelled.
    pub async fn quiesce(&self, sync: bool, limit: Duration) -> Result<(), QuiesceError> {
        let deadline = Deadline::after(limit);
        let mut state = timeout_at(deadline.at, self.state.lock()).await.map_err(|_| deadline.busy())?;
        match &*state {
            State::Quiesced { .. } => self.sync(sync, deadline).await,
            State::Running => {
                let fence = timeout_at(deadline.at, self.gate.close()).await.map_err(|_| deadline.busy())?;
                self.freezer.freeze(deadline.left()).await?;
                self.hub.hold();
                *state = State::Quiesced { _fence: fence };
                let synced = self.sync(sync, deadline).await;
                if synced.is_err() {
                    self.set_going()?;
                    *state = State::Running;
                }
                synced
            }
        }
    }

    /// Carries out `renew`, then sets the guest going again. If it fails, the guest stays quiesced.
    /// Neither happens if it runs. Must not be cancelled.
    pub async fn thaw<E>(&self, renew: impl Future<Output = Result<(), E>>) -> Result<Thawed, E>
    where
        E: From<QuiesceError>,
    {
        let mut state = self.state.lock().await;
        let State::Quiesced { .. } = &*state else { return Ok(Thawed::Before) };
        renew.await?;
        self.set_going()?;
        *state = State::Running;
        Ok(Thawed::Now)
    }

    fn set_going(&self) -> Result<(), QuiesceError> {
        self.freezer.thaw()?;
        self.hub.release();
        Ok(())
    }

    async fn sync(&self, wanted: bool, deadline: Deadline) -> Result<(), QuiesceError> {
        if !wanted || self.kernel == Kernel::Host {
            return Ok(());
        }
        let synced = timeout_at(deadline.at, spawn_blocking(disks::sync)).await;
        Ok(synced.map_err(|_| QuiesceError::SlowDisks { limit: deadline.limit })???)
    }
}

/// One time limit for several steps.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    fn after(limit: Duration) -> Deadline {
        Deadline { at: Instant::now() + limit, limit }
    }

    fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    fn busy(self) -> QuiesceError {
        QuiesceError::Busy { limit: self.limit }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::stdio::Limits;

    const SOON: Duration = Duration::from_millis(20);

    /// A guest whose cgroup is a directory of files that say `frozen` whatever is written.
    fn guest(frozen: u8) -> (Quiescence, tempfile::TempDir) {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join("cgroup.events"), format!("populated 1\nfrozen {frozen}\n")).unwrap();
        let hub = Hub::new(Limits { ring_budget: 0, processes: 1 }, 1);
        (Quiescence::new(Freezer::new(cgroup.path().into()), hub, Kernel::Own), cgroup)
    }

    fn asked(cgroup: &tempfile::TempDir) -> Option<String> {
        fs::read_to_string(cgroup.path().join("cgroup.freeze")).ok()
    }

    fn runs(guest: &Quiescence) -> bool {
        assert_eq!(guest.pass().is_none(), guest.is_quiesced());
        !guest.is_quiesced()
    }

    async fn thaw(guest: &Quiescence) -> Thawed {
        guest.thaw::<QuiesceError>(async { Ok(()) }).await.unwrap()
    }

    #[tokio::test]
    async fn a_call_that_does_not_end_in_time_fails_the_quiesce_before_anything_is_frozen() {
        let (guest, cgroup) = guest(1);
        let call = guest.pass();
        assert!(matches!(guest.quiesce(true, SOON).await, Err(QuiesceError::Busy { limit: SOON })));
        assert!(runs(&guest));
        assert_eq!(asked(&cgroup), None);
        drop(call);
        guest.quiesce(true, SOON * 1000).await.unwrap();
        assert!(!runs(&guest));
    }

    #[tokio::test]
    async fn a_guest_that_cannot_be_frozen_runs_on() {
        let (guest, cgroup) = guest(0);
        assert!(matches!(guest.quiesce(false, SOON).await, Err(QuiesceError::Freezer(_))));
        assert!(runs(&guest));
        assert_eq!(asked(&cgroup).unwrap(), "0");
    }

    #[tokio::test]
    async fn a_thaw_that_fails_leaves_it_quiesced_and_one_too_many_does_nothing() {
        let (guest, cgroup) = guest(1);
        for sync in [false, true, false] {
            guest.quiesce(sync, SOON * 1000).await.unwrap();
        }
        let failed = guest.thaw(async { Err(QuiesceError::Busy { limit: SOON }) }).await;
        assert!(failed.is_err() && !runs(&guest));
        assert_eq!(asked(&cgroup).unwrap(), "1");
        assert_eq!(thaw(&guest).await, Thawed::Now);
        assert!(runs(&guest));
        assert_eq!(asked(&cgroup).unwrap(), "0");
        let renewed = guest.thaw(async { Err(QuiesceError::Busy { limit: SOON }) }).await;
        assert_eq!(renewed.unwrap(), Thawed::Before, "nothing is renewed in a guest that runs");
    }
}
