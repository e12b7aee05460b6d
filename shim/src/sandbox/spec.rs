//! `config.json`: read from the bundle, checked, and rewritten for the guest.
//!
//! The spec stays the JSON that it is: only what means something else in a VM is touched, so that a
//! field that this build has never heard of still reaches the agent, which refuses it by name.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use cube_protocol::spec::BYTES_MAX;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tracing::info;
use ttrpc::Code;

use crate::device::{self, Foreign};

/// Longest label of a host name, RFC 1123.
const HOSTNAME_MAX: usize = 63;

/// Pod that a CRI container belongs to: the id of its sandbox container.
pub const SANDBOX_ID_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";

/// A spec that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is longer than any may be.
    #[error("{path} has {bytes} bytes, {max} are possible", max = cube_protocol::spec::BYTES_MAX)]
    Long {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The file is not JSON.
    #[error("{path} is not a valid OCI spec")]
    Json {
        /// The file.
        path: PathBuf,
        /// What and where, with line and column.
        source: serde_json::Error,
    },
    /// A field does not have the type that the runtime specification gives it.
    #[error("{field} in config.json must be {expected}")]
    Type {
        /// Path of the field.
        field: String,
        /// The type.
        expected: &'static str,
    },
    /// A device of the host.
    #[error(
        "{} asks for {}, which the VM does not have: its number there means another device, or none. Leave it \
         out; a guest has null, zero, full, random, urandom, kmsg, tty, console, ptmx, net/tun and fuse",
        .0.field, .0.what
    )]
    Device(Foreign),
    /// The host's network was asked for.
    #[error(
        "the container asks for the host's network, which a VM does not have: linux.namespaces in config.json must have a \"network\" entry (with ctr, run without --net-host)"
    )]
    HostNetwork,
    /// A network namespace that has devices, which this version cannot bring into a VM.
    #[error(
        "the network namespace {path} has the interfaces {interfaces}: networking is not supported by this version"
    )]
    Network {
        /// Path of the namespace.
        path: PathBuf,
        /// Their names.
        interfaces: String,
    },
    /// A namespace that is not the sandbox's own.
    #[error("the {kind} namespace {path} is on the host, outside of the sandbox's VM, and cannot be joined")]
    Namespace {
        /// Its type in the spec.
        kind: String,
        /// Its path.
        path: String,
    },
}

impl SpecError {
    /// The code that containerd gets.
    pub fn code(&self) -> Code {
        match self {
            SpecError::Network { .. } => Code::UNIMPLEMENTED,
            SpecError::Read { .. } => Code::NOT_FOUND,
            _ => Code::INVALID_ARGUMENT,
        }
    }
}

/// The sandbox that a container joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pod {
    /// Pid that containerd was told for the sandbox container.
    pub reported_pid: u32,
    /// Pid of the sandbox container's init process in the guest.
    pub guest_pid: u32,
}

/// Reads `config.json` of `bundle`.
pub fn load(bundle: &Path) -> Result<Value, SpecError> {
    let path = bundle.join("config.json");
    let failed = |source| SpecError::Read { path: path.clone(), source };
    let file = File::open(&path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > BYTES_MAX as u64 {
        return Err(SpecError::Long { path, bytes });
    }
    let mut text = Vec::new();
    file.take(BYTES_MAX as u64).read_to_end(&mut text).map_err(failed)?;
    let spec: Value = serde_json::from_slice(&text).map_err(|source| SpecError::Json { path, source })?;
    if spec.is_object() {
        Ok(spec)
    } else {
        Err(SpecError::Type { field: "the whole file".into(), expected: "an object" })
    }
}

/// The annotations of `spec`.
pub fn annotations(spec: &Value) -> Result<Vec<(&str, &str)>, SpecError> {
    let expected = "an object of strings";
    let wrong = || SpecError::Type { field: "annotations".into(), expected };
    match spec.get("annotations") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(map)) => {
            map.iter().map(|(key, value)| Ok((key.as_str(), value.as_str().ok_or_else(wrong)?))).collect()
        }
        Some(_) => Err(wrong()),
    }
}

/// Id of the sandbox that the container of `spec` is a member of, if it is one of a pod.
pub fn sandbox_id(spec: &Value) -> Option<&str> {
    spec.get("annotations")?.get(SANDBOX_ID_ANNOTATION)?.as_str()
}

