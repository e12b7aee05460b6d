//! The limits of the spec, which are those of cgroup version 1, as files of version 2.

use std::{fs, io, ops::RangeInclusive, path::Path};

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

use super::controllers;
use crate::container::ContainerError;

/// A value to be written into a file of the cgroup.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    /// Where the spec says so.
    field: String,
    /// What the spec says, in its own unit: for messages.
    asked: String,
    file: String,
    value: String,
}

impl Setting {
    fn new(field: impl Into<String>, file: impl Into<String>, value: impl ToString) -> Self {
        let value = value.to_string();
        Self { field: field.into(), asked: value.clone(), file: file.into(), value }
    }

    /// With what the spec says, where version 2 says the same in another way.
    fn asked(self, asked: impl ToString) -> Self {
        Self { asked: asked.to_string(), ..self }
    }

    fn controller(&self) -> &str {
        self.file.split_once('.').map_or(self.file.as_str(), |(controller, _)| controller)
    }

    fn write(&self, cgroup: &Path) -> Result<(), ContainerError> {
        let path = cgroup.join(&self.file);
        match fs::write(&path, &self.value) {
            // A kernel without swap accounting has no limit on swap to lift.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.lifts_swap() => Ok(()),
            written => written.map_err(|source| {
                ContainerError::cgroup(
                    format!("{}: cannot write {} to", self.field, self.value),
                    path,
                    source,
                )
            }),
        }
    }

    fn lifts_swap(&self) -> bool {
        self.file == "memory.swap.max" && matches!(self.value.as_str(), "max" | "0")
    }
}

/// Checks that every limit can be expressed in version 2.
pub(crate) fn check(resources: &LinuxResources) -> Result<(), ContainerError> {
    settings(resources).map(drop)
}

/// Writes the limits into the files of `cgroup`, after checking that it has all the controllers.
pub(super) fn apply(cgroup: &Path, resources: &LinuxResources) -> Result<(), ContainerError> {
    let settings = settings(resources)?;
    if let Some(cpu) = resources.cpu() {
        tell_of_missing("linux.resources.cpu.cpus", cpu.cpus(), "cpu");
        tell_of_missing("linux.resources.cpu.mems", cpu.mems(), "node");
    }
    let available = controllers(cgroup)
        .map_err(|source| ContainerError::cgroup("cannot list the controllers of", cgroup, source))?;
    let has = |setting: &Setting| available.iter().any(|name| name == setting.controller());
    if let Some(setting) = settings.iter().find(|setting| !has(setting)) {
        let reason =
            format!("the {} controller is not available in {}", setting.controller(), cgroup.display());
        return Err(ContainerError::invalid(&setting.field, &setting.asked, reason));
    }
    settings.iter().try_for_each(|setting| setting.write(cgroup))
}

fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, ContainerError> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        add_memory(&mut settings, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        add_cpu(&mut settings, cpu)?;
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        settings.push(Setting::new("linux.resources.pids.limit", "pids.max", or_max(limit)).asked(limit));
    }
    if let Some(block_io) = resources.block_io() {
        add_block_io(&mut settings, block_io)?;
    }
    for (index, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        settings.push(hugepages(index, limit)?);
    }
    // Last, as they are the most specific.
    for (file, value) in resources.unified().iter().flatten() {
        settings.push(unified(file, value)?);
    }
    Ok(settings)
}

