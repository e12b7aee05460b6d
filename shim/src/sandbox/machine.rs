//! The task that owns a running VMM.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::Message;
use crate::{errors::chain, vmm::Vmm};

enum Command {
    Kill,
    Shutdown(Duration),
}

/// Handle of a running VMM. Dropping it leaves the VM running.
#[derive(Clone)]
pub(super) struct Machine {
    commands: mpsc::Sender<(Command, oneshot::Sender<()>)>,
}

impl Machine {
    /// Takes a booted VMM over; its end is reported to `owner` once.
    pub(super) fn watch(vmm: Box<dyn Vmm>, owner: mpsc::Sender<Message>) -> Machine {
        let (commands, requests) = mpsc::channel(4);
        tokio::spawn(run(vmm, requests, owner));
        Machine { commands }
    }

    /// Ends the VMM with SIGKILL; returns when it is gone.
    pub(super) async fn kill(&self) {
        self.command(Command::Kill).await;
    }

    /// Waits at most `grace` for a guest that was told to power off, then kills the VMM.
    pub(super) async fn shutdown(&self, grace: Duration) {
        self.command(Command::Shutdown(grace)).await;
    }

    async fn command(&self, command: Command) {
        let (done, finished) = oneshot::channel();
        // Either fails only if the VMM has ended already.
        if self.commands.send((command, done)).await.is_ok() {
            let _ = finished.await;
        }
    }
}

async fn run(
    mut vmm: Box<dyn Vmm>,
    mut requests: mpsc::Receiver<(Command, oneshot::Sender<()>)>,
    owner: mpsc::Sender<Message>,
) {
    let mut handles = true;
    let exit = loop {
        tokio::select! {
            exit = vmm.wait() => break exit,
            request = requests.recv(), if handles => match request {
                None => handles = false,
                Some((command, done)) => {
                    let result = match command {
                        Command::Kill => vmm.kill().await,
                        Command::Shutdown(grace) => vmm.shutdown(grace).await,
                    };
                    if let Err(e) = result {
                        warn!("cannot end the VMM: {}", chain(&e));
                    }
                    let _ = done.send(());
                }
            }
        }
    };
    // The helpers serve nobody any more.
    if let Err(e) = vmm.kill().await {
        warn!("cannot end the helpers of the VMM: {}", chain(&e));
    }
    let _ = owner.send(Message::VmmExited(exit)).await;
}
