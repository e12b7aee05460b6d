//! The logs of a sandbox on the disks of the host, for the moments when death of the host must not cost what
//! was acknowledged.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use futures::future::join_all;
use tokio::{task::spawn_blocking, time::timeout};

use super::{Flows, StdioError, cannot};
use crate::log::sync::sync;

/// The log directories of processes that are still there.
#[derive(Debug, Clone, Default)]
pub(super) struct Logs(Arc<Mutex<Vec<Weak<Path>>>>);

impl Logs {
    /// Adds `log`, until it is dropped.
    pub(super) fn add(&self, log: &Arc<Path>) {
        let mut logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logs.retain(|log| log.strong_count() > 0);
        logs.push(Arc::downgrade(log));
    }

    fn all(&self) -> Vec<Arc<Path>> {
        let logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logs.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Flows {
    /// Waits until the logs of all processes are on the disk. What was acknowledged to the guest is gone from
    /// it, and in no snapshot that is taken from then on; so a snapshot that is to survive the host's death
    /// needs this after [`rest`](Flows::rest), as does whoever lets go of a guest's memory. A plain pause does
    /// not.
    ///
    /// An error names the file, or the log whose disk takes longer than `limit`. Nothing has changed then, and
    /// it may be tried again.
    pub async fn sync_logs(&self, limit: Duration) -> Result<(), StdioError> {
        let synced = self.logs().all().into_iter().map(|log| async move {
            let path = log.clone();
            let hangs = |_| {
                let cause = format!("the disk has not answered for {limit:?}");
                cannot("cannot sync the log in", &log)(io::Error::new(io::ErrorKind::TimedOut, cause))
            };
            // Blocks for as long as the disk does, whoever still waits.
            let synced = timeout(limit, spawn_blocking(move || sync(&path))).await.map_err(hangs)?;
            synced
                .map_err(|e| cannot("cannot sync the log in", &log)(io::Error::other(e)))?
                .map_err(Into::into)
        });
        join_all(synced).await.into_iter().collect()
    }
}
