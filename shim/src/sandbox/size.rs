//! How large a sandbox's VM is.
//!
//! In this order: the annotations `cube.sandbox.vcpus` and `cube.sandbox.memory_mib`; the limits of
//! the whole pod, which CRI writes into annotations of the sandbox container; the limits of the
//! spec; the configuration. A memory limit is what the container may use, so the guest's kernel and
//! agent get [`GUEST_OVERHEAD_MIB`] on top of it. A CPU limit is rounded up to whole virtual CPUs.

use serde_json::Value;

use crate::{annotations::Annotations, config};

/// MiB of a VM that its containers cannot use: kernel, page tables, agent and retention rings.
pub const GUEST_OVERHEAD_MIB: u64 = 96;

/// Most virtual CPUs that [`crate::vmm::VmSpec`] takes.
const VCPUS_MAX: u64 = 255;

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// 1 to 255.
    pub vcpus: u32,
    /// At least 64.
    pub memory_mib: u64,
}

/// The size for the sandbox whose first container has `spec`.
pub fn of(spec: &Value, annotations: &Annotations, defaults: &config::Vm) -> VmSize {
    let limits = Limits::of_pod(spec).or(Limits::of_container(spec));
    VmSize {
        vcpus: annotations.vcpus.or(limits.vcpus()).unwrap_or(defaults.vcpus),
        memory_mib: annotations.memory_mib.or(limits.memory_mib()).unwrap_or(defaults.memory_mib),
    }
}

/// Positive numbers only: 0 and -1 mean "no limit" in cgroups and in CRI.
#[derive(Default)]
struct Limits {
    cpu_quota: Option<u64>,
    cpu_period: Option<u64>,
    memory: Option<u64>,
}

impl Limits {
    fn of_container(spec: &Value) -> Limits {
        let number = |path: &str| spec.pointer(path).and_then(Value::as_i64).and_then(positive);
        Limits {
            cpu_quota: number("/linux/resources/cpu/quota"),
            cpu_period: number("/linux/resources/cpu/period"),
            memory: number("/linux/resources/memory/limit"),
        }
    }

    fn of_pod(spec: &Value) -> Limits {
        let number = |name: &str| {
            let text = spec.get("annotations")?.get(format!("io.kubernetes.cri.sandbox-{name}"))?.as_str()?;
            text.parse().ok().and_then(positive)
        };
        Limits { cpu_quota: number("cpu-quota"), cpu_period: number("cpu-period"), memory: number("memory") }
    }

    fn or(self, other: Limits) -> Limits {
        let (cpu_quota, cpu_period) = match self.cpu_quota {
            Some(_) => (self.cpu_quota, self.cpu_period),
            None => (other.cpu_quota, other.cpu_period),
        };
        Limits { cpu_quota, cpu_period, memory: self.memory.or(other.memory) }
    }

    fn vcpus(&self) -> Option<u32> {
        // The kernel's default period is 100 ms.
        let vcpus = self.cpu_quota?.div_ceil(self.cpu_period.unwrap_or(100_000));
        u32::try_from(vcpus.clamp(1, VCPUS_MAX)).ok()
    }

    fn memory_mib(&self) -> Option<u64> {
        Some(self.memory?.div_ceil(1 << 20) + GUEST_OVERHEAD_MIB)
    }
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn size(spec: Value) -> (u32, u64) {
        let size = of(&spec, &Annotations::default(), &config::Vm { vcpus: 1, memory_mib: 256 });
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn without_limits_the_configuration_decides() {
        assert_eq!(size(json!({})), (1, 256));
        let unlimited = json!({"linux": {"resources": {"cpu": {"quota": -1}, "memory": {"limit": 0}}}});
        assert_eq!(size(unlimited), (1, 256));
    }

    #[test]
    fn the_limits_of_the_spec_are_what_the_container_can_use() {
        let limits = json!({"linux": {"resources": {
            "cpu": {"quota": 250_000, "period": 100_000}, "memory": {"limit": (512 << 20) - 1}
        }}});
        assert_eq!(size(limits), (3, 512 + GUEST_OVERHEAD_MIB));
        let tiny = json!({"linux": {"resources": {"cpu": {"quota": 1000}, "memory": {"limit": 1}}}});
        assert_eq!(size(tiny), (1, 1 + GUEST_OVERHEAD_MIB));
        let huge = json!({"linux": {"resources": {"cpu": {"quota": i64::MAX, "period": 1}}}});
        assert_eq!(size(huge), (255, 256));
    }

    #[test]
    fn a_pods_limits_come_before_those_of_its_sandbox_container() {
        let pod = json!({
            "annotations": {
                "io.kubernetes.cri.sandbox-cpu-quota": "400000",
                "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-memory": "1073741824",
            },
            "linux": {"resources": {"cpu": {"quota": 1000, "period": 1000}, "memory": {"limit": 1}}}
        });
        assert_eq!(size(pod), (4, 1024 + GUEST_OVERHEAD_MIB));
    }

    #[test]
    fn annotations_come_first_and_are_taken_as_they_are() {
        let annotations = Annotations { vcpus: Some(8), memory_mib: Some(100), ..Default::default() };
        let limits =
            json!({"linux": {"resources": {"cpu": {"quota": 100_000}, "memory": {"limit": 1 << 30}}}});
        let size = of(&limits, &annotations, &config::Vm::default());
        assert_eq!(size, VmSize { vcpus: 8, memory_mib: 100 });
    }
}
