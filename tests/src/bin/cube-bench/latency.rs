//! How long after its write a line is in the log file.

use std::{fs::File, os::unix::fs::FileExt, thread, time::Duration};

use cube_tests::{lab::Lab, needs::Backend};
use nix::time::{ClockId, clock_gettime};

use crate::table::{Samples, Table};

const ROUNDS: usize = 3;
const LINES: usize = 1000;
/// Between two lines, in microseconds.
const PAUSE: usize = 2000;
/// How often the file is looked at. A part of what is measured.
const LOOK: Duration = Duration::from_micros(50);

/// Only where the process has the host's clock.
pub(crate) fn measure(table: &mut Table) {
    table.group("log line latency, write in the process to visible in the file, a line every 2 ms");
    let lab = Lab::new(Backend::Process);
    let [mut median, mut p99, mut worst] = [const { Samples::new() }; 3];
    for _ in 0..ROUNDS {
        let delays = delays(&lab);
        median.push(delays.median());
        p99.push(delays.quantile(0.99));
        worst.push(delays.quantile(1.0));
    }
    table.add("p50", "ms", median);
    table.add("p99", "ms", p99).at_most(2.0);
    table.add("worst", "ms", worst);
}

fn delays(lab: &Lab) -> Samples {
    lab.detached("c", &["cube-test-writer", "lines", &LINES.to_string(), &PAUSE.to_string()]);
    let file = File::open(lab.log_dir("c").join("stdout")).unwrap();
    let (mut buffer, mut text, mut at) = ([0; 65536], Vec::new(), 0);
    let mut delays = Vec::new();
    // What was written before we began to look says nothing.
    let begin = now();
    while delays.len() < LINES {
        let len = file.read_at(&mut buffer, at).unwrap();
        if len == 0 {
            thread::sleep(LOOK);
            continue;
        }
        let seen = now();
        at += len as u64;
        text.extend_from_slice(&buffer[..len]);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let written: u64 = std::str::from_utf8(&line).unwrap().trim().parse().unwrap();
            delays.push((written >= begin).then(|| (seen - written) as f64 / 1e6));
        }
    }
    lab.remove("c");
    std::fs::remove_dir_all(lab.log_dir("c")).unwrap();
    delays.into_iter().flatten().collect()
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
