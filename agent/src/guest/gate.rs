//! The fence in front of calls that change state.

use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// Lets calls through until it is closed.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<RwLock<()>>);

/// Held by a call for as long as it changes something.
#[derive(Debug)]
#[must_use]
pub struct Pass {
    _guard: OwnedRwLockReadGuard<()>,
}

/// The gate is closed until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Closed {
    _guard: OwnedRwLockWriteGuard<()>,
}

impl Gate {
    /// Lets a call through; `None` from the moment on that somebody closes the gate. Never waits.
    pub fn pass(&self) -> Option<Pass> {
        // tokio's lock is fair: it fails as soon as a writer waits.
        self.0.clone().try_read_owned().ok().map(|guard| Pass { _guard: guard })
    }

    /// Lets nobody through from now on, and waits for those that are inside. Cancel safe: the gate is
    /// open again if this is given up.
    pub async fn close(&self) -> Closed {
        Closed { _guard: self.0.clone().write_owned().await }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::pin, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn nobody_gets_in_from_the_moment_that_the_gate_is_being_closed() {
        let gate = Gate::default();
        let (first, second) = (gate.pass().unwrap(), gate.pass().unwrap());
        let mut closing = pin!(gate.close());
        for inside in [first, second] {
            assert!(timeout(Duration::ZERO, closing.as_mut()).await.is_err(), "somebody is inside");
            assert!(gate.pass().is_none());
            drop(inside);
        }
        let closed = closing.await;
        assert!(gate.pass().is_none());
        drop(closed);
        assert!(gate.pass().is_some());
    }

    #[tokio::test]
    async fn a_close_that_is_given_up_leaves_the_gate_open() {
        let gate = Gate::default();
        let inside = gate.pass().unwrap();
        let closing: std::pin::Pin<Box<dyn Future<Output = Closed>>> = Box::pin(gate.close());
        assert!(timeout(Duration::from_millis(1), closing).await.is_err());
        assert!(gate.pass().is_some());
        drop(inside);
    }
}
