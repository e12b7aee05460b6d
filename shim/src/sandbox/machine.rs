//! A running VMM, shared by the owner and its jobs.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tracing::warn;

use super::Message;
use crate::{
    errors::chain,
    vmm::{Vmm, VmmError},
};

/// Handle of a running VMM. Dropping it leaves the VM running.
#[derive(Clone)]
pub(super) struct Machine(Arc<dyn Vmm>);

impl Machine {
    /// Takes a booted VMM over; its end is reported to `owner` once.
    pub(super) fn watch(vmm: Box<dyn Vmm>, owner: mpsc::Sender<Message>) -> Machine {
        let vmm = Arc::<dyn Vmm>::from(vmm);
        let watched = vmm.clone();
        tokio::spawn(async move {
            let exit = watched.wait().await;
            // The helpers serve nobody any more.
            warn_of(watched.kill().await);
            let _ = owner.send(Message::VmmExited(exit)).await;
        });
        Machine(vmm)
    }

    /// Stops the virtual CPUs.
    pub(super) async fn pause(&self) -> Result<(), VmmError> {
        self.0.pause().await
    }

    /// Lets the virtual CPUs run again. Does nothing if they do.
    pub(super) async fn resume(&self) -> Result<(), VmmError> {
        self.0.resume().await
    }

    /// Ends the VMM with SIGKILL; returns when it is gone.
    pub(super) async fn kill(&self) {
        warn_of(self.0.kill().await);
    }

    /// Waits at most `grace` for a guest that was told to power off, then kills the VMM.
    pub(super) async fn shutdown(&self, grace: Duration) {
        warn_of(self.0.shutdown(grace).await);
    }
}

fn warn_of(result: Result<(), VmmError>) {
    if let Err(e) = result {
        warn!("cannot end the VMM: {}", chain(&e));
    }
}
