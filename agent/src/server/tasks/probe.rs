//! What a ready probe needs of a container: a socket in its network, a process of its own kind.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{net::TcpSocket, sync::oneshot};

use super::{State, Task, Tasks, create::Opened, environment};
use crate::{
    boot::reaper::Exit,
    errors::lock,
    server::error::Error,
    stdio::{Policy, ProcessId, Request},
};

/// A process that nobody but its probe knows. Dropping this kills it, and its process group with it.
#[derive(Debug)]
pub struct Probing<'a> {
    /// Also the id of its process group: a process without a terminal begins a session.
    pid: i32,
    exit: oneshot::Receiver<Exit>,
    /// Its place among the processes that may have stdio at once.
    _place: Opened<'a>,
}

impl Tasks {
    /// A socket for a TCP connection to `to`, in the network of the running container `id`.
    pub async fn probe_socket(&self, id: &str, to: SocketAddr) -> Result<TcpSocket, Error> {
        let task = self.running(id)?;
        let container = task.container.read().await;
        self.still_there(&task)?;
        let _unpaused = task.unpaused().await?;
        Ok(container.tcp_socket(to)?)
    }

    /// Runs `args` in the running container `id`, as its init process is run but for its stdio, which is
    /// /dev/null. Cancel safe: a process that has been spawned is killed.
    pub async fn probe_process(&self, id: &str, args: Vec<String>) -> Result<Probing<'_>, Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let task = self.running(id)?;
        let container = task.container.read().await;
        self.still_there(&task)?;
        let _unpaused = task.unpaused().await?;
        let needed = "it must have a process to run another as it is run";
        let mut process = task.process.clone().ok_or_else(|| task.init.wrong_state(needed))?;
        process.set_args(Some(args)).set_terminal(Some(false)).set_console_size(None);
        // In a clone the init process has that of the template, and this is the clone's.
        environment::overrule(&mut process, &lock(&self.environment));
        // No exec has this id: a space is in none.
        let exec = format!("ready probe {}", COUNT.fetch_add(1, Ordering::Relaxed));
        let process_id = ProcessId { container: id.to_owned(), exec };
        let nothing =
            Request { terminal: false, stdin: false, stdout: false, stderr: false, policy: Policy::Block };
        let (place, stdio) = Opened::open(&self.hub, &process_id, nothing)?;
        let spawning = self.reaper.spawning();
        let start = self.starts.begin(&process_id);
        let spawned = start.carry_out(container.exec(&process, stdio)).await?;
        Ok(Probing { pid: spawned.pid, exit: spawning.watch(spawned.pid), _place: place })
    }

    fn running(&self, id: &str) -> Result<Arc<Task>, Error> {
        let task = self.get(id)?;
        match task.init.state() {
            State::Running => Ok(task),
            _ => Err(task.init.wrong_state("it must be running to be probed")),
        }
    }
}

impl Probing<'_> {
    /// Waits for its end, and gives its exit status.
    pub async fn exit_status(mut self) -> Result<u8, Error> {
        let exit = (&mut self.exit).await;
        // The reaper lives as long as the agent.
        exit.map(|exit| exit.status).map_err(|_| self.lost())
    }

    fn lost(&self) -> Error {
        Error::System { action: "learn how a probe has ended", source: Errno::ECHILD.into() }
    }
}

impl Drop for Probing<'_> {
    fn drop(&mut self) {
        // Not reaped yet, for the reaper is in this thread: the pid is still its own.
        if matches!(self.exit.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
            // What is gone already is as good as killed.
            let _ = killpg(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}
