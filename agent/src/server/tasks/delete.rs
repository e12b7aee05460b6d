//! Deleting execs and containers.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout_at},
};

use super::{Process, State, Task, Tasks};
use crate::{
    boot::reaper::Exit,
    errors::{self, lock},
    server::error::Error,
};

/// How long killed processes may take to end. Longer means that one hangs in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What a Delete tells about the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// 0 for an exec that was never started.
    pub pid: i32,
    /// `None` for an exec that was never started.
    pub exit: Option<Exit>,
}

impl Tasks {
    /// Deletes an exec, or with "" the container with all that is left of it. Must not be cancelled;
    /// can be repeated after an error.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<Deleted, Error> {
        let task = self.get(id)?;
        let process = task.process(exec)?;
        if matches!(process.state(), State::Starting | State::Running) {
            return Err(process.wrong_state("it must be stopped to be deleted"));
        }
        if exec.is_empty() {
            self.delete_container(&task).await?;
        } else {
            lock(&task.execs).remove(exec);
            self.forget(&process);
            cube_fault::point("agent.delete.exec_forgotten");
        }
        Ok(Deleted { pid: process.pid(), exit: process.state().exit() })
    }

    /// Deletes every container, running or not; errors are logged. For the end of the guest.
    pub async fn delete_all(&self) {
        for task in self.all() {
            if let Err(error) = self.delete_container(&task).await {
                tracing::warn!(container = task.init.id.container, "{}", errors::chain(&error));
            }
        }
    }

    async fn delete_container(&self, task: &Arc<Task>) -> Result<(), Error> {
        let oom_watch = lock(&task.oom_watch).take();
        if let Some(watch) = oom_watch {
            watch.abort();
            // Awaited because it reads the container until it has ended; the error is "cancelled".
            let _ = watch.await;
        }
        let mut container = task.container.write().await;
        self.still_there(task)?;
        container.delete().await?;
        cube_fault::point("agent.delete.killed");
        wait_for_all(&task.processes()).await?;
        self.unmount(task).await?;
        cube_fault::point("agent.delete.unmounted");
        for process in task.processes() {
            self.forget(&process);
        }
        lock(&self.slots).remove(&task.init.id.container);
        Ok(())
    }

    async fn unmount(&self, task: &Task) -> Result<(), Error> {
        let Some(mut rootfs) = lock(&task.rootfs).take() else { return Ok(()) };
        let (rootfs, result) = spawn_blocking(move || {
            let result = rootfs.unmount();
            (rootfs, result)
        })
        .await?;
        if result.is_err() {
            // For another try.
            *lock(&task.rootfs) = Some(rootfs);
        }
        Ok(result?)
    }

    fn forget(&self, process: &Process) {
        self.hub.close(&process.id);
        self.events.forget(&process.id);
    }
}

/// Waits for every process that was ever spawned.
async fn wait_for_all(processes: &[Arc<Process>]) -> Result<(), Error> {
    let deadline = Instant::now() + KILL_LIMIT;
    for process in processes.iter().filter(|process| process.pid() != 0) {
        let ended = timeout_at(deadline, process.wait()).await;
        ended.map_err(|_| Error::Timeout { what: "the end of a killed process", limit: KILL_LIMIT })?;
    }
    Ok(())
}
