//! The `[policy]` table: what the authors of pods may ask for.
//!
//! Somebody who may create a pod need not be trusted with the host, and annotations of pods come here as they were
//! written. A user of containerd's own API is root, and may ask for anything.

use cube_protocol::annotations as name;
use serde::Deserialize;

/// The `[policy]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Annotations that pods may set: a name, or the beginning of names with a star behind it.
    pub pod_annotations: Vec<String>,
    /// Most virtual CPUs that an annotation of a pod gets.
    pub max_vcpus: u32,
    /// Most memory in MiB that an annotation of a pod gets.
    pub max_memory_mib: u64,
    /// Largest writable disk of a container of a pod, in MiB.
    pub max_rootfs_mib: u64,
}

/// Those that cost others nothing and reveal nothing.
const HARMLESS: [&str; 4] = [name::LOG_FORWARDING, name::LOG_MODE, name::ROOTFS_MODE, "cube.ready.*"];

impl Default for Policy {
    fn default() -> Self {
        Policy {
            pod_annotations: HARMLESS.map(Into::into).into(),
            max_vcpus: 4,
            max_memory_mib: 4096,
            max_rootfs_mib: 10 << 10,
        }
    }
}

impl Policy {
    /// Whether pods may set this annotation.
    pub fn allows(&self, annotation: &str) -> bool {
        self.pod_annotations.iter().any(|pattern| matches(pattern, annotation))
    }

    /// The first of [`pod_annotations`](Policy::pod_annotations) that means no annotation of this version.
    pub(super) fn meaningless(&self) -> Option<&str> {
        let means = |pattern: &&String| name::KNOWN.iter().any(|known| matches(pattern, known));
        self.pod_annotations.iter().find(|pattern| !means(pattern)).map(String::as_str)
    }
}

fn matches(pattern: &str, annotation: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => annotation.starts_with(beginning),
        None => annotation == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_pods_may_set_what_costs_and_reveals_nothing() {
        let policy = Policy::default();
        let allowed: Vec<_> = name::KNOWN.into_iter().filter(|known| policy.allows(known)).collect();
        let expected = [
            name::LOG_FORWARDING,
            name::LOG_MODE,
            name::ROOTFS_MODE,
            name::READY_HTTP,
            name::READY_TCP,
            name::READY_EXEC,
        ];
        assert_eq!(allowed, expected);
    }

    #[test]
    fn a_star_stands_for_any_end_and_nothing_else_is_a_pattern() {
        let policy = Policy { pod_annotations: vec!["cube.sandbox.*".into()], ..Default::default() };
        assert!(policy.allows(name::VCPUS) && policy.allows(name::MEMORY_MIB));
        assert!(!policy.allows(name::LOG_MODE), "a list takes the place of the default one");
        let none = Policy { pod_annotations: Vec::new(), ..Default::default() };
        assert!(!name::KNOWN.iter().any(|known| none.allows(known)));
        assert!(!Policy { pod_annotations: vec!["cube.sandbox".into()], ..none }.allows(name::VCPUS));
    }
}
