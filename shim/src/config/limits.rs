//! The `[limits]` table: what a sandbox may take of its host.

use serde::Deserialize;

/// The `[limits]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// MiB that VMM, helpers and shim of a sandbox may take beside the memory of its VM; at least 64.
    pub memory_overhead_mib: u64,
    /// Lines for `io.max` of each sandbox's cgroup.
    pub io_max: Vec<String>,
}

/// What such a line is.
pub(super) const IO_RULE: &str = "a list of lines for io.max, a device and what it may do in a second, as in \"8:0 rbps=10485760 wiops=200\"";

impl Default for Limits {
    fn default() -> Self {
        Limits { memory_overhead_mib: 128, io_max: Vec::new() }
    }
}

impl Limits {
    /// The first of [`io_max`](Limits::io_max) that is no such line.
    pub(super) fn wrong_io(&self) -> Option<&str> {
        self.io_max.iter().find(|line| !is_io_max(line)).map(String::as_str)
    }
}

fn is_io_max(line: &str) -> bool {
    let number = |text: &str| text.parse::<u32>().is_ok();
    let mut words = line.split(' ');
    let device = words.next().and_then(|device| device.split_once(':'));
    let limits: Vec<_> = words.map(|word| word.split_once('=')).collect();
    let limit = |limit: &Option<(&str, &str)>| {
        limit.is_some_and(|(key, value)| {
            ["rbps", "wbps", "riops", "wiops"].contains(&key)
                && value.parse::<u64>().is_ok_and(|value| value > 0)
        })
    };
    device.is_some_and(|(major, minor)| number(major) && number(minor))
        && !limits.is_empty()
        && limits.iter().all(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_io_max_is_a_device_with_limits() {
        for line in ["8:0 rbps=1", "259:3 rbps=10 wbps=20 riops=30 wiops=40"] {
            assert!(is_io_max(line), "{line}");
        }
        for line in [
            "",
            "8:0",
            "8 rbps=1",
            "/dev/sda rbps=1",
            "8:0 rbps",
            "8:0 rbps=0",
            "8:0 x=1",
            "8:0  rbps=1",
            "8:0\nrbps=1",
        ] {
            assert!(!is_io_max(line), "{line:?}");
        }
    }
}
