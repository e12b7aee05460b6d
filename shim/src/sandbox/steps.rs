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
        let now = Instant::now();
        let took_us = (now - self.0).as_micros();
        debug!(took_us, "{step}");
        self.0 = now;
    }
}
