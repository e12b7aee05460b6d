//! What of the annotations of a pod is allowed.

use cube_protocol::annotations as name;

use super::{AnnotationError, Annotations};
use crate::config::Policy;

/// Checks that the author of a pod may set those of the annotations `all` that are ours.
///
/// # Errors
///
/// [`AnnotationError::NotAllowed`], with the name. It is never ignored: a container that does not have what its
/// author asked for is worse than none.
pub fn permit<'a>(all: impl IntoIterator<Item = &'a str>, policy: &Policy) -> Result<(), AnnotationError> {
    let refused = all.into_iter().find(|key| key.starts_with(name::PREFIX) && !policy.allows(key));
    match refused {
        None => Ok(()),
        Some(refused) => {
            let allowed = match &policy.pod_annotations[..] {
                [] => "none".into(),
                some => some.join(", "),
            };
            Err(AnnotationError::NotAllowed { name: refused.into(), allowed })
        }
    }
}

impl Annotations {
    /// Makes the writable disk no larger than a pod may have it, also one whose size nobody has asked for.
    pub fn clamp(&mut self, policy: &Policy) {
        self.rootfs_size = self.rootfs_size.min(policy.max_rootfs_mib.saturating_mul(1 << 20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_operator_has_not_allowed_is_refused_by_name_with_where_to_allow_it() {
        let mut policy = Policy::default();
        let all = [name::LOG_MODE, "io.kubernetes.cri.sandbox-id", name::MEMORY_MIB];
        let error = permit(all, &policy).unwrap_err().to_string();
        for words in ["cube.sandbox.memory_mib\"", "policy.pod_annotations", "cube.ready.*"] {
            assert!(error.contains(words), "{error}");
        }
        policy.pod_annotations.push(name::MEMORY_MIB.into());
        assert_eq!(permit(all, &policy), Ok(()));
        policy.pod_annotations.clear();
        assert!(permit(all, &policy).unwrap_err().to_string().contains("which are none"));
        assert_eq!(permit(["org.example.x"], &policy), Ok(()));
    }

    #[test]
    fn a_disk_is_no_larger_than_the_operator_lets_it_be() {
        let policy = Policy { max_rootfs_mib: 64, ..Default::default() };
        for (asked, given) in
            [(16 << 20, 16 << 20), (1 << 30, 64 << 20), (Annotations::default().rootfs_size, 64 << 20)]
        {
            let mut annotations = Annotations { rootfs_size: asked, ..Default::default() };
            annotations.clamp(&policy);
            assert_eq!(annotations.rootfs_size, given);
        }
    }
}
