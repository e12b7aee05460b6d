//! See [`crate::stdio::fork`].

use std::{io, sync::Arc};

use super::Output;
use crate::{guest::active_clock::ActiveClock, stdio::pool::Pool};

impl Output {
    /// A copy without connections, whose source is to be attached.
    pub(in crate::stdio) fn fork(
        &self,
        pool: &Arc<Pool>,
        clock: &Arc<ActiveClock>,
    ) -> io::Result<Arc<Output>> {
        let fork = Output::new(self.epoch, self.policy, Arc::clone(pool), Arc::clone(clock));
        let (ours, mut theirs) = (self.state(), fork.state());
        theirs.ring = ours.ring.fork(Arc::clone(pool))?;
        theirs.phase = ours.phase;
        theirs.acked = ours.acked;
        theirs.losses = ours.losses.clone();
        theirs.sessions = ours.sessions.fork();
        drop(theirs);
        Ok(fork)
    }
}
