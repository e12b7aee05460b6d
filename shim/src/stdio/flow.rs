//! Brings the streams of a process to rest, and lets them flow again.
//!
//! A stream at rest has no connection to the guest, and has acknowledged exactly what its sink has. The
//! guest holds everything else, so whatever becomes of the VM meanwhile, the next OPEN goes on there.

use tokio::{sync::watch, time::Instant};

/// What streams are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// Relay, on this timeline of the guest, since then.
    On { timeline: u64, since: Instant },
    /// Leave the guest alone.
    Rest,
}

#[derive(Debug)]
struct State {
    flow: Flow,
    /// Counts the changes of `flow`.
    generation: u64,
    /// Streams that relay, or would.
    members: usize,
    /// Those of them that are at rest in this generation.
    rested: usize,
}

/// The switch of all streams of one process. Clones mean the same streams.
#[derive(Debug, Clone)]
pub struct Flows(watch::Sender<State>);

impl Flows {
    pub(super) fn new() -> Flows {
        Flows(watch::Sender::new(State { flow: Flow::Rest, generation: 0, members: 0, rested: 0 }))
    }

    /// Asks every stream to come to rest; resolves when all of them are, or when they are told to flow
    /// again. A stream whose guest or disk does not answer takes seconds or for ever: bound it. Those that
    /// are late come to rest when they can. Cancel safe.
    pub async fn rest(&self) {
        let mut mine = 0;
        self.0.send_modify(|state| {
            if state.flow != Flow::Rest {
                state.change(Flow::Rest);
            }
            mine = state.generation;
        });
        let over = |state: &State| state.generation != mine || state.rested == state.members;
        // We hold a sender: it cannot fail.
        let _ = self.0.subscribe().wait_for(over).await;
    }

    /// Lets every stream flow, on this timeline of the guest. Streams that flow on it already go on.
    pub fn flow(&self, timeline: u64) {
        self.0.send_if_modified(|state| {
            let same = matches!(state.flow, Flow::On { timeline: on, .. } if on == timeline);
            if !same {
                state.change(Flow::On { timeline, since: Instant::now() });
            }
            !same
        });
    }

    /// For one stream, from now on until it is dropped.
    pub(super) fn join(&self) -> Member {
        self.0.send_modify(|state| state.members += 1);
        Member { state: self.0.clone(), changes: self.0.subscribe(), rested_in: None }
    }

    /// For one who must know how long the streams have been flowing.
    pub(super) fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }
}

impl State {
    fn change(&mut self, flow: Flow) {
        self.flow = flow;
        self.generation += 1;
        self.rested = 0;
    }
}

/// One stream's end of [`Flows`].
#[derive(Debug)]
pub(super) struct Member {
    state: watch::Sender<State>,
    changes: watch::Receiver<State>,
    /// The generation in which it has said that it is at rest.
    rested_in: Option<u64>,
}

impl Member {
    /// Resolves when the stream is to come to rest. Cancel safe.
    pub(super) async fn asked_to_rest(&mut self) {
        // We hold a sender: it cannot fail.
        let _ = self.changes.wait_for(|state| state.flow == Flow::Rest).await;
    }

    /// For a stream at rest: says so, and gives the timeline on which it is to flow, once it is.
    pub(super) async fn flowing(&mut self) -> u64 {
        loop {
            let (flow, generation) = {
                let state = self.changes.borrow_and_update();
                (state.flow, state.generation)
            };
            match flow {
                Flow::On { timeline, .. } => return timeline,
                Flow::Rest => self.rested(generation),
            }
            let _ = self.changes.changed().await;
        }
    }

    fn rested(&mut self, generation: u64) {
        let Member { state, rested_in, .. } = self;
        state.send_if_modified(|state| {
            let news = state.generation == generation && *rested_in != Some(generation);
            if news {
                *rested_in = Some(generation);
                state.rested += 1;
            }
            news
        });
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.state.send_modify(|state| {
            state.members -= 1;
            if self.rested_in == Some(state.generation) {
                state.rested -= 1;
            }
        });
    }
}

/// Tells since when the streams flow.
#[derive(Debug, Clone)]
pub(super) struct Watch(watch::Receiver<State>);

impl Watch {
    /// Resolves when the streams flow, with the time since when. Cancel safe.
    pub(super) async fn flowing(&mut self) -> Instant {
        // Streams whose owner is gone flow no more: others see to their end.
        let Ok(state) = self.0.wait_for(|state| state.flow != Flow::Rest).await else {
            return std::future::pending().await;
        };
        match state.flow {
            Flow::On { since, .. } => since,
            Flow::Rest => Instant::now(),
        }
    }

    /// Resolves when the streams are to rest. Cancel safe.
    pub(super) async fn resting(&mut self) {
        if self.0.wait_for(|state| state.flow == Flow::Rest).await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);
    const SOON: Duration = Duration::from_millis(5);

    #[tokio::test]
    async fn all_streams_are_awaited_and_those_that_have_ended_are_not() {
        let flows = Flows::new();
        flows.flow(7);
        let (mut quick, mut slow, ended) = (flows.join(), flows.join(), flows.join());
        assert_eq!((quick.flowing().await, slow.flowing().await), (7, 7));
        assert!(timeout(SOON, flows.rest()).await.is_err());
        drop(ended);
        quick.asked_to_rest().await;
        assert!(timeout(SOON, quick.flowing()).await.is_err());
        assert!(timeout(SOON, flows.rest()).await.is_err(), "one still flows");
        slow.asked_to_rest().await;
        assert!(timeout(SOON, slow.flowing()).await.is_err());
        timeout(LIMIT, flows.rest()).await.unwrap();
        flows.flow(8);
        assert_eq!((quick.flowing().await, slow.flowing().await), (8, 8));
        assert!(timeout(SOON, flows.rest()).await.is_err(), "they flow again");
    }

    #[tokio::test]
    async fn a_stream_that_slept_through_a_change_is_not_taken_for_one_at_rest() {
        let flows = Flows::new();
        let mut stream = flows.join();
        assert!(timeout(SOON, stream.flowing()).await.is_err());
        timeout(LIMIT, flows.rest()).await.unwrap();
        // On and off again before it has looked.
        flows.flow(7);
        assert!(timeout(SOON, flows.rest()).await.is_err());
        assert!(timeout(SOON, stream.flowing()).await.is_err(), "it says that it is at rest, once more");
        timeout(LIMIT, flows.rest()).await.unwrap();
        drop(stream);
        timeout(LIMIT, flows.rest()).await.unwrap();
    }

    #[tokio::test]
    async fn who_waits_for_rest_is_released_by_the_opposite() {
        let flows = Flows::new();
        flows.flow(7);
        let _stream = flows.join();
        let resting = tokio::spawn({
            let flows = flows.clone();
            async move { flows.rest().await }
        });
        let mut watch = flows.watch();
        timeout(LIMIT, watch.resting()).await.unwrap();
        flows.flow(7);
        timeout(LIMIT, resting).await.unwrap().unwrap();
        timeout(LIMIT, watch.flowing()).await.unwrap();
    }
}