/// The spec writes "no limit" as a negative number.
fn or_max(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

fn refuse(field: &str, set: bool) -> Result<(), ContainerError> {
    if set { Err(ContainerError::unsupported(format!("linux.resources.{field}"))) } else { Ok(()) }
}

fn add_memory(settings: &mut Vec<Setting>, memory: &LinuxMemory) -> Result<(), ContainerError> {
    refuse("memory.kernel", memory.kernel().is_some_and(|limit| limit != 0))?;
    refuse("memory.kernelTCP", memory.kernel_tcp().is_some_and(|limit| limit != 0))?;
    refuse("memory.swappiness", memory.swappiness().is_some())?;
    refuse("memory.disableOOMKiller", memory.disable_oom_killer() == Some(true))?;
    refuse("memory.useHierarchy", memory.use_hierarchy() == Some(false))?;
    refuse("memory.checkBeforeUpdate", memory.check_before_update() == Some(true))?;
    let limit = memory.limit().unwrap_or(0);
    if let Some(swap) = swap(limit, memory.swap().unwrap_or(0))? {
        let (field, asked) = match memory.swap().unwrap_or(0) {
            // Lifted along with the limit on memory.
            0 => ("linux.resources.memory.limit", limit),
            both => ("linux.resources.memory.swap", both),
        };
        settings.push(Setting::new(field, "memory.swap.max", swap).asked(asked));
    }
    if limit != 0 {
        settings.push(Setting::new("linux.resources.memory.limit", "memory.max", or_max(limit)).asked(limit));
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        let setting = Setting::new("linux.resources.memory.reservation", "memory.low", or_max(low));
        settings.push(setting.asked(low));
    }
    Ok(())
}

/// The spec's limit on swap is on memory and swap together, version 2's is on swap alone.
fn swap(memory: i64, both: i64) -> Result<Option<String>, ContainerError> {
    let invalid = |reason| Err(ContainerError::invalid("linux.resources.memory.swap", both, reason));
    match (memory, both) {
        (..0, 0) | (_, ..0) => Ok(Some("max".into())),
        (_, 0) => Ok(None),
        (..=0, _) => invalid("it is a limit on memory and swap together, and needs memory.limit"),
        (memory, both) if both < memory => {
            invalid("it is a limit on memory and swap together, and must not be below memory.limit")
        }
        (memory, both) => Ok(Some((both - memory).to_string())),
    }
}

fn add_cpu(settings: &mut Vec<Setting>, cpu: &LinuxCpu) -> Result<(), ContainerError> {
    refuse("cpu.realtimeRuntime", cpu.realtime_runtime().is_some_and(|runtime| runtime != 0))?;
    refuse("cpu.realtimePeriod", cpu.realtime_period().is_some_and(|period| period != 0))?;
    const DEFAULT_PERIOD_US: u64 = 100_000;
    // What every cgroup of version 1 begins with, and what `ctr run` writes into each spec: nothing is
    // asked for, and a host without the controller has nothing to refuse.
    const DEFAULT_SHARES: u64 = 1024;
    if let Some(shares) = cpu.shares().filter(|shares| ![0, DEFAULT_SHARES].contains(shares)) {
        let setting = Setting::new("linux.resources.cpu.shares", "cpu.weight", weight_of_shares(shares));
        settings.push(setting.asked(shares));
    }
    let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
    if quota != 0 || period != 0 {
        let (field, asked) = match quota {
            0 => ("linux.resources.cpu.period", period.to_string()),
            quota => ("linux.resources.cpu.quota", quota.to_string()),
        };
        let quota = if quota > 0 { quota.to_string() } else { "max".into() };
        let period = if period == 0 { DEFAULT_PERIOD_US } else { period };
        settings.push(Setting::new(field, "cpu.max", format!("{quota} {period}")).asked(asked));
    }
    if let Some(burst) = cpu.burst() {
        settings.push(Setting::new("linux.resources.cpu.burst", "cpu.max.burst", burst));
    }
    if let Some(idle) = cpu.idle() {
        settings.push(Setting::new("linux.resources.cpu.idle", "cpu.idle", idle));
    }
    for (field, file, list, kind) in [
        ("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus(), "cpu"),
        ("linux.resources.cpu.mems", "cpuset.mems", cpu.mems(), "node"),
    ] {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            let has = of_guest(field, list, &online(kind))?;
            if !has.is_empty() {
                settings.push(Setting::new(field, file, has).asked(list));
            }
        }
    }
    Ok(())
}

/// Maps shares, 2 to 262144, onto weights, 1 to 10000, linearly, as the OCI runtimes and systemd do.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// Maps version 1's block weights, 10 to 1000, onto weights, 1 to 10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990
}

fn add_block_io(settings: &mut Vec<Setting>, block_io: &LinuxBlockIo) -> Result<(), ContainerError> {
    refuse("blockIO.leafWeight", block_io.leaf_weight().is_some_and(|weight| weight != 0))?;
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        let value = format!("default {}", io_weight(weight));
        settings.push(Setting::new("linux.resources.blockIO.weight", "io.weight", value).asked(weight));
    }
    // Numbers of the host's devices, which mean other devices here, or none.
    let throttle =
        |devices: &Option<Vec<LinuxThrottleDevice>>| devices.as_ref().is_some_and(|d| !d.is_empty());
    for (field, set) in [
        ("weightDevice", block_io.weight_device().as_ref().is_some_and(|devices| !devices.is_empty())),
        ("throttleReadBpsDevice", throttle(block_io.throttle_read_bps_device())),
        ("throttleWriteBpsDevice", throttle(block_io.throttle_write_bps_device())),
        ("throttleReadIOPSDevice", throttle(block_io.throttle_read_iops_device())),
        ("throttleWriteIOPSDevice", throttle(block_io.throttle_write_iops_device())),
    ] {
        if set {
            return Err(ContainerError::Unsupported {
                field: format!("linux.resources.blockIO.{field}"),
                hint: Some("it names devices of the host by their numbers, and the guest has others"),
            });
        }
    }
    Ok(())
}

