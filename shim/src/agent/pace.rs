//! How fast the guest may tell what happens in it.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Time that one event, or one answer, costs: a thousand of them a second are more than any host's
/// containers exit.
const COST: Duration = Duration::from_millis(1);

/// What may come at once, after a time with less.
const BURST: Duration = Duration::from_secs(4);

/// Adds up what the guest has caused, and makes it wait where that is too much. Nothing is dropped.
#[derive(Debug)]
pub(super) struct Pace {
    /// The time up to which everything so far is paid for.
    paid: Instant,
}

impl Pace {
    pub(super) fn new() -> Pace {
        Pace { paid: earliest(Instant::now()) }
    }

    /// Charges for `units` events or answers, and waits until the guest may go on.
    pub(super) async fn charge(&mut self, units: u32) {
        self.paid = self.paid.max(earliest(Instant::now())) + COST * units;
        sleep_until(self.paid).await;
    }
}

fn earliest(now: Instant) -> Instant {
    // The clock begins with the host.
    now.checked_sub(BURST).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_is_free_and_what_follows_it_takes_its_time() {
        let begun = Instant::now();
        let mut pace = Pace::new();
        for _ in 0..39 {
            pace.charge(100).await;
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        for _ in 0..4 {
            pace.charge(100).await;
        }
        assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
    }
}
