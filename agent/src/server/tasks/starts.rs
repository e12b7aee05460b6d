//! Processes that are being made or started, and how somebody else ends that.
//!
//! On its way to `execve` a process looks at files of the container, and a file system that a process of the
//! container serves may never answer. There is a limit for that in [`crate::container`]; whoever cannot wait
//! for it, because the container is to end or to come to rest, gives up what is under way.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use crate::{errors::lock, server::error::Error, stdio::ProcessId};

/// How long a start may take to come to its end by itself once every process of its container is killed.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Why the start of a process was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenUp {
    /// By a SIGKILL.
    Killed,
    /// The init process has ended.
    ContainerEnded,
    /// A Pause or Quiesce could wait no longer.
    Rest,
}

impl GivenUp {
    /// For messages: it was given up …
    pub fn reason(self) -> &'static str {
        match self {
            GivenUp::Killed => "for it was killed",
            GivenUp::ContainerEnded => "for its container has ended",
            GivenUp::Rest => "for the sandbox has to come to rest: try again once it runs",
        }
    }
}

/// All that are under way.
#[derive(Debug, Default)]
pub(super) struct Starts(Mutex<HashMap<ProcessId, oneshot::Sender<GivenUp>>>);

/// One that is under way, until this is dropped.
#[derive(Debug)]
pub(super) struct Start {
    starts: Arc<Starts>,
    process: ProcessId,
    given_up: oneshot::Receiver<GivenUp>,
}

impl Starts {
    /// To be called by whoever begins; there is one start of a process at a time.
    pub(super) fn begin(self: &Arc<Self>, process: &ProcessId) -> Start {
        let (sender, given_up) = oneshot::channel();
        lock(&self.0).insert(process.clone(), sender);
        Start { starts: self.clone(), process: process.clone(), given_up }
    }

    /// Gives up those that `which` chooses, and tells whether there were any.
    pub(super) fn give_up(&self, which: impl Fn(&ProcessId) -> bool, why: GivenUp) -> bool {
        let mut starts = lock(&self.0);
        let chosen: Vec<_> = starts.keys().filter(|process| which(process)).cloned().collect();
        for sender in chosen.iter().filter_map(|process| starts.remove(process)) {
            // It may have been done in the meantime.
            let _ = sender.send(why);
        }
        !chosen.is_empty()
    }

    /// Carries out `work`, which comes to no end before those that `which` chooses, and gives them `patience`.
    pub(super) async fn hurry<T>(
        &self,
        which: impl Fn(&ProcessId) -> bool,
        patience: Duration,
        work: impl Future<Output = T>,
    ) -> T {
        let give_up = async {
            sleep(patience).await;
            if self.give_up(which, GivenUp::Rest) {
                tracing::warn!("gave up the start of a process after {patience:?}: the sandbox has to rest");
            }
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            done = work => done,
            never = give_up => match never {},
        }
    }
}

impl Start {
    /// Carries out `work`, which is dropped if the start is given up. A program that has made its container end
    /// was started, though this process may hear of the end first.
    pub(super) async fn carry_out<T, E: Into<Error>>(
        mut self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Error> {
        tokio::pin!(work);
        let why = tokio::select! {
            done = &mut work => return done.map_err(Into::into),
            Ok(why) = &mut self.given_up => why,
        };
        if why == GivenUp::ContainerEnded
            && let Ok(Ok(started)) = timeout(END_LIMIT, work).await
        {
            return Ok(started);
        }
        Err(Error::GivenUp { process: self.process.clone(), why })
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.given_up.close();
        let mut starts = lock(&self.starts.0);
        // A later one of the same name is not this one's to remove.
        if starts.get(&self.process).is_some_and(oneshot::Sender::is_closed) {
            starts.remove(&self.process);
        }
    }
}
