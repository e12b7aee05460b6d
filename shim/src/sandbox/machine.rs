//! The place of a sandbox's VMM, shared by the owner and its jobs.
//!
//! One VMM is in it, or for a while none: when the sandbox's memory is on disk, and when another VMM is to
//! take the place of the one that was there. So whoever holds a [`Machine`] always means the current one.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tracing::warn;

use super::Message;
use crate::{
    errors::chain,
    vmm::{Vmm, VmmError, VmmExit},
};

/// Handle of the place. Dropping it leaves the VM running.
#[derive(Clone)]
pub(super) struct Machine {
    place: watch::Sender<Place>,
    owner: mpsc::Sender<Message>,
}

#[derive(Clone)]
enum Place {
    /// This one runs, or did until a moment ago.
    Taken(Arc<dyn Vmm>),
    /// For the next one.
    Vacant,
    /// The sandbox has ended. Nothing comes after it.
    Ended,
}

impl Machine {
    /// Takes a booted VMM over; its end is reported to `owner` once, unless it is
    /// [retired](Machine::retire).
    pub(super) fn watch(vmm: Box<dyn Vmm>, owner: mpsc::Sender<Message>) -> Machine {
        let machine = Machine { place: watch::Sender::new(Place::Vacant), owner };
        machine.occupy(vmm.into());
        machine
    }

    /// Gives the vacant place to a booted VMM, whose end is reported like that of the first. `false` if the
    /// sandbox has ended meanwhile: then the VMM is still the caller's.
    pub(super) fn occupy(&self, vmm: Arc<dyn Vmm>) -> bool {
        let taken = self.change(|place| match place {
            Place::Vacant => Some(Place::Taken(vmm.clone())),
            Place::Taken(_) | Place::Ended => None,
        });
        if taken {
            tokio::spawn(self.clone().follow(vmm));
        }
        taken
    }

    async fn follow(self, vmm: Arc<dyn Vmm>) {
        let exit = vmm.wait().await;
        // Nothing is killed for one that was retired: its successor has the same cgroup.
        let current = self.change(|place| match place {
            Place::Taken(other) if Arc::ptr_eq(other, &vmm) => Some(Place::Ended),
            _ => None,
        });
        if current {
            // The helpers serve nobody any more.
            warn_of(vmm.kill().await);
            self.report(exit).await;
        }
    }

    /// Ends the VMM with SIGKILL, which the owner is not told, and leaves its place vacant. When this
    /// returns, its memory is free.
    ///
    /// # Errors
    ///
    /// If it has ended by itself, which the owner is told; or if it cannot be ended, which leaves a place
    /// that nobody may take.
    pub(super) async fn retire(&self) -> Result<(), VmmError> {
        let vmm = self.vmm("retire")?;
        let retired = self.change(|place| match place {
            Place::Taken(other) if Arc::ptr_eq(other, &vmm) => Some(Place::Vacant),
            _ => None,
        });
        if retired { vmm.kill().await } else { Err(absent("retire")) }
    }

    /// Ends a sandbox whose place is vacant, as the end of a VMM would.
    pub(super) async fn end(&self, exit: VmmExit) {
        let ended = self.change(|place| match place {
            Place::Vacant => Some(Place::Ended),
            Place::Taken(_) | Place::Ended => None,
        });
        if ended {
            self.report(exit).await;
        }
    }

    /// Resolves when the sandbox has ended. Cancel safe.
    pub(super) async fn ended(&self) {
        // We hold a sender: it cannot fail.
        let _ = self.place.subscribe().wait_for(|place| matches!(place, Place::Ended)).await;
    }

    /// Stops the virtual CPUs.
    pub(super) async fn pause(&self) -> Result<(), VmmError> {
        self.vmm("pause")?.pause().await
    }

    /// Lets the virtual CPUs run again. Does nothing if they do.
    pub(super) async fn resume(&self) -> Result<(), VmmError> {
        self.vmm("resume")?.resume().await
    }

    /// Writes memory and devices of the paused VM to the empty directory `dir`.
    pub(super) async fn snapshot(&self, dir: &Path) -> Result<(), VmmError> {
        self.vmm("snapshot")?.snapshot(dir).await
    }

    /// Ends the sandbox: its VMM with SIGKILL, and returns when it is gone; without one, at once.
    pub(super) async fn kill(&self) {
        // One that has taken the place meanwhile is meant as well.
        while let Ok(vmm) = self.vmm("kill") {
            warn_of(vmm.kill().await);
            if self.holds(&vmm) {
                return;
            }
        }
        let description = "it was killed while it had no VMM".into();
        self.end(VmmExit { expected: true, description }).await;
    }

    /// Waits at most `grace` for a guest that was told to power off, then kills the VMM.
    pub(super) async fn shutdown(&self, grace: Duration) {
        if let Ok(vmm) = self.vmm("shutdown") {
            warn_of(vmm.shutdown(grace).await);
        }
    }

    fn vmm(&self, during: &'static str) -> Result<Arc<dyn Vmm>, VmmError> {
        match &*self.place.borrow() {
            Place::Taken(vmm) => Ok(vmm.clone()),
            Place::Vacant | Place::Ended => Err(absent(during)),
        }
    }

    fn holds(&self, vmm: &Arc<dyn Vmm>) -> bool {
        matches!(&*self.place.borrow(), Place::Taken(other) if Arc::ptr_eq(other, vmm))
    }

    fn change(&self, choose: impl FnOnce(&Place) -> Option<Place>) -> bool {
        self.place.send_if_modified(|place| match choose(place) {
            Some(new) => {
                *place = new;
                true
            }
            None => false,
        })
    }

    async fn report(&self, exit: VmmExit) {
        // Fails only when the owner has ended, and the sandbox with it.
        let _ = self.owner.send(Message::VmmExited(exit)).await;
    }
}

fn absent(during: &'static str) -> VmmError {
    VmmError::Ended { during, description: "there is none any more".into() }
}

fn warn_of(result: Result<(), VmmError>) {
    if let Err(e) = result {
        warn!("cannot end the VMM: {}", chain(&e));
    }
}
