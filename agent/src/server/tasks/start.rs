//! Starting init processes and execs.

use std::{sync::Arc, time::Duration};

use super::{Process, State, Task, Tasks, environment};
use crate::{
    errors::lock,
    guest::active_clock::ActiveClock,
    server::{error::Error, events::Events},
};

/// Shortest time between two OOM events of a container: a container can make as many as it likes.
const OOM_INTERVAL: Duration = Duration::from_millis(100);

impl Tasks {
    /// Starts the init process, or an exec. Gives the pid. Must not be cancelled.
    pub async fn start(&self, id: &str, exec: &str) -> Result<i32, Error> {
        let task = self.get(id)?;
        let process = task.process(exec)?;
        if exec.is_empty() {
            self.start_init(&task).await?;
        } else {
            self.start_exec(&task, &process).await?;
        }
        cube_fault::point("agent.start.started");
        Ok(process.pid())
    }

    async fn start_init(&self, task: &Arc<Task>) -> Result<(), Error> {
        task.init.begin_start()?;
        let start = self.starts.begin(&task.init.id);
        let result = start.carry_out(async { task.container.write().await.start().await }).await;
        match result {
            Ok(()) => {
                task.init.started();
                watch_oom(task, self.events.clone(), self.hub.clock().clone());
                Ok(())
            }
            Err(error) => {
                task.init.start_failed();
                Err(error)
            }
        }
    }

    async fn start_exec(&self, task: &Arc<Task>, process: &Arc<Process>) -> Result<(), Error> {
        let container = task.container.read().await;
        self.still_there(task)?;
        if task.init.state() != State::Running {
            return Err(task.init.wrong_state("it must be running to exec in it"));
        }
        let _unpaused = task.unpaused().await?;
        process.begin_start()?;
        let result = self.spawn_exec(task, process, &container).await;
        match &result {
            Ok(()) => process.started(),
            Err(_) => {
                self.hub.close(&process.id);
                process.start_failed();
            }
        }
        result
    }

    async fn spawn_exec(
        &self,
        task: &Arc<Task>,
        process: &Arc<Process>,
        container: &crate::container::Container,
    ) -> Result<(), Error> {
        let Some(mut exec) = process.exec.clone() else {
            return Err(process.wrong_state("it must be an exec"));
        };
        environment::complete(&mut exec, &lock(&self.environment));
        let stdio = match process.take_stdio() {
            Some(stdio) => stdio,
            None => self.hub.open(&process.id, process.request)?,
        };
        let spawning = self.reaper.spawning();
        let start = self.starts.begin(&process.id);
        let spawned = start.carry_out(container.exec(&exec, stdio)).await?;
        let exit = spawning.watch(spawned.pid);
        process.spawned(spawned.pid, spawned.pidfd);
        self.follow(task, process.clone(), exit);
        if let Some(master) = spawned.terminal
            && let Err(error) = self.hub.attach_terminal(&process.id, master)
        {
            process.kill(libc::SIGKILL)?;
            return Err(error.into());
        }
        Ok(())
    }
}

/// Reports OOM kills from now on; those before are in the count. Reads the container until Delete
/// ends it, which is why it must not run before the init process is started.
fn watch_oom(task: &Arc<Task>, events: Arc<Events>, clock: Arc<ActiveClock>) {
    let container = task.container.clone();
    let id = task.init.id.container.clone();
    let watch = tokio::spawn(async move {
        let container = container.read_owned().await;
        let mut count = 0;
        loop {
            count = container.oom_kills_after(count).await;
            events.out_of_memory(&id, count);
            clock.sleep(OOM_INTERVAL).await;
        }
    });
    *lock(&task.oom_watch) = Some(watch);
}
