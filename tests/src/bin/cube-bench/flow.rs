//! A file that grows, watched from the outside: the same way whoever writes it.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::unistd::Pid;

use crate::cost::{GIB, MIB, cpu_time_of, resident};

/// Longest time without growth.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the file is looked at, and memory with it.
const LOOK: Duration = Duration::from_millis(2);

/// Bytes on their way into a file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flow {
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
    pub(crate) cpu: Duration,
    /// What the CPU time was used for.
    pub(crate) cpu_bytes: u64,
    /// Most resident memory of each process that was watched, in bytes.
    pub(crate) peaks: Vec<u64>,
}

impl Flow {
    /// Watches `file` from its first byte until it has `total`, and what `pids` use meanwhile. Getting
    /// started does not count.
    pub(crate) fn watch(file: &Path, total: u64, pids: &[Pid]) -> Flow {
        let mut last = (length(file), Instant::now());
        let mut begin = None;
        let mut peaks = vec![0; pids.len()];
        loop {
            let (now, len) = (Instant::now(), length(file));
            if len > last.0 {
                last = (len, now);
            }
            let (start, first, cpu) = match begin {
                Some(begin) => begin,
                None if len == 0 => {
                    assert!(last.1.elapsed() < PATIENCE, "nothing comes to {}", file.display());
                    thread::sleep(LOOK / 10);
                    continue;
                }
                None => *begin.insert((now, len, cpu_time_of(pids))),
            };
            if len >= total {
                assert_eq!(len, total, "length of {}", file.display());
                let cpu = cpu_time_of(pids) - cpu;
                return Flow { bytes: len - first, took: now - start, cpu, cpu_bytes: len - first, peaks };
            }
            assert!(last.1.elapsed() < PATIENCE, "{} stopped at {len} of {total} bytes", file.display());
            for (peak, pid) in peaks.iter_mut().zip(pids) {
                *peak = resident(*pid).max(*peak);
            }
            thread::sleep(LOOK);
        }
    }

    /// MiB per second.
    pub(crate) fn rate(&self) -> f64 {
        self.bytes as f64 / MIB / self.took.as_secs_f64()
    }

    /// Milliseconds of CPU time per GiB.
    pub(crate) fn cpu_per_gib(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e3 / (self.cpu_bytes as f64 / GIB)
    }
}

fn length(file: &Path) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.len())
}
