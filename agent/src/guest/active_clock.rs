//! A clock that stands still while the sandbox is quiesced.
//!
//! The agent runs on between Quiesce and Thaw, and after a restore the monotonic clock may jump by the
//! whole downtime. A timer that changes state is set on this clock: it can neither fire in between nor
//! have lost what was left of it.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use crate::errors::lock;

/// See the module. Runs when it is made.
#[derive(Debug)]
pub struct ActiveClock {
    state: Mutex<State>,
    /// Tells sleepers of every change, after `state` has it.
    held: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    started: Instant,
    held_since: Option<Instant>,
    /// What earlier holds have lasted.
    held_for: Duration,
}

impl ActiveClock {
    /// A clock that starts at 0 now.
    pub fn start() -> Arc<ActiveClock> {
        let state = State { started: Instant::now(), held_since: None, held_for: Duration::ZERO };
        Arc::new(ActiveClock { state: Mutex::new(state), held: watch::Sender::new(false) })
    }

    /// Stops it. Does nothing if it stands still.
    pub fn hold(&self) {
        self.state().held_since.get_or_insert_with(Instant::now);
        self.held.send_replace(true);
    }

    /// Lets it go on from where it was stopped. Does nothing if it runs.
    pub fn release(&self) {
        let mut state = self.state();
        if let Some(since) = state.held_since.take() {
            state.held_for += since.elapsed();
        }
        drop(state);
        self.held.send_replace(false);
    }

    /// Whether it stands still.
    pub fn is_held(&self) -> bool {
        self.state().held_since.is_some()
    }

    /// Resolves when it is held the next time; a hold that lasts already is not meant. Cancel safe.
    pub async fn next_hold(&self) {
        let mut held = self.held.subscribe();
        // The sender lives as long as `self`.
        while held.changed().await.is_ok() && !*held.borrow_and_update() {}
    }

    /// Resolves once it has run for `duration` from now. Cancel safe.
    pub async fn sleep(&self, duration: Duration) {
        let deadline = self.now() + duration;
        let mut held = self.held.subscribe();
        // The sender lives as long as `self`.
        while held.wait_for(|held| !held).await.is_ok() {
            let left = deadline.saturating_sub(self.now());
            if left.is_zero() {
                return;
            }
            // Looked at again however this ends: it may have been held at the last moment.
            let _ = timeout(left, held.wait_for(|held| *held)).await;
        }
    }

    /// How long it has run.
    pub fn now(&self) -> Duration {
        let state = self.state();
        let until = state.held_since.unwrap_or_else(Instant::now);
        until.duration_since(state.started).saturating_sub(state.held_for)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use tokio::time::{advance, sleep};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    async fn is_over(sleeper: &mut std::pin::Pin<Box<impl Future<Output = ()>>>) -> bool {
        timeout(Duration::ZERO, sleeper).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_sleeper_gets_what_was_left_when_the_clock_was_held() {
        let clock = ActiveClock::start();
        let mut sleeper = Box::pin(clock.sleep(2 * SECOND));
        assert!(!is_over(&mut sleeper).await);
        sleep(SECOND).await;
        clock.hold();
        // A jump, as a restore makes one: far beyond the deadline before the sleeper has even seen the hold.
        advance(3600 * SECOND).await;
        assert!(!is_over(&mut sleeper).await);
        clock.release();
        let released = Instant::now();
        sleeper.await;
        assert_eq!(released.elapsed().as_millis().div_ceil(10), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_is_seen_by_those_who_waited_before_it() {
        let clock = ActiveClock::start();
        clock.hold();
        let mut waiter = Box::pin(clock.next_hold());
        assert!(!is_over(&mut waiter).await);
        clock.release();
        assert!(!is_over(&mut waiter).await);
        clock.hold();
        assert!(is_over(&mut waiter).await);
    }

    #[tokio::test(start_paused = true)]
    async fn holds_add_up_and_repeating_one_changes_nothing() {
        let clock = ActiveClock::start();
        for _ in 0..3 {
            sleep(SECOND).await;
            clock.hold();
            sleep(SECOND).await;
            clock.hold();
            sleep(SECOND).await;
            assert!(clock.is_held());
            clock.release();
            clock.release();
        }
        assert_eq!(clock.now(), 3 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sleep_that_begins_on_a_held_clock_waits_for_its_release() {
        let clock = ActiveClock::start();
        clock.hold();
        let mut sleeper = Box::pin(clock.sleep(Duration::ZERO));
        sleep(SECOND).await;
        assert!(!is_over(&mut sleeper).await);
        clock.release();
        sleeper.await;
    }
}
