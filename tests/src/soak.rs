//! One round of each experiment in `make test`, many in `make soak`, and a record of what came out.

use std::{env, fmt::Display, fs::File, io::Write, time::Duration};

/// Set by `scripts/soak`: repeat as often as it takes to see what is rare.
const SOAK: &str = "CUBE_SOAK";

/// Set by `scripts/soak`: the file that figures are appended to.
const FIGURES: &str = "CUBE_SOAK_FIGURES";

/// `soak` in `make soak`, else `once`.
pub fn rounds(once: u32, soak: u32) -> u32 {
    if is_soak() { soak } else { once }
}

/// The time that a test may take which takes `limit` in `make test`.
pub fn limit(limit: Duration) -> Duration {
    if is_soak() { limit.max(Duration::from_secs(1800)) } else { limit }
}

/// Puts a figure into the summary of `make soak`. Does nothing in `make test`.
///
/// `experiment` is a few words ("connections cut"), `figure` what was counted or measured, with its unit
/// ("bytes compared", "shim RSS after, KiB").
pub fn record(experiment: &str, figure: &str, value: impl Display) {
    let Some(path) = env::var_os(FIGURES) else { return };
    let mut file = File::options().create(true).append(true).open(path).unwrap();
    // One write, for tests run in parallel.
    file.write_all(format!("{experiment}\t{figure}\t{value}\n").as_bytes()).unwrap();
}

fn is_soak() -> bool {
    env::var_os(SOAK).is_some()
}
