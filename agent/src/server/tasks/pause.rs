//! Pausing one container, while the others run: its cgroup is frozen.
//!
//! A Quiesce freezes the cgroup above it, and its Thaw leaves this one frozen.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::RwLockReadGuard,
    time::{Instant, timeout_at},
};

use super::{State, Task, Tasks};
use crate::server::error::Error;

/// How long a Pause may take: the spawning of processes that is under way, then the freeze. It is the host's
/// limit for a Quiesce, too.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

impl Tasks {
    /// Freezes every process of the running container `id`, and resolves when they stand still. On an error
    /// they run. Of one that is paused it does nothing. Must not be cancelled.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let task = self.get(id)?;
        let deadline = Instant::now() + PAUSE_LIMIT;
        let busy = |_| Error::Timeout { what: "starting a process in the container", limit: PAUSE_LIMIT };
        // Whoever spawns holds it for reading: what is born into a frozen cgroup never gets to its execve.
        let rest = timeout_at(deadline, task.paused.write());
        let mut paused = self
            .starts
            .hurry(|starting| starting.container == id, PAUSE_LIMIT / 2, rest)
            .await
            .map_err(busy)?;
        if task.init.state() != State::Running {
            return Err(task.init.wrong_state("it must be running to be paused"));
        }
        if *paused {
            return Ok(());
        }
        let freezer = task.container.read().await.freezer();
        self.still_there(&task)?;
        freezer.freeze(deadline.saturating_duration_since(Instant::now())).await?;
        *paused = true;
        Ok(())
    }

    /// Lets the processes of container `id` go on. Of one that is not paused it does nothing. Must not be
    /// cancelled.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let task = self.get(id)?;
        let mut paused = task.paused.write().await;
        if *paused {
            task.container.read().await.freezer().thaw()?;
            *paused = false;
        }
        Ok(())
    }
}

impl Task {
    /// Whether it is paused. Not yet, as long as a Pause is under way.
    pub fn is_paused(&self) -> bool {
        self.init.state() == State::Running && self.paused.try_read().is_ok_and(|paused| *paused)
    }

    /// To be held by whoever spawns a process in the container: no Pause comes in between.
    pub(super) async fn unpaused(self: &Arc<Self>) -> Result<RwLockReadGuard<'_, bool>, Error> {
        let paused = self.paused.read().await;
        if !*paused {
            return Ok(paused);
        }
        let needed = "it must be resumed first";
        Err(Error::State { process: self.init.id.clone(), state: "paused", needed })
    }
}
