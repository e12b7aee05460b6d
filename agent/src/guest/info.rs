//! Figures about the guest, from /proc.

use std::{fs, io};

/// Memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Resident set of the agent.
    pub agent_rss: u64,
    /// MemTotal of proc_meminfo(5).
    pub total: u64,
    /// MemAvailable of proc_meminfo(5).
    pub available: u64,
}

/// Reads them.
pub fn memory() -> io::Result<Memory> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let field =
        |name| field(&meminfo, name).ok_or_else(|| io::Error::other(format!("no {name} in /proc/meminfo")));
    Ok(Memory { agent_rss: agent_rss()?, total: field("MemTotal")?, available: field("MemAvailable")? })
}

fn agent_rss() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    field(&status, "VmRSS").ok_or_else(|| io::Error::other("no VmRSS in /proc/self/status"))
}

/// The value of a line "Name:   123 kB", in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_this_process_are_plausible() {
        let memory = memory().unwrap();
        assert!(memory.agent_rss > 100 * 1024 && memory.agent_rss < memory.total, "{memory:?}");
        assert!(memory.available <= memory.total, "{memory:?}");
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        assert_eq!(field("MemTotalX: 1 kB\nMemTotal:  2 kB\n", "MemTotal"), Some(2048));
        assert_eq!(field("MemTotal: many kB", "MemTotal"), None);
    }
}
