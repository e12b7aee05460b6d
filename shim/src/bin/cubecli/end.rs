//! `cubecli cubebox kill` and `cubecli cubebox rm`: through containerd, else through the shim, else from what is on
//! disk.

use std::{io::ErrorKind, path::Path, time::Duration};

use containerd_shim_protos::api;
use cube_shim::{bootstrap, cgroup::SandboxCgroup, config::Config, log::locate::Name, state::RunDir};
use tokio::time::{Instant, sleep, timeout};
use ttrpc::Code;

use crate::{
    args::{KillArgs, RmArgs},
    containerd::{Containerd, ContainerdError, Task, limited},
    error::{CliError, complain},
    progress::during,
    sandboxes::{self, Sandbox},
    shim::{self, Shim},
};

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// Time for a shim to say anything.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Between two looks at what is about to go.
const PAUSE: Duration = Duration::from_millis(20);

/// Time for a signal, and for a state.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Time for a task to exit that was killed: the shim gives the guest 10 s before it kills the VM.
const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// Time to remove a task.
const DELETE_LIMIT: Duration = Duration::from_secs(30);

/// Time that the kernel has to end processes.
const CGROUP_LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn kill(config: &Config, args: &KillArgs) -> Result<(), CliError> {
    let (sandbox, id) = sandboxes::find_container(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    let end = End { config, sandbox, address: &args.containerd.address };
    shim::block_on(end.kill(&id, args.signal))
}

pub(crate) fn rm(config: &Config, args: &RmArgs) -> Result<(), CliError> {
    let (sandbox, id) = sandboxes::find_container(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    let end = End { config, sandbox, address: &args.containerd.address };
    // The main container takes the others along; they are removed one by one, so that containerd knows.
    let mut ids = vec![id.clone()];
    if id == end.sandbox.state.sandbox_id {
        ids.splice(..0, end.sandbox.state.containers.keys().filter(|other| **other != id).cloned());
    }
    shim::block_on(during("removing", end.remove(&ids, args.force)))
}

/// A sandbox that ends, or a part of which does.
struct End<'a> {
    config: &'a Config,
    sandbox: Sandbox,
    /// containerd's socket.
    address: &'a Path,
}

impl End<'_> {
    async fn kill(&self, id: &str, signal: u32) -> Result<(), CliError> {
        if let Some((containerd, _)) = self.containerd(id).await {
            match limited(CALL_LIMIT, "kill the task", id, containerd.kill_task(id, signal)).await {
                Err(e) if e.is_silence() => {}
                killed => return Ok(killed?),
            }
        }
        if let Reach::Answers(shim) = self.reach().await? {
            match kill_by(&shim, id, signal).await {
                Err(CliError::ShimSilent { .. }) => {}
                killed => return killed,
            }
        }
        self.kill_from_disk(id, signal)
    }

    /// Ends everything in the sandbox's cgroup: without a shim, nobody can do less.
    fn kill_from_disk(&self, id: &str, signal: u32) -> Result<(), CliError> {
        let state = &self.sandbox.state;
        if signal != SIGKILL {
            return Err(CliError::OnlyKill { sandbox: self.sandbox.name() });
        }
        if id != state.sandbox_id && state.containers.len() > 1 {
            return Err(CliError::OnlyWhole { sandbox: self.sandbox.name(), container: id.into() });
        }
        if self.has_processes() {
            SandboxCgroup::at(&state.cgroup).kill(CGROUP_LIMIT)?;
        }
        Ok(())
    }

    fn has_processes(&self) -> bool {
        let cgroup = &self.sandbox.state.cgroup;
        // Empty: nothing was ever made in it.
        !cgroup.as_os_str().is_empty() && SandboxCgroup::at(cgroup).has_processes()
    }

    async fn remove(&self, ids: &[String], force: bool) -> Result<(), CliError> {
        // Before anything is ended: all may go, or nothing is done.
        let shim = self.shim().await?;
        if !force {
            self.all_have_stopped(shim.as_ref(), ids).await?;
        }
        let others = self.sandbox.state.containers.keys().any(|id| !ids.contains(id));
        if let (None, true, Some(id)) = (&shim, others && self.has_processes(), ids.last()) {
            return Err(CliError::OnlyWhole { sandbox: self.sandbox.name(), container: id.clone() });
        }
        let mut is_silent = true;
        for id in ids {
            match (self.containerd(id).await, &shim) {
                (Some((containerd, task)), _) => {
                    is_silent = false;
                    self.remove_by_containerd(&containerd, task, id).await?;
                }
                (None, Some(shim)) => self.remove_by_shim(shim, id).await?,
                (None, None) => {}
            }
        }
        if let (Some(shim), false) = (shim, others) {
            // With its last container it has removed its socket: nobody else could tell it.
            let request = api::ShutdownRequest::new();
            let call = shim.task(CALL_LIMIT, |c, context| async move { c.shutdown(context, &request).await });
            // It ends before its answer is out, or after; what is left then is seen below.
            let _ = call.await;
        }
        self.clean_up(ids).await?;
        match self.connect().await {
            Some(containerd) => self.forget(&containerd, ids).await,
            None if is_silent => {
                let (address, ids) = (self.address.display(), ids.join(" "));
                eprintln!(
                    "cubecli: containerd at {address} does not answer: what it has of the container stays, until `ctr container rm {ids}`"
                );
                Ok(())
            }
            None => Ok(()),
        }
    }

    async fn all_have_stopped(&self, shim: Option<&Shim>, ids: &[String]) -> Result<(), CliError> {
        let running = |id: &str| CliError::NotStopped { container: self.name(id) };
        let Some(shim) = shim else {
            return match ids.last() {
                Some(id) if self.has_processes() => Err(running(id)),
                _ => Ok(()),
            };
        };
        for id in ids {
            let request = api::StateRequest { id: id.clone(), ..Default::default() };
            let state =
                shim.task(CALL_LIMIT, |c, context| async move { c.state(context, &request).await }).await;
            match state {
                Ok(state) if state.status.enum_value() == Ok(api::Status::STOPPED) => {}
                Ok(_) => return Err(running(id)),
                Err(e) if is_not_found(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn remove_by_containerd(
        &self,
        containerd: &Containerd,
        task: Task,
        id: &str,
    ) -> Result<(), CliError> {
        if !task.is_stopped {
            // It may exit meanwhile, and a task that was never started has no exit to wait for.
            let killed = limited(CALL_LIMIT, "kill the task", id, containerd.kill_task(id, SIGKILL)).await;
            killed.or_else(unless_not_found)?;
            let exited = timeout(EXIT_LIMIT, containerd.wait_for_task(id)).await;
            let lives_on = |_| CliError::LivesOn { container: self.name(id), limit: EXIT_LIMIT };
            exited.map_err(lives_on)?.or_else(unless_not_found)?;
        }
        let deleted = limited(DELETE_LIMIT, "remove the task", id, containerd.delete_task(id)).await;
        Ok(deleted.or_else(unless_not_found)?)
    }

    /// What containerd would ask of the shim.
    async fn remove_by_shim(&self, shim: &Shim, id: &str) -> Result<(), CliError> {
        let gone = |e: CliError| if is_not_found(&e) { Ok(()) } else { Err(e) };
        kill_by(shim, id, SIGKILL).await.or_else(gone)?;
        let request = api::WaitRequest { id: id.into(), ..Default::default() };
        let exited = shim.task(EXIT_LIMIT, |c, context| async move { c.wait(context, &request).await }).await;
        exited.map(drop).or_else(gone)?;
        let request = api::DeleteRequest { id: id.into(), ..Default::default() };
        let deleted = shim.task(DELETE_LIMIT, |c, context| async move { c.delete(context, &request).await });
        deleted.await.map(drop).or_else(gone)
    }

    /// Removes what no shim removes. One whose last container is gone is told to end, and takes its files along.
    async fn clean_up(&self, ids: &[String]) -> Result<(), CliError> {
        let dir = &self.sandbox.dir;
        let left = |state: &cube_shim::state::State| state.containers.keys().any(|id| !ids.contains(id));
        if dir.load()?.as_ref().is_some_and(left) && self.shim().await?.is_some() {
            // Other containers live in it.
            return Ok(());
        }
        if let Some(shim) = self.shim().await? {
            let request = api::ShutdownRequest::new();
            // It ends before its answer is out, or after.
            let call = shim.task(CALL_LIMIT, |c, context| async move { c.shutdown(context, &request).await });
            tokio::select! {
                _ = call => {}
                () = is_gone(dir) => {}
            }
            if timeout(DELETE_LIMIT, is_gone(dir)).await.is_err() {
                return Err(shim.silent());
            }
        }
        match bootstrap::clean_up(dir, self.config).await {
            // containerd has told it to end, and that takes a moment.
            Err(bootstrap::BootstrapError::Lives(_)) if timeout(DELETE_LIMIT, is_gone(dir)).await.is_ok() => {
                Ok(bootstrap::clean_up(dir, self.config).await?)
            }
            cleaned => Ok(cleaned?),
        }
    }

    /// Removes the containers themselves, and tasks that are gone without containerd's knowledge.
    async fn forget(&self, containerd: &Containerd, ids: &[String]) -> Result<(), CliError> {
        for id in ids {
            let task = limited(DELETE_LIMIT, "remove the task", id, containerd.delete_task(id)).await;
            if let Err(e) = task.or_else(unless_not_found) {
                complain(&e);
            }
            let container =
                limited(CALL_LIMIT, "remove the container", id, containerd.delete_container(id)).await;
            container.or_else(unless_not_found)?;
        }
        Ok(())
    }

    /// containerd and what it knows of the task of `id`, if it answers and knows the one of this sandbox.
    async fn containerd(&self, id: &str) -> Option<(Containerd, Task)> {
        let containerd = self.connect().await?;
        let task = limited(CALL_LIMIT, "find the task", id, containerd.task(id)).await.ok()?;
        Some((containerd, task))
    }

    async fn connect(&self) -> Option<Containerd> {
        Containerd::of(self.config, &self.sandbox, self.address).await.ok()
    }

    /// The shim, if there is one.
    async fn shim(&self) -> Result<Option<Shim>, CliError> {
        match self.reach().await? {
            Reach::Answers(shim) => Ok(Some(shim)),
            Reach::Silent(shim) => Err(shim.silent()),
            Reach::Gone => Ok(None),
        }
    }

    /// Asks for a state, which a shim has in memory: one that is just being killed may take a connection.
    async fn reach(&self) -> Result<Reach, CliError> {
        let begun = Instant::now();
        loop {
            let shim = match Shim::connect(&self.sandbox).await {
                Ok(shim) => shim,
                Err(CliError::ShimGone { source, .. })
                    if [ErrorKind::NotFound, ErrorKind::ConnectionRefused].contains(&source.kind()) =>
                {
                    return Ok(Reach::Gone);
                }
                Err(e) => return Err(e),
            };
            let request =
                api::StateRequest { id: self.sandbox.state.sandbox_id.clone(), ..Default::default() };
            match shim.task(ANSWER_LIMIT, |c, context| async move { c.state(context, &request).await }).await
            {
                Err(CliError::ShimSilent { .. }) if begun.elapsed() >= ANSWER_LIMIT => {
                    return Ok(Reach::Silent(shim));
                }
                // It has closed the connection.
                Err(CliError::ShimSilent { .. }) => sleep(PAUSE).await,
                // Whatever it says.
                _ => return Ok(Reach::Answers(shim)),
            }
        }
    }

    fn name(&self, id: &str) -> Name {
        Name { namespace: self.sandbox.state.namespace.clone(), id: id.into() }
    }
}

/// How it is with a shim.
enum Reach {
    Answers(Shim),
    /// Somebody listens, and says nothing.
    Silent(Shim),
    Gone,
}

async fn kill_by(shim: &Shim, id: &str, signal: u32) -> Result<(), CliError> {
    let request = api::KillRequest { id: id.into(), signal, ..Default::default() };
    shim.task(CALL_LIMIT, |c, context| async move { c.kill(context, &request).await }).await.map(drop)
}

/// Returns when nobody listens on the shim's socket any more.
async fn is_gone(dir: &RunDir) {
    while tokio::net::UnixStream::connect(dir.path().join("shim.sock")).await.is_ok() {
        sleep(PAUSE).await;
    }
}

fn unless_not_found(error: ContainerdError) -> Result<(), ContainerdError> {
    if error.is_not_found() { Ok(()) } else { Err(error) }
}

fn is_not_found(error: &CliError) -> bool {
    matches!(error, CliError::Refused { code: Code::NOT_FOUND, .. })
}
