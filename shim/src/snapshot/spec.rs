//! What a snapshot keeps of a container's OCI spec.

use cube_protocol::annotations::{SNAPSHOT_RESTORE, TEMPLATE_ID};
use serde_json::{Map, Value, json};

use crate::tenant::CRI;

/// Annotations that mean the container itself and not those that go on from it.
const OWN: [&str; 2] = [SNAPSHOT_RESTORE, TEMPLATE_ID];

/// What of `spec` is needed to make a container of another name, maybe on another host, that goes on from a
/// snapshot: what its process is, for execs in it that do not say otherwise; hostname, annotations and the
/// kinds of namespaces.
///
/// The environment is left out: it is full of secrets, and the process has it in its memory. So are mounts,
/// hooks, devices and limits: all of it is in the guest already, and paths mean nothing elsewhere.
pub fn portable_spec(spec: &Value) -> Value {
    let mut kept = Map::new();
    for key in ["ociVersion", "process", "hostname", "domainname", "annotations"] {
        if let Some(value) = spec.get(key) {
            kept.insert(key.into(), value.clone());
        }
    }
    if let Some(process) = kept.get_mut("process").and_then(Value::as_object_mut) {
        process.remove("env");
    }
    if let Some(annotations) = kept.get_mut("annotations").and_then(Value::as_object_mut) {
        // Those of CRI mean pods of the host that they come from.
        annotations.retain(|key, _| !OWN.contains(&key.as_str()) && !key.starts_with(CRI));
    }
    kept.insert("root".into(), json!({"path": "rootfs"}));
    let namespaces = spec["linux"]["namespaces"].as_array().into_iter().flatten();
    let kinds: Vec<_> = namespaces.map(|namespace| json!({"type": namespace["type"]})).collect();
    kept.insert("linux".into(), json!({"namespaces": kinds}));
    Value::Object(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_the_environment_nor_a_path_of_the_host_is_kept() {
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["sleep", "1"], "cwd": "/", "env": ["TOKEN=secret"], "terminal": false},
            "hostname": "box",
            "annotations": {
                "cube.snapshot.restore": "older",
                "cube.template.id": "python",
                "io.kubernetes.cri.sandbox-id": "pod",
                "cube.ready.tcp": "80",
            },
            "root": {"path": "/var/lib/secret"},
            "mounts": [{"source": "/var/lib/secret", "destination": "/x"}],
            "hooks": {"prestart": [{"path": "/var/lib/secret"}]},
            "linux": {
                "cgroupsPath": "/secret",
                "namespaces": [{"type": "network", "path": "/var/run/netns/secret"}, {"type": "pid"}],
            },
        });
        let kept = portable_spec(&spec);
        assert!(!kept.to_string().contains("secret"), "{kept}");
        let expected = json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["sleep", "1"], "cwd": "/", "terminal": false},
            "hostname": "box",
            "annotations": {"cube.ready.tcp": "80"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "network"}, {"type": "pid"}]},
        });
        assert_eq!(kept, expected);
        assert_eq!(portable_spec(&kept), kept);
        assert_eq!(portable_spec(&json!({}))["linux"]["namespaces"], json!([]));
    }
}
