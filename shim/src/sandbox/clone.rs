//! What of the spec of a container that is restored takes effect.
//!
//! Its processes run already, in the rootfs, with the user, the mounts and the namespaces of the snapshot.
//! The new spec gives the host name, the environment of what is started later, and the limits. What else it
//! says is not looked at, as with `ctr container restore --live`, whose spec is that of the original; but what
//! its author would miss is refused: data of the host that is not there, and isolation that is not.

use cube_protocol::environment;
use serde_json::Value;

use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::spec::{self, SpecError};
use crate::errors::Error;

/// Type of the resources that an Update takes.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Fields that would isolate the container, or change how it runs on its host. No snapshot has them, for a
/// create refuses them as well.
const REFUSED: [&str; 8] = [
    "/hooks",
    "/process/apparmorProfile",
    "/process/selinuxLabel",
    "/linux/uidMappings",
    "/linux/gidMappings",
    "/linux/seccomp",
    "/linux/mountLabel",
    "/linux/intelRdt",
];

/// What a restore takes from the spec.
#[derive(Default, Clone)]
pub(super) struct Present {
    /// Of the sandbox; empty keeps the guest's.
    pub(super) hostname: String,
    /// For processes that are started later. As secret as the memory of the sandbox.
    pub(super) environment: Vec<String>,
    /// Limits to be set, as an Update takes them.
    pub(super) resources: Option<Any>,
}

impl Present {
    /// Reads and checks `spec`.
    ///
    /// Blocks: it looks into the network namespace that the spec names.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] and [`Error::Spec`] for what would silently be missing.
    pub(super) fn of(mut spec: Value) -> Result<Present, Error> {
        refuse(&spec)?;
        let environment = environment_of(&spec)?;
        let resources = resources_of(&spec);
        let hostname = spec::hostname(&spec).to_owned();
        // The same namespaces can be asked for as by a create.
        spec::rewrite(&mut spec, None)?;
        Ok(Present { hostname, environment, resources })
    }
}

fn refuse(spec: &Value) -> Result<(), Error> {
    if let Some(field) = REFUSED.into_iter().find(|field| spec.pointer(field).is_some_and(is_set)) {
        let field = field.trim_start_matches('/').replace('/', ".");
        let reason = format!("{field} in config.json cannot be given to processes that run already");
        return Err(Error::Restore { reason });
    }
    let mounts = spec.get("mounts").and_then(Value::as_array);
    if let Some(bind) = mounts.into_iter().flatten().find(|mount| is_bind(mount)) {
        let path = |key: &str| bind[key].as_str().unwrap_or_default().to_owned();
        let (source, destination) = (path("source"), path("destination"));
        let reason = format!(
            "the bind mount of {source:?} on {destination:?} would be missing: a snapshot has the mounts that \
             it was taken with, and none of the host"
        );
        return Err(Error::Restore { reason });
    }
    Ok(())
}

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => fields.values().any(is_set),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

fn is_bind(mount: &Value) -> bool {
    let options = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
    mount["type"] == "bind" || options.into_iter().any(|option| option == "bind" || option == "rbind")
}

fn environment_of(spec: &Value) -> Result<Vec<String>, Error> {
    let wrong = || SpecError::Type { field: "process.env".into(), expected: "an array of strings" };
    let entries = match spec.pointer("/process/env") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(entries) => entries.as_array().ok_or_else(wrong)?,
    };
    let text = |entry: &Value| Ok(entry.as_str().ok_or_else(wrong)?.to_owned());
    let entries = entries.iter().map(text).collect::<Result<Vec<_>, SpecError>>()?;
    environment::check(&entries).map_err(|source| Error::Environment { source })?;
    Ok(entries)
}

/// The limits of the spec. The rules for devices, which every spec has, are those that the container was
/// created with.
fn resources_of(spec: &Value) -> Option<Any> {
    let mut resources = spec.pointer("/linux/resources")?.as_object()?.clone();
    resources.remove("devices");
    resources.retain(|_, value| is_set(value));
    if resources.is_empty() {
        return None;
    }
    let value = Value::Object(resources).to_string().into_bytes();
    Some(Any { type_url: RESOURCES_TYPE.into(), value, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::errors::chain;

    fn spec() -> Value {
        json!({
            "hostname": "box",
            "process": {"args": ["x"], "env": ["PATH=/bin", "TOKEN=t"], "apparmorProfile": ""},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [{"type": "network"}, {"type": "pid"}],
            },
        })
    }

    fn refused(pointer: &str, value: Value) -> String {
        let mut spec = spec();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[field] = value;
        chain(&Present::of(spec).err().unwrap())
    }

    #[test]
    fn name_environment_and_limits_are_taken_and_the_rules_for_devices_left() {
        let mut spec = spec();
        let present = Present::of(spec.clone()).unwrap();
        assert_eq!((present.hostname.as_str(), present.resources.is_none()), ("box", true));
        assert_eq!(present.environment, ["PATH=/bin", "TOKEN=t"]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 1 << 20});
        spec["linux"]["resources"]["cpu"] = json!({});
        let resources = Present::of(spec).unwrap().resources.unwrap();
        assert_eq!(resources.value, json!({"memory": {"limit": 1 << 20}}).to_string().into_bytes());
    }

    #[test]
    fn what_its_author_would_miss_is_refused_by_name() {
        let bind =
            json!([{"destination": "/data", "type": "none", "source": "/srv", "options": ["rbind", "ro"]}]);
        for (pointer, value, words) in [
            ("/mounts", bind, "\"/srv\" on \"/data\""),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ERRNO"}), "linux.seccomp"),
            ("/process/apparmorProfile", json!("p"), "process.apparmorProfile"),
            ("/hooks", json!({"prestart": [{"path": "/x"}]}), "hooks"),
            ("/linux/namespaces", json!([{"type": "pid"}]), "the host's network"),
        ] {
            let text = refused(pointer, value);
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn an_environment_that_cannot_be_delivered_is_refused_without_its_content() {
        let text = refused("/process/env", json!(["A=1", "hunter2"]));
        assert!(text.contains("index 1") && !text.contains("hunter2"), "{text}");
        let large: Vec<String> = (0..4).map(|n| format!("S{n}={}", "x".repeat(100_000))).collect();
        let text = refused("/process/env", json!(large));
        assert!(text.contains("400016 bytes in all, 262144 are possible"), "{text}");
        assert!(refused("/process/env", json!([1])).contains("process.env"));
    }
}
