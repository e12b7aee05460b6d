//! How long the steps of something took.

use std::time::Instant;

use tracing::debug;

/// Says in the log how long each step took. `cube-bench` reads that.
pub(super) struct Steps(Instant);

impl Steps {
    /// The first step begins now.
    pub(super) fn begin() -> Steps {
        Steps(Instant::now())
    }

    /// `step` has been done since the last.
    pub(super) fn done(&mut self, step: &str) {
        self.reached(step);
        self.0 = Instant::now();
    }

    /// `step` has been done since the last that is [`done`](Steps::done), beside others.
    pub(super) fn reached(&self, step: &str) {
        let took_us = self.0.elapsed().as_micros();
        debug!(took_us, "{step}");
    }
}
