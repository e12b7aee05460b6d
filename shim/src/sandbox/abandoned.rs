//! Tasks whose container is gone.
//!
//! While a task is being created containerd does not know it, and lets a client remove its container
//! (`ctr container rm`). From then on it takes no call for the task: nobody could start or delete it.

use std::time::Duration;

use async_trait::async_trait;
use tokio::time::sleep;
use tracing::{info, warn};

use super::{ProcessId, Sandbox, Status};
use crate::errors::chain;

/// How long a task may be created and not started before containerd is asked; clients take milliseconds.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// Longest time between two questions.
const LAST_LOOKS: Duration = Duration::from_secs(60);

/// The containers that exist.
#[async_trait]
pub trait Containers: Send + Sync {
    /// Whether there is one with this id; `None` if that cannot be known now.
    async fn has(&self, id: &str) -> Option<bool>;
}

/// Removes the task of container `id`, which has been created, if the container is removed before it is
/// started. Returns when it has been started, or is no more.
pub async fn watch(sandbox: Sandbox, id: String, containers: &dyn Containers) {
    let init = ProcessId { container: id, exec: String::new() };
    let mut look = FIRST_LOOK;
    loop {
        sleep(look).await;
        match sandbox.state(init.clone()).await {
            Ok(state) if state.status == Status::Created => {}
            _ => return,
        }
        if containers.has(&init.container).await == Some(false) {
            break;
        }
        look = (look * 2).min(LAST_LOOKS);
    }
    info!(id = init.container, "the container was removed while its task was created: the task goes as well");
    if let Err(e) = sandbox.delete(init).await {
        warn!("cannot delete a task without a container: {}", chain(&e));
    }
    // Of its last container: containerd sees the shim go, and forgets the task.
    if let Err(e) = sandbox.shutdown().await {
        warn!("{}", chain(&e));
    }
}
