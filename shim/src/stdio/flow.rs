//! Brings the streams of a sandbox to rest, and lets them flow again.
//!
//! A stream at rest has no connection to the guest, and has acknowledged what its sink has, or less. The
//! guest holds everything else, so whatever becomes of the VM meanwhile, the next OPEN goes on there.

use tokio::{sync::watch, time::Instant};

use super::sync::Logs;

/// What streams are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// Relay, on this timeline of the guest, since then.
    On { timeline: u64, since: Instant },
    /// Leave the guest alone.
    Rest,
}

/// What every stream looks at. It changes when all have to do something.
#[derive(Debug, Clone, Copy)]
struct Order {
    flow: Flow,
    /// Counts the changes.
    generation: u64,
}

/// What only those look at who wait for the streams.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    generation: u64,
    /// Streams that relay, or would.
    members: usize,
    /// Those of them that are at rest in this generation.
    rested: usize,
}

/// The switch of all streams of a sandbox. Clones mean the same streams.
#[derive(Debug, Clone)]
pub struct Flows {
    order: watch::Sender<Order>,
    tally: watch::Sender<Tally>,
    logs: Logs,
}

impl Flows {
    /// For streams of a guest that is on `timeline`, and runs.
    pub fn on(timeline: u64) -> Flows {
        let flow = Flow::On { timeline, since: Instant::now() };
        let order = watch::Sender::new(Order { flow, generation: 0 });
        Flows { order, tally: watch::Sender::new(Tally::default()), logs: Logs::default() }
    }

    /// For streams of a guest that is at rest.
    pub fn at_rest() -> Flows {
        let order = watch::Sender::new(Order { flow: Flow::Rest, generation: 0 });
        Flows { order, tally: watch::Sender::new(Tally::default()), logs: Logs::default() }
    }

    /// Asks every stream to come to rest; resolves when all of them are, or when they are told to flow
    /// again. A stream whose guest or disk does not answer takes seconds or for ever: bound it. Those that
    /// are late come to rest when they can, those that come later begin at rest. Cancel safe.
    pub async fn rest(&self) {
        let mine = self.change(|flow| if flow == Flow::Rest { None } else { Some(Flow::Rest) });
        let over = |tally: &Tally| tally.generation != mine || tally.rested == tally.members;
        // We hold a sender: it cannot fail.
        let _ = self.tally.subscribe().wait_for(over).await;
    }

    /// Lets every stream flow, on this timeline of the guest. Does nothing to those that flow on it.
    pub fn flow(&self, timeline: u64) {
        self.change(|flow| match flow {
            Flow::On { timeline: on, .. } if on == timeline => None,
            _ => Some(Flow::On { timeline, since: Instant::now() }),
        });
    }

    /// The timeline on which the streams flow; `None` while they rest.
    pub fn timeline(&self) -> Option<u64> {
        match self.order.borrow().flow {
            Flow::On { timeline, .. } => Some(timeline),
            Flow::Rest => None,
        }
    }

    /// Where the streams are logged.
    pub(super) fn logs(&self) -> &Logs {
        &self.logs
    }

    /// For one stream, from now on until it is dropped.
    pub(super) fn join(&self) -> Member {
        self.tally.send_modify(|tally| tally.members += 1);
        Member { tally: self.tally.clone(), order: self.order.subscribe(), on: None, rested_in: None }
    }

    /// For one who must know how long the streams have been flowing.
    pub(super) fn watch(&self) -> Watch {
        Watch(self.order.subscribe())
    }

    /// Gives a new order if `choose` has one; gives the generation that is then in force.
    fn change(&self, choose: impl FnOnce(Flow) -> Option<Flow>) -> u64 {
        let mut generation = 0;
        self.order.send_if_modified(|order| {
            let new = choose(order.flow);
            if let Some(flow) = new {
                *order = Order { flow, generation: order.generation + 1 };
                // Before anybody can see the order.
                self.tally.send_modify(|tally| {
                    (tally.generation, tally.rested) = (order.generation, 0);
                });
            }
            generation = order.generation;
            new.is_some()
        });
        generation
    }
}

/// One stream's end of [`Flows`].
#[derive(Debug)]
pub(super) struct Member {
    tally: watch::Sender<Tally>,
    order: watch::Receiver<Order>,
    /// The timeline on which it flows, or did before it was asked to rest.
    on: Option<u64>,
    /// The generation in which it has said that it is at rest.
    rested_in: Option<u64>,
}

impl Member {
    /// Resolves when the stream is to come to rest. Another timeline means that it was asked for rest before
    /// and has not seen it: whatever is under way belongs to a guest that is gone. Cancel safe.
    pub(super) async fn asked_to_rest(&mut self) {
        let mine = self.on;
        let rest = |order: &Order| match order.flow {
            Flow::Rest => true,
            Flow::On { timeline, .. } => Some(timeline) != mine,
        };
        if self.order.wait_for(rest).await.is_err() {
            // Nobody is left to ask.
            std::future::pending().await
        }
    }

    /// For a stream at rest: says so, and gives the timeline on which it is to flow, once it is. Cancel safe.
    pub(super) async fn flowing(&mut self) -> u64 {
        loop {
            let order = *self.order.borrow_and_update();
            match order.flow {
                Flow::On { timeline, .. } => {
                    self.on = Some(timeline);
                    return timeline;
                }
                Flow::Rest => self.rested(order.generation),
            }
            if self.order.changed().await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// For a stream that has ended: is at rest whenever it should be. Never resolves.
    pub(super) async fn idle(&mut self) {
        loop {
            self.flowing().await;
            self.asked_to_rest().await;
        }
    }

    fn rested(&mut self, generation: u64) {
        let Member { tally, rested_in, .. } = self;
        tally.send_if_modified(|tally| {
            let news = tally.generation == generation && *rested_in != Some(generation);
            if news {
                *rested_in = Some(generation);
                tally.rested += 1;
            }
            news
        });
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.tally.send_modify(|tally| {
            tally.members -= 1;
            if self.rested_in == Some(tally.generation) {
                tally.rested -= 1;
            }
        });
    }
}

/// Tells since when the streams flow.
#[derive(Debug, Clone)]
pub(super) struct Watch(watch::Receiver<Order>);

impl Watch {
    /// Resolves when the streams flow, with the time since when. Cancel safe.
    pub(super) async fn flowing(&mut self) -> Instant {
        loop {
            if let Flow::On { since, .. } = self.0.borrow_and_update().flow {
                return since;
            }
            self.changed().await;
        }
    }

    /// Resolves when the streams are to rest. Cancel safe.
    pub(super) async fn resting(&mut self) {
        while self.0.borrow_and_update().flow != Flow::Rest {
            self.changed().await;
        }
    }

    async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // Streams whose owner is gone: others see to their end.
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
        let flows = Flows::on(7);
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
        let flows = Flows::on(7);
        let mut stream = flows.join();
        assert!(timeout(SOON, flows.rest()).await.is_err());
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
        let flows = Flows::on(7);
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
