//! Statistics, in containerd's message for cgroup version 2, from whatever files there are.

use std::{collections::HashMap, fs, io, path::Path};

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;

use super::is_gone;
use crate::container::ContainerError;

/// Reads the figures of a cgroup. What a missing controller would tell is an empty message, never an absent
/// one: clients read its fields without looking whether it is there.
pub(super) fn metrics(cgroup: &Path) -> Result<Metrics, ContainerError> {
    let files = Files(cgroup);
    Ok(Metrics {
        pids: present(pids(&files)?),
        cpu: present(cpu(&files)?),
        memory: present(memory(&files)?),
        memory_events: present(memory_events(&files)?),
        io: present(io_stat(&files)?),
        rdma: present(None),
        hugetlb: hugetlb(&files)?,
        ..Metrics::default()
    })
}

fn present<T: Default>(figures: Option<T>) -> MessageField<T> {
    MessageField::some(figures.unwrap_or_default())
}

struct Files<'a>(&'a Path);

impl Files<'_> {
    /// The text of a file, or `None` if there is no such file.
    fn text(&self, name: &str) -> Result<Option<String>, ContainerError> {
        let path = self.0.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::Unsupported => Ok(None),
            Err(source) => Err(ContainerError::cgroup("cannot read", path, source)),
        }
    }

    /// A file with one number; "max" is the largest.
    fn number(&self, name: &str) -> Result<Option<u64>, ContainerError> {
        Ok(self.text(name)?.map(|text| match text.trim() {
            "max" => u64::MAX,
            number => number.parse().unwrap_or(0),
        }))
    }
}

/// A field of a file with lines `name value`.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name)?.1.trim().parse().ok()
}

fn table(text: &str) -> HashMap<&str, u64> {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.filter_map(|(key, value)| Some((key, value.trim().parse().ok()?))).collect()
}

fn pids(files: &Files<'_>) -> Result<Option<PidsStat>, ContainerError> {
    let Some(current) = files.number("pids.current")? else { return Ok(None) };
    let limit = files.number("pids.max")?.unwrap_or(u64::MAX);
    // As containerd's own shim has it: no limit is 0.
    let limit = if limit == u64::MAX { 0 } else { limit };
    Ok(Some(PidsStat { current, limit, ..PidsStat::default() }))
}

fn cpu(files: &Files<'_>) -> Result<Option<CPUStat>, ContainerError> {
    let Some(text) = files.text("cpu.stat")? else { return Ok(None) };
    let table = table(&text);
    let get = |name| table.get(name).copied().unwrap_or(0);
    Ok(Some(CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        ..CPUStat::default()
    }))
}

fn memory(files: &Files<'_>) -> Result<Option<MemoryStat>, ContainerError> {
    let Some(text) = files.text("memory.stat")? else { return Ok(None) };
    let table = table(&text);
    let get = |name| table.get(name).copied().unwrap_or(0);
    Ok(Some(MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault"),
        workingset_activate: get("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: files.number("memory.current")?.unwrap_or(0),
        usage_limit: files.number("memory.max")?.unwrap_or(u64::MAX),
        swap_usage: files.number("memory.swap.current")?.unwrap_or(0),
        swap_limit: files.number("memory.swap.max")?.unwrap_or(0),
        ..MemoryStat::default()
    }))
}

fn memory_events(files: &Files<'_>) -> Result<Option<MemoryEvents>, ContainerError> {
    let Some(text) = files.text("memory.events")? else { return Ok(None) };
    let table = table(&text);
    let get = |name| table.get(name).copied().unwrap_or(0);
    Ok(Some(MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        ..MemoryEvents::default()
    }))
}

fn io_stat(files: &Files<'_>) -> Result<Option<IOStat>, ContainerError> {
    let Some(text) = files.text("io.stat")? else { return Ok(None) };
    let usage = text.lines().filter_map(io_entry).collect();
    Ok(Some(IOStat { usage, ..IOStat::default() }))
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`
fn io_entry(line: &str) -> Option<IOEntry> {
    let (device, values) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IOEntry::default() };
    for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => entry.rbytes = value,
            "wbytes" => entry.wbytes = value,
            "rios" => entry.rios = value,
            "wios" => entry.wios = value,
            _ => {}
        }
    }
    Some(entry)
}

fn hugetlb(files: &Files<'_>) -> Result<Vec<HugeTlbStat>, ContainerError> {
    let entries =
        fs::read_dir(files.0).map_err(|source| ContainerError::cgroup("cannot list", files.0, source))?;
    let mut found = Vec::new();
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let size = name.strip_prefix("hugetlb.").and_then(|rest| rest.strip_suffix(".current"));
        let Some(size) = size.filter(|size| !size.contains('.')) else { continue };
        found.push(HugeTlbStat {
            current: files.number(&name)?.unwrap_or(0),
            max: files.number(&format!("hugetlb.{size}.max"))?.unwrap_or(u64::MAX),
            pagesize: size.to_owned(),
            ..HugeTlbStat::default()
        });
    }
    found.sort_by(|a, b| a.pagesize.cmp(&b.pagesize));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_from_the_files_that_exist_and_the_others_are_empty_not_absent() {
        let cgroup = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("io.stat", "254:0 rbytes=4096 wbytes=8 rios=1 wios=2 dbytes=0 dios=0\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.rsvd.current", "9\n"),
        ] {
            fs::write(cgroup.path().join(name), text).unwrap();
        }
        let metrics = metrics(cgroup.path()).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 30);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        assert_eq!((metrics.io.usage[0].major, metrics.io.usage[0].wios), (254, 2));
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(metrics.hugetlb.len(), 1);
        assert!(metrics.memory.is_some() && metrics.rdma.is_some(), "{metrics:?}");
        assert_eq!(metrics.memory.usage, 0);
    }
}