/// The `hostname` of `spec`, or nothing.
pub fn hostname(spec: &Value) -> &str {
    spec.get("hostname").and_then(Value::as_str).unwrap_or_default()
}

/// The `hostname` of `spec`, or one made of the sandbox's `id`: a kernel's own is "(none)".
pub fn hostname_or<'a>(spec: &'a Value, id: &'a str) -> &'a str {
    match hostname(spec) {
        // An id has ASCII only, and may be longer than a label of a host name.
        "" => id.get(..HOSTNAME_MAX).unwrap_or(id).trim_end_matches(['.', '-', '_']),
        name => name,
    }
}

/// Rewrites what means something else in the guest:
///
/// - `linux.cgroupsPath` is the host's: the agent places containers itself;
/// - devices are the host's: see [`device::settle`];
/// - the VM is its container's network namespace, and its pod's: one without a path, for the agent;
/// - `/proc/<reported pid>/ns/x` of a pod's sandbox container is `/proc/<guest pid>/ns/x` in there.
///
/// Blocks: it looks into the network namespace that the spec names.
pub fn rewrite(spec: &mut Value, pod: Option<Pod>) -> Result<(), SpecError> {
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else {
        return Err(SpecError::HostNetwork);
    };
    linux.remove("cgroupsPath");
    if let Some(devices) = device::settle(linux).map_err(SpecError::Device)? {
        info!(
            devices,
            "a privileged container goes without the devices of the host, which its VM does not have"
        );
    }
    let namespaces = match linux.get_mut("namespaces") {
        Some(Value::Array(namespaces)) => namespaces,
        None | Some(Value::Null) => return Err(SpecError::HostNetwork),
        Some(_) => {
            return Err(SpecError::Type { field: "linux.namespaces".into(), expected: "an array" });
        }
    };
    let kind_of =
        |namespace: &Value| namespace.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let network = namespaces.iter().position(|namespace| kind_of(namespace) == "network");
    let network = network.and_then(|index| namespaces.get_mut(index)).ok_or(SpecError::HostNetwork)?;
    let network = std::mem::replace(network, json!({"type": "network"}));
    match path_of(&network) {
        Some(path) if namespace_of(path, pod).is_none() => check_network(Path::new(path))?,
        _ => {}
    }
    for namespace in namespaces {
        let Some(path) = path_of(namespace) else { continue };
        let Some(in_guest) = namespace_of(path, pod) else {
            return Err(SpecError::Namespace { kind: kind_of(namespace), path: path.into() });
        };
        namespace["path"] = in_guest.into();
    }
    Ok(())
}

fn path_of(namespace: &Value) -> Option<&str> {
    namespace.get("path").and_then(Value::as_str).filter(|path| !path.is_empty())
}

/// Where the namespace file `path` of the pod's sandbox container is in the guest; `None` if it is
/// not the pod's.
fn namespace_of(path: &str, pod: Option<Pod>) -> Option<String> {
    let Pod { reported_pid, guest_pid } = pod?;
    let name = path.strip_prefix(&format!("/proc/{reported_pid}/ns/"))?;
    Some(format!("/proc/{guest_pid}/ns/{name}"))
}

/// Refuses a network namespace that somebody has set up: its devices would not be in the VM.
fn check_network(path: &Path) -> Result<(), SpecError> {
    let read = |source| SpecError::Read { path: path.into(), source };
    let namespace = File::open(path).map_err(read)?;
    // setns(2) moves one thread, and /proc/thread-self/net shows the namespace of one thread.
    let listing = std::thread::scope(|scope| {
        let list = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            fs::read_to_string("/proc/thread-self/net/dev")
        };
        scope.spawn(list).join().unwrap_or_else(|_| Err(io::Error::other("panic")))
    });
    // Two lines of headings, then "<name>: <counters>".
    let listing = listing.map_err(read)?;
    let names = listing.lines().skip(2).filter_map(|line| line.split(':').next());
    let interfaces: Vec<&str> = names.map(str::trim).filter(|name| is_device(name)).collect();
    if interfaces.is_empty() {
        return Ok(());
    }
    Err(SpecError::Network { path: path.into(), interfaces: interfaces.join(", ") })
}

