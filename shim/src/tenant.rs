//! Who asks for a container: a user of containerd, who is root on the host, or the author of a pod, who need not be.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the names of the annotations begin with that containerd's CRI plugin writes into the spec of each container
/// of a pod. It writes them after those that it passes on from the pod, and passes on only what `pod_annotations` of
/// the runtime names: with `["cube.*"]`, a pod can set none of them, and cannot get rid of them.
pub const CRI: &str = "io.kubernetes.cri.";

/// The Kubernetes namespace of a pod.
const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

/// Whose a container is, and a snapshot of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    /// containerd namespace.
    pub namespace: String,
    /// For a pod: its Kubernetes namespace, or nothing if containerd does not tell it. All pods of a host are in one
    /// containerd namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_namespace: Option<String>,
}

impl Tenant {
    /// The one that a container belongs to which has `spec`, in the containerd namespace `namespace`.
    pub fn of(namespace: &str, spec: &Value) -> Tenant {
        let annotations = spec.get("annotations").and_then(Value::as_object);
        let pod = annotations.filter(|all| all.keys().any(|key| key.starts_with(CRI)));
        let pod_namespace = |pod: &serde_json::Map<String, Value>| {
            pod.get(POD_NAMESPACE).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        Tenant { namespace: namespace.into(), pod_namespace: pod.map(pod_namespace) }
    }

    /// Whether it is the author of a pod, and so not trusted.
    pub fn is_pod(&self) -> bool {
        self.pod_namespace.is_some()
    }

    /// Whether it may go on from what belongs to `owner`. A pod of which nobody knows where it belongs may not.
    pub fn may_restore(&self, owner: Option<&Tenant>) -> bool {
        match self.pod_namespace.as_deref() {
            None => true,
            Some(known) => !known.is_empty() && owner == Some(self),
        }
    }
}

/// `default`, or for a pod `k8s.io/team-a`.
impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pod_namespace {
            None => f.write_str(&self.namespace),
            Some(pod_namespace) => write!(f, "{}/{pod_namespace}", self.namespace),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tenant(annotations: Value) -> Tenant {
        Tenant::of("k8s.io", &json!({ "annotations": annotations }))
    }

    #[test]
    fn whoever_comes_by_cri_is_a_pod_and_everybody_else_is_trusted() {
        for trusted in [json!({}), json!({"cube.ready.tcp": "1", "io.kubernetes.pod.namespace": "x"})] {
            assert!(!tenant(trusted).is_pod());
        }
        assert!(!Tenant::of("default", &json!({})).is_pod());
        let pod = tenant(json!({"io.kubernetes.cri.container-type": "sandbox", POD_NAMESPACE: "team-a"}));
        assert_eq!((pod.is_pod(), pod.to_string().as_str()), (true, "k8s.io/team-a"));
        assert!(
            tenant(json!({"io.kubernetes.cri.sandbox-id": "p"})).is_pod(),
            "it does not say where it belongs"
        );
    }

    #[test]
    fn a_pod_restores_what_is_of_its_own_namespace_and_no_one_elses() {
        let of = |namespace: &str| tenant(json!({ POD_NAMESPACE: namespace }));
        let (a, b, nowhere) = (of("team-a"), of("team-b"), of(""));
        let root = tenant(json!({}));
        let elsewhere = Tenant { namespace: "other".into(), ..a.clone() };
        assert!(a.may_restore(Some(&a)));
        for owner in [Some(&b), Some(&root), Some(&elsewhere), Some(&nowhere), None] {
            assert!(!a.may_restore(owner), "{owner:?}");
            assert!(root.may_restore(owner), "{owner:?}");
        }
        assert!(!nowhere.may_restore(Some(&nowhere)));
    }
}