/// What of a list of CPUs or memory nodes, of the host's numbers, the guest has: it may be less than all, and
/// nothing. The guest's processors are not pinned to those of the host that have their numbers.
fn of_guest(field: &str, list: &str, online: &str) -> Result<String, ContainerError> {
    let reason = "it must be a list of numbers and ranges, like 0-3,8";
    let wanted = ranges(list).ok_or_else(|| ContainerError::invalid(field, list, reason))?;
    let there = ranges(online).unwrap_or_default();
    let both = wanted.iter().flat_map(|wanted| {
        there.iter().map(move |there| (*wanted.start().max(there.start()), *wanted.end().min(there.end())))
    });
    let both = both.filter(|(first, last)| first <= last);
    let both: Vec<String> = both.map(|(first, last)| format!("{first}-{last}")).collect();
    Ok(both.join(","))
}

/// A list as cpuset.cpus has it.
fn ranges(list: &str) -> Option<Vec<RangeInclusive<u32>>> {
    let number = |text: &str| text.trim().parse::<u32>().ok();
    let parts = list.trim().split(',').filter(|part| !part.trim().is_empty());
    let range = |part: &str| match part.split_once('-') {
        None => number(part).map(|only| only..=only),
        Some((first, last)) => Some(number(first)?..=number(last)?).filter(|range| !range.is_empty()),
    };
    parts.map(range).collect()
}

fn tell_of_missing(field: &str, list: &Option<String>, kind: &str) {
    let count = |list: &str| {
        let ranges = ranges(list).unwrap_or_default();
        ranges.iter().map(|range| u64::from(range.end() - range.start()) + 1).sum::<u64>()
    };
    let Some(list) = list.as_deref().filter(|list| !list.is_empty()) else { return };
    let online = online(kind);
    if of_guest(field, list, &online).is_ok_and(|has| count(&has) < count(list)) {
        log::warn!("{field} is {list:?}: the guest has {} only, and the rest is left out", online.trim());
    }
}

/// What the guest has; node and processor 0 are everywhere.
fn online(kind: &str) -> String {
    fs::read_to_string(format!("/sys/devices/system/{kind}/online")).unwrap_or_else(|_| "0".into())
}

fn hugepages(index: usize, limit: &LinuxHugepageLimit) -> Result<Setting, ContainerError> {
    let (field, size) = (format!("linux.resources.hugepageLimits[{index}]"), limit.page_size());
    if !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(ContainerError::invalid(format!("{field}.pageSize"), size, "it must be like 2MB"));
    }
    let setting = Setting::new(field, format!("hugetlb.{size}.max"), or_max(limit.limit()));
    Ok(setting.asked(limit.limit()))
}