/// The loopback is in every namespace, and some kernels add the fallback devices of tunnel modules.
fn is_device(name: &str) -> bool {
    const FALLBACK: [&str; 9] =
        ["lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0"];
    !FALLBACK.contains(&name) && name != "ip6gre0"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const POD: Pod = Pod { reported_pid: 4242, guest_pid: 17 };

    #[test]
    fn a_spec_that_is_not_json_is_refused_with_its_path_and_the_position() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), "{\n  \"ociVersion\": ,\n}").unwrap();
        let text = crate::errors::chain(&load(bundle.path()).unwrap_err());
        assert!(text.contains("config.json") && text.contains("line 2"), "{text}");
    }

    #[test]
    fn a_spec_without_a_network_namespace_asks_for_the_hosts_and_is_refused() {
        for spec in [json!({}), json!({"linux": {}}), json!({"linux": {"namespaces": [{"type": "pid"}]}})] {
            let error = rewrite(&mut spec.clone(), None).unwrap_err();
            assert!(matches!(error, SpecError::HostNetwork), "{spec}: {error}");
            assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        }
    }

    #[test]
    fn only_what_means_something_else_in_the_guest_is_changed() {
        let mut spec = json!({
            "process": {"args": ["sh"], "fieldOfTheFuture": 1},
            "linux": {
                "cgroupsPath": "/default/c1",
                "resources": {"memory": {"limit": 1}},
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc", "path": ""}]
            }
        });
        rewrite(&mut spec, None).unwrap();
        let expected = json!({
            "process": {"args": ["sh"], "fieldOfTheFuture": 1},
            "linux": {
                "resources": {"memory": {"limit": 1}},
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc", "path": ""}]
            }
        });
        assert_eq!(spec, expected);
    }

    #[test]
    fn namespaces_of_the_pod_are_those_of_its_sandbox_container_in_the_guest() {
        let mut spec = json!({"linux": {"namespaces": [
            {"type": "network", "path": "/proc/4242/ns/net"},
            {"type": "ipc", "path": "/proc/4242/ns/ipc"},
            {"type": "uts", "path": "/proc/4242/ns/uts"},
        ]}});
        rewrite(&mut spec, Some(POD)).unwrap();
        let expected = json!({"linux": {"namespaces": [
            {"type": "network"},
            {"type": "ipc", "path": "/proc/17/ns/ipc"},
            {"type": "uts", "path": "/proc/17/ns/uts"},
        ]}});
        assert_eq!(spec, expected);
    }

    #[test]
    fn a_namespace_of_the_host_is_refused_by_name() {
        for pod in [None, Some(POD)] {
            let mut spec = json!({"linux": {"namespaces": [
                {"type": "network"}, {"type": "pid", "path": "/proc/424/ns/pid"}
            ]}});
            let error = rewrite(&mut spec, pod).unwrap_err().to_string();
            assert!(error.contains("/proc/424/ns/pid"), "{error}");
        }
    }

    #[test]
    fn without_a_host_name_there_is_one_made_of_the_id() {
        assert_eq!(hostname_or(&json!({"hostname": "box"}), "c1"), "box");
        assert_eq!(hostname_or(&json!({"hostname": ""}), "c1"), "c1");
        let long = format!("{}.{}", "x".repeat(62), "y".repeat(10));
        assert_eq!(hostname_or(&json!({}), &long), "x".repeat(62));
    }

    #[test]
    fn a_device_of_the_host_is_refused_and_one_of_a_privileged_container_left_out() {
        let mut spec = json!({"linux": {
            "namespaces": [{"type": "network"}],
            "devices": [{"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}],
        }});
        let error = rewrite(&mut spec.clone(), None).unwrap_err();
        assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        assert!(error.to_string().contains("(/dev/vda)"), "{error}");
        spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        rewrite(&mut spec, None).unwrap();
        assert_eq!(spec["linux"]["devices"], json!([]));
    }

    #[test]
    fn a_network_namespace_that_does_not_exist_is_an_error_with_its_path() {
        let mut spec = json!({"linux": {"namespaces": [{"type": "network", "path": "/no/such/ns"}]}});
        let text = crate::errors::chain(&rewrite(&mut spec, None).unwrap_err());
        assert!(text.contains("/no/such/ns") && text.contains("No such file"), "{text}");
    }
}
