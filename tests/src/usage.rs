//! What processes hold, before and after: memory and descriptors that must not grow with use.

use std::{fs, time::Duration};

use nix::unistd::Pid;

use crate::{command::poll, guest::Guest, lab::Lab, leftovers, soak};

/// How long what is given back in the background may take.
const SETTLING: Duration = Duration::from_secs(20);

/// What one process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Resident set, KiB.
    pub rss_kib: u64,
    /// Open descriptors without inotify instances, of which a shim has one from the moment on when it first
    /// waits for the reader of a FIFO; `None` in a VM, whose processes the host cannot look into.
    pub descriptors: Option<usize>,
}

impl Usage {
    /// Of a process of this host; panics if there is no such process.
    pub fn of(pid: Pid) -> Usage {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Usage {
            rss_kib: rss.trim().trim_end_matches(" kB").parse().unwrap(),
            descriptors: Some(descriptors(pid).len() - inotify_instances(pid)),
        }
    }

    /// Of the agent of container `id`.
    pub fn of_agent(lab: &Lab, id: &str) -> Usage {
        let rss_kib = Guest::of(lab, id).info().agent_rss_bytes / 1024;
        let descriptors = (!lab.backend().is_vm()).then(|| descriptors(agent(lab, id)).len());
        Usage { rss_kib, descriptors }
    }

    fn is_within(self, before: Usage, growth_kib: u64) -> bool {
        self.rss_kib <= before.rss_kib + growth_kib && self.descriptors <= before.descriptors
    }
}

/// inotify instances that a process holds; the kernel allows `fs.inotify.max_user_instances` per user.
pub fn inotify_instances(pid: Pid) -> usize {
    descriptors(pid).iter().filter(|link| link.contains("inotify")).count()
}

/// The agent of a sandbox without a VM.
fn agent(lab: &Lab, id: &str) -> Pid {
    let processes = leftovers::helpers(&lab.key(id));
    let agent = processes.iter().find(|process| process.line.contains(" process --listen ")).unwrap();
    Pid::from_raw(agent.pid)
}

fn descriptors(pid: Pid) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    entries.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string())).collect()
}

/// A process that is to be as large after an experiment as it was before.
pub struct Watched<'a> {
    name: &'static str,
    read: Box<dyn Fn() -> Usage + 'a>,
    before: Usage,
}

impl<'a> Watched<'a> {
    /// Looks at the process now. Warm it up first: pools and caches that are filled once are no leak.
    pub fn new(name: &'static str, read: impl Fn() -> Usage + 'a) -> Watched<'a> {
        let before = read();
        Watched { name, read: Box::new(read), before }
    }

    /// Panics unless the process soon has no more descriptors than before, and at most `growth_kib` more
    /// memory; puts both into the summary of `experiment`.
    #[track_caller]
    pub fn has_not_grown(&self, experiment: &str, growth_kib: u64) {
        let mut after = self.before;
        let flat = poll(SETTLING, || {
            after = (self.read)();
            after.is_within(self.before, growth_kib)
        });
        let change = |what: &str, before: &dyn std::fmt::Display, after: &dyn std::fmt::Display| {
            soak::record(experiment, &format!("{} {what}", self.name), format_args!("{before} -> {after}"));
        };
        change("RSS, KiB", &self.before.rss_kib, &after.rss_kib);
        if let (Some(before), Some(after)) = (self.before.descriptors, after.descriptors) {
            change("descriptors", &before, &after);
        }
        assert!(
            flat,
            "{} has grown by more than {growth_kib} KiB: {:?} -> {after:?}",
            self.name, self.before
        );
    }
}
