//! How large a sandbox's VM is.
//!
//! In this order: the annotations `cube.sandbox.vcpus` and `cube.sandbox.memory_mib`; the limits of
//! the whole pod, which CRI writes into annotations of the sandbox container; the limits of the
//! spec; the configuration. A memory limit is what the container may use, so the guest's kernel and
//! agent get [`GUEST_OVERHEAD_MIB`] on top of it. A CPU limit is rounded up to whole virtual CPUs.
//!
//! The author of a pod does not get beyond its limits by an annotation, nor beyond what the operator allows.

use std::fmt::Display;

use cube_protocol::annotations as name;
use serde_json::Value;
use tracing::warn;

use crate::{
    annotations::Annotations,
    config::{self, Policy},
};

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

/// The size for the sandbox whose first container has `spec`; of a pod if it has a `policy`.
pub fn of(spec: &Value, annotations: &Annotations, defaults: &config::Vm, policy: Option<&Policy>) -> VmSize {
    let limits = Limits::of_pod(spec).or(Limits::of_container(spec));
    let (mut vcpus, mut memory_mib) = (annotations.vcpus, annotations.memory_mib);
    if let Some(Policy { max_vcpus, max_memory_mib, .. }) = policy {
        vcpus = clamp(name::VCPUS, vcpus, limits.vcpus(), *max_vcpus);
        memory_mib = clamp(name::MEMORY_MIB, memory_mib, limits.memory_mib(), *max_memory_mib);
    }
    VmSize {
        vcpus: vcpus.or(limits.vcpus()).unwrap_or(defaults.vcpus),
        memory_mib: memory_mib.or(limits.memory_mib()).unwrap_or(defaults.memory_mib),
    }
}

/// The most that a pod whose container has `spec` may have.
pub fn most(spec: &Value, policy: &Policy) -> VmSize {
    let limits = Limits::of_pod(spec).or(Limits::of_container(spec));
    VmSize {
        vcpus: limits.vcpus().unwrap_or(policy.max_vcpus),
        memory_mib: limits.memory_mib().unwrap_or(policy.max_memory_mib),
    }
}

fn clamp<T: Ord + Copy + Display>(name: &str, asked: Option<T>, limit: Option<T>, max: T) -> Option<T> {
    let (asked, most) = (asked?, limit.unwrap_or(max).min(max));
    if asked > most {
        warn!("the annotation {name} of the pod asks for {asked}, and gets {most}: its limits, or [policy]");
    }
    Some(asked.min(most))
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
        let defaults = config::Vm { vcpus: 1, memory_mib: 256 };
        let size = of(&spec, &Annotations::default(), &defaults, None);
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
        let size = of(&limits, &annotations, &config::Vm::default(), None);
        assert_eq!(size, VmSize { vcpus: 8, memory_mib: 100 });
    }

    #[test]
    fn an_annotation_of_a_pod_gets_neither_beyond_its_limits_nor_beyond_the_operators() {
        let policy = Policy { max_vcpus: 4, max_memory_mib: 1024, ..Default::default() };
        let limits = json!({"annotations": {
            "io.kubernetes.cri.sandbox-cpu-quota": "200000", "io.kubernetes.cri.sandbox-memory": "67108864",
        }});
        let size = |spec: &Value, vcpus, memory_mib| {
            let annotations =
                Annotations { vcpus: Some(vcpus), memory_mib: Some(memory_mib), ..Default::default() };
            let size = of(spec, &annotations, &config::Vm::default(), Some(&policy));
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(size(&limits, 8, 1024), (2, 64 + GUEST_OVERHEAD_MIB));
        assert_eq!(size(&limits, 1, 100), (1, 100), "less is its own business");
        assert_eq!(size(&json!({}), 255, 1 << 20), (4, 1024));
        // What is no wish of an annotation is the cluster's to limit.
        let large = json!({"annotations": {"io.kubernetes.cri.sandbox-memory": "4294967296"}});
        let of_limits = of(&large, &Annotations::default(), &config::Vm::default(), Some(&policy));
        assert_eq!(of_limits.memory_mib, 4096 + GUEST_OVERHEAD_MIB);
        assert_eq!(size(&large, 1, 1 << 20).1, 1024);
    }
}
