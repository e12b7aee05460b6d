//! Points in time, as users write and read them.

use std::{str::FromStr, time::Duration};

use jiff::{Span, SpanRelativeTo, Timestamp};

/// The value of `--since`, in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Since(pub(crate) u64);

/// A point in time that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("not a time: give RFC 3339 (2026-01-31T12:00:00Z), seconds since 1970, or an age (10m, 1h30m, 2d)")]
pub(crate) struct NotATime;

impl FromStr for Since {
    type Err = NotATime;

    fn from_str(text: &str) -> Result<Since, NotATime> {
        Since::parse(text, Timestamp::now())
    }
}

impl Since {
    fn parse(text: &str, now: Timestamp) -> Result<Since, NotATime> {
        let nanoseconds = if let Ok(seconds) = text.parse::<f64>() {
            // Whole nanoseconds do not fit into an f64; nobody writes them in seconds.
            Duration::try_from_secs_f64(seconds).map_err(|_| NotATime)?.as_nanos()
        } else if let Ok(time) = text.parse::<Timestamp>() {
            u128::try_from(time.as_nanosecond()).unwrap_or(0)
        } else {
            let age = text.parse::<Span>().map_err(|_| NotATime)?;
            let age = age.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| NotATime)?;
            let age = u128::try_from(age.as_nanos()).map_err(|_| NotATime)?;
            u128::try_from(now.as_nanosecond()).unwrap_or(0).saturating_sub(age)
        };
        u64::try_from(nanoseconds).map(Since).map_err(|_| NotATime)
    }
}

/// RFC 3339 in UTC, always with nine decimals, so that columns align and text sorts by time.
pub(crate) fn rfc3339(time_ns: u64) -> String {
    match Timestamp::from_nanosecond(i128::from(time_ns)) {
        Ok(time) => format!("{time:.9}"),
        Err(_) => "-".into(),
    }
}

/// A duration in the largest unit that leaves no zero.
pub(crate) fn age(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_S: u64 = 1_800_000_000;

    fn parse(text: &str) -> Option<u64> {
        let now = Timestamp::from_second(NOW_S as i64).unwrap();
        Since::parse(text, now).ok().map(|since| since.0)
    }

    #[test]
    fn a_time_may_be_given_as_rfc_3339_as_seconds_or_as_an_age() {
        let second = 1_000_000_000;
        for (text, expected) in [
            ("2027-01-15T08:00:00Z", NOW_S * second),
            ("2027-01-15T09:00:00.5+01:00", NOW_S * second + second / 2),
            ("1800000000", NOW_S * second),
            ("1800000000.25", NOW_S * second + second / 4),
            ("10m", (NOW_S - 600) * second),
            ("1h30m", (NOW_S - 5400) * second),
            ("2d", (NOW_S - 172_800) * second),
            ("500ms", NOW_S * second - second / 2),
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "yesterday", "-10m", "-1", "nan", "inf", "2027-01-15", "1e30"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn times_are_written_with_nine_decimals_in_utc() {
        assert_eq!(rfc3339(NOW_S * 1_000_000_000 + 5), "2027-01-15T08:00:00.000000005Z");
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000000Z");
    }
}
