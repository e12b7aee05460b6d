//! What a sandbox may take of its host: its VM's size, and what it takes to run that.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use super::{CgroupError, SandboxCgroup, failed};

/// Controllers that limit a sandbox.
pub(super) const LIMITING: [&str; 4] = ["memory", "cpu", "pids", "io"];

/// CPU time beyond that of the virtual CPUs, in percent of one: device threads of the VMM, virtiofsd and the shim,
/// which take most of a CPU while a container prints as fast as it can.
const CPU_OVERHEAD: u64 = 100;

/// Processes and threads: VMM, helpers, shim and the programs that take logs have some 60 together with one container.
/// More than any sandbox needs, and no fork bomb.
const PIDS: u64 = 1024;

/// Threads of the VMM for each virtual CPU.
const PIDS_PER_VCPU: u64 = 4;

/// Page tables of host and hypervisor, and the kernel's account of pages: a share of the VM's memory.
const PAGE_TABLES: u64 = 64;

/// What the processes of a sandbox may take together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Memory.
    pub memory_bytes: u64,
    /// CPU time, in percent of one CPU.
    pub cpu_percent: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Lines for `io.max`.
    pub io: Vec<String>,
}

/// What is in force of [`Limits`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limited {
    /// The cgroup that has the limits.
    pub cgroup: PathBuf,
    /// As of [`Limits`], if it is in force.
    pub memory_bytes: Option<u64>,
    /// As of [`Limits`], if it is in force.
    pub cpu_percent: Option<u64>,
    /// As of [`Limits`], if it is in force.
    pub pids: Option<u64>,
    /// As of [`Limits`], as far as they are in force.
    pub io: Vec<String>,
    /// Controllers that are not there, so that nothing limits what they would.
    pub missing: Vec<&'static str>,
}

impl Limits {
    /// For a VM of this size, whose VMM, helpers and shim take `overhead_mib` beside its memory.
    pub fn of(vcpus: u32, memory_mib: u64, overhead_mib: u64, io: &[String]) -> Limits {
        let mib = memory_mib.saturating_add(memory_mib / PAGE_TABLES).saturating_add(overhead_mib);
        Limits {
            memory_bytes: mib.saturating_mul(1 << 20),
            cpu_percent: u64::from(vcpus) * 100 + CPU_OVERHEAD,
            pids: PIDS + u64::from(vcpus) * PIDS_PER_VCPU,
            io: io.to_vec(),
        }
    }
}

impl SandboxCgroup {
    /// Limits what is in the cgroup, the shim included, as far as the host's controllers can. If it runs out of
    /// memory, all of the VM ends and the shim tells of it.
    ///
    /// # Errors
    ///
    /// What the kernel says to a limit that it does not take: an `io.max` for a device that is not there.
    pub fn limit(&self, limits: &Limits) -> Result<Limited, CgroupError> {
        let cgroup = self.sandbox().to_owned();
        let write = |file: &str, value: String| -> Result<bool, CgroupError> {
            let path = cgroup.join(file);
            // It is there if the parent hands the controller down.
            if !path.exists() {
                return Ok(false);
            }
            fs::write(&path, value).map_err(failed("cannot write", &path)).map(|()| true)
        };
        let memory = write("memory.max", limits.memory_bytes.to_string())?;
        // Per 100 ms, as the kernel has it by default.
        let cpu = write("cpu.max", format!("{} 100000", limits.cpu_percent.saturating_mul(1000)))?;
        let pids = write("pids.max", limits.pids.to_string())?;
        let io = cgroup.join("io.max").exists();
        for line in limits.io.iter().filter(|_| io) {
            write("io.max", line.clone())?;
        }
        one_fate(self.dir());
        let there = [memory, cpu, pids, io];
        Ok(Limited {
            memory_bytes: memory.then_some(limits.memory_bytes),
            cpu_percent: cpu.then_some(limits.cpu_percent),
            pids: pids.then_some(limits.pids),
            io: if io { limits.io.clone() } else { Vec::new() },
            missing: LIMITING
                .into_iter()
                .zip(there)
                .filter(|(_, there)| !there)
                .map(|(name, _)| name)
                .collect(),
            cgroup,
        })
    }
}

