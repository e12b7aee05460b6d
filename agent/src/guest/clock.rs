//! The guest's wall clock.

use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

/// A guest that is ahead by less keeps its time: what the host says was true when it was sent, and
/// time that goes backwards upsets programs more than time that is a little off.
const AHEAD_MAX: Duration = Duration::from_millis(100);

/// Sets CLOCK_REALTIME, clock_settime(2), to `now` since the epoch if it needs it.
pub fn set(now: Duration) -> io::Result<()> {
    let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if !is_due(ours, now) {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(now))?;
    tracing::info!(was = ?ours, is = ?now, "set the clock");
    Ok(())
}

fn is_due(ours: Duration, now: Duration) -> bool {
    ours < now || ours - now >= AHEAD_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_lags_is_set_and_one_that_is_a_little_ahead_is_not() {
        let now = Duration::from_secs(1_700_000_000);
        let millisecond = Duration::from_millis(1);
        assert!(is_due(now - millisecond, now));
        assert!(!is_due(now, now));
        assert!(!is_due(now + 99 * millisecond, now));
        assert!(is_due(now + AHEAD_MAX, now));
        assert!(is_due(Duration::ZERO, now), "a machine without a clock of its own starts in 1970");
    }
}