fn unified(file: &str, value: &str) -> Result<Setting, ContainerError> {
    let field = format!("linux.resources.unified[{file:?}]");
    if file.contains('/') || !file.contains('.') {
        return Err(ContainerError::invalid(field, value, "the name must be that of a controller's file"));
    }
    if file.starts_with("cgroup.") {
        return Err(ContainerError::Unsupported {
            field,
            hint: Some("only files of controllers can be set"),
        });
    }
    Ok(Setting::new(field, file, value))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn written(resources: Value) -> Result<Vec<String>, String> {
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();
        let settings = settings(&resources).map_err(|error| error.to_string())?;
        Ok(settings.iter().map(|setting| format!("{}={}", setting.file, setting.value)).collect())
    }

    #[test]
    fn swap_alone_is_what_both_together_leave_beyond_memory() {
        let both = json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500}});
        assert_eq!(written(both).unwrap(), ["memory.swap.max=500", "memory.max=1000", "memory.low=500"]);
        assert_eq!(
            written(json!({"memory": {"limit": 10, "swap": -1}})).unwrap(),
            ["memory.swap.max=max", "memory.max=10"]
        );
        assert_eq!(
            written(json!({"memory": {"limit": -1}})).unwrap(),
            ["memory.swap.max=max", "memory.max=max"]
        );
        assert!(
            written(json!({"memory": {"limit": 1000, "swap": 999}})).unwrap_err().contains("memory.swap")
        );
        assert!(written(json!({"memory": {"swap": 999}})).unwrap_err().contains("memory.swap"));
    }

    #[test]
    fn cpu_limits_become_weight_and_max() {
        assert_eq!(written(json!({"cpu": {"shares": 2}})).unwrap(), ["cpu.weight=1"]);
        assert_eq!(written(json!({"cpu": {"shares": 512}})).unwrap(), ["cpu.weight=20"]);
        assert_eq!(written(json!({"cpu": {"shares": 1024}})).unwrap(), [""; 0]);
        assert_eq!(written(json!({"cpu": {"shares": 262144}})).unwrap(), ["cpu.weight=10000"]);
        assert_eq!(written(json!({"cpu": {"quota": 50000}})).unwrap(), ["cpu.max=50000 100000"]);
        assert_eq!(written(json!({"cpu": {"quota": -1, "period": 20000}})).unwrap(), ["cpu.max=max 20000"]);
        assert_eq!(written(json!({"cpu": {"cpus": "0", "mems": ""}})).unwrap(), ["cpuset.cpus=0-0"]);
    }

    #[test]
    fn zero_means_that_nothing_is_asked_for() {
        let zeros = json!({"memory": {"limit": 0, "kernel": 0}, "cpu": {"shares": 0, "quota": 0}, "pids": {"limit": 0}});
        assert_eq!(written(zeros).unwrap(), [""; 0]);
    }

    #[test]
    fn processors_and_nodes_that_the_guest_does_not_have_are_left_out() {
        let of = |list: &str| of_guest("f", list, "0-1\n").unwrap();
        assert_eq!(
            (of("0-1"), of("1"), of("0,8-15"), of("0-127")),
            ("0-1".into(), "1-1".into(), "0-0".into(), "0-1".into())
        );
        assert_eq!((of("4-5"), of("77")), (String::new(), String::new()));
        for wrong in ["0-", "a", "3-1", "-1", "0-4294967296"] {
            let error = of_guest("linux.resources.cpu.cpus", wrong, "0").unwrap_err().to_string();
            assert!(error.contains("linux.resources.cpu.cpus"), "{error}");
        }
        assert_eq!(written(json!({"cpu": {"cpus": "60000-60001", "mems": "60000"}})).unwrap(), [""; 0]);
    }

    #[test]
    fn limits_of_devices_by_the_hosts_numbers_are_refused_by_the_fields_name() {
        let device = json!([{"major": 8, "minor": 16, "rate": 4096}]);
        for field in [
            "throttleReadBpsDevice",
            "throttleWriteBpsDevice",
            "throttleReadIOPSDevice",
            "throttleWriteIOPSDevice",
        ] {
            let error = written(json!({"blockIO": {field: device}})).unwrap_err();
            assert!(error.contains(&format!("linux.resources.blockIO.{field}")), "{error}");
            assert_eq!(written(json!({"blockIO": {field: []}})).unwrap(), [""; 0]);
        }
        let weights = json!({"blockIO": {"weightDevice": [{"major": 8, "minor": 16, "weight": 100}]}});
        assert!(written(weights).unwrap_err().contains("blockIO.weightDevice"));
    }

    #[test]
    fn block_weights_and_huge_page_limits_become_files() {
        let resources = json!({
            "blockIO": {"weight": 1000},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
        });
        let expected = ["io.weight=default 10000", "hugetlb.2MB.max=4194304"];
        assert_eq!(written(resources).unwrap(), expected);
        assert!(written(json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]})).is_err());
    }

    #[test]
    fn unified_reaches_controllers_only() {
        assert_eq!(written(json!({"unified": {"memory.high": "1M"}})).unwrap(), ["memory.high=1M"]);
        for file in ["../memory.max", "cgroup.freeze", "memory"] {
            assert!(written(json!({"unified": {file: "1"}})).is_err(), "{file}");
        }
    }

    #[test]
    fn a_missing_controller_is_named_and_nothing_is_written() {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        let resources: LinuxResources =
            serde_json::from_value(json!({"pids": {"limit": 5}, "memory": {"limit": 4096}})).unwrap();
        let error = apply(cgroup.path(), &resources).unwrap_err().to_string();
        assert!(error.contains("linux.resources.memory.limit"), "{error}");
        assert!(error.contains("the memory controller is not available in"), "{error}");
        assert!(!cgroup.path().join("pids.max").exists());
    }

    #[test]
    fn a_refusal_names_what_was_asked_for_and_not_what_it_becomes() {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join("cgroup.controllers"), "pids\n").unwrap();
        for (resources, asked) in [
            (json!({"cpu": {"shares": 512}}), "\"512\""),
            (json!({"cpu": {"quota": 50000}}), "\"50000\""),
            (json!({"memory": {"limit": -1}}), "\"-1\""),
            (json!({"blockIO": {"weight": 300}}), "\"300\""),
        ] {
            let resources: LinuxResources = serde_json::from_value(resources).unwrap();
            let error = apply(cgroup.path(), &resources).unwrap_err().to_string();
            assert!(error.contains(asked), "{error}");
        }
    }
}