/// A VMM without its helpers is of no use, nor are they without it.
fn one_fate(vm: &Path) {
    let file = vm.join("memory.oom.group");
    if file.exists()
        && let Err(error) = fs::write(&file, "1")
    {
        tracing::debug!(path = %file.display(), %error, "out of memory, processes end one by one");
    }
}

/// `memory 352 MiB, cpu 200 %, pids 1028, nothing else (no controller io)`.
impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.memory_bytes.map(|bytes| format!("memory {} MiB", bytes >> 20)));
        parts.extend(self.cpu_percent.map(|percent| format!("cpu {percent} %")));
        parts.extend(self.pids.map(|pids| format!("pids {pids}")));
        parts.extend(self.io.iter().map(|line| format!("io {line}")));
        if parts.is_empty() {
            parts.push("none".into());
        }
        f.write_str(&parts.join(", "))?;
        match &self.missing[..] {
            [] => Ok(()),
            missing => write!(f, " (the host's cgroup2 has no controllers {} here)", missing.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cgroup that has the files of these controllers, with what the kernel has in them at first.
    fn fake(files: &[&str]) -> (tempfile::TempDir, SandboxCgroup) {
        let dir = tempfile::tempdir().unwrap();
        let vm = dir.path().join("vm");
        fs::create_dir(&vm).unwrap();
        for file in files {
            fs::write(dir.path().join(file), "max").unwrap();
        }
        fs::write(vm.join("memory.oom.group"), "0").unwrap();
        (dir, SandboxCgroup::at(vm))
    }

    #[test]
    fn a_vm_may_take_its_size_and_what_it_takes_to_run_it() {
        let (dir, cgroup) = fake(&["memory.max", "cpu.max", "pids.max", "io.max"]);
        let limits = Limits::of(2, 1024, 100, &["8:0 wbps=1048576".into()]);
        let limited = cgroup.limit(&limits).unwrap();
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(read("memory.max"), ((1024 + 16 + 100) << 20).to_string());
        assert_eq!(read("cpu.max"), "300000 100000");
        assert_eq!(read("pids.max"), "1032");
        assert_eq!(read("io.max"), "8:0 wbps=1048576");
        assert_eq!(read("vm/memory.oom.group"), "1");
        assert_eq!(limited.cgroup, dir.path());
        assert!(limited.missing.is_empty());
        assert_eq!(limited.to_string(), "memory 1140 MiB, cpu 300 %, pids 1032, io 8:0 wbps=1048576");
    }

    #[test]
    fn what_the_host_cannot_limit_is_said_and_nothing_is_made_in_its_place() {
        let (dir, cgroup) = fake(&["pids.max"]);
        let limited = cgroup.limit(&Limits::of(1, 256, 0, &["8:0 wbps=1".into()])).unwrap();
        assert_eq!((limited.memory_bytes, limited.cpu_percent, limited.pids), (None, None, Some(1028)));
        assert_eq!(limited.missing, ["memory", "cpu", "io"]);
        assert!(limited.to_string().contains("no controllers memory, cpu, io"), "{limited}");
        assert!(!dir.path().join("memory.max").exists() && !dir.path().join("io.max").exists());
        let (_dir, cgroup) = fake(&[]);
        let limited = cgroup.limit(&Limits::of(1, 256, 0, &[])).unwrap();
        assert!(limited.to_string().starts_with("none (the host's cgroup2 has no"), "{limited}");
    }

    #[test]
    fn a_limit_that_the_kernel_does_not_take_is_an_error_with_the_file() {
        let (dir, cgroup) = fake(&["memory.max", "cpu.max"]);
        // A directory cannot be written to.
        fs::create_dir(dir.path().join("pids.max")).unwrap();
        let error = cgroup.limit(&Limits::of(1, 256, 0, &[])).unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
    }
}
