//! What a snapshot is.

use std::path::Path;

use containerd_shim_protos::api::Mount;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{tenant::Tenant, vmm::Disk};

/// Name of the file.
pub const MANIFEST: &str = "manifest.json";

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the file.
    pub format: u32,
    /// Name in the store.
    pub name: String,
    /// Nanoseconds since 1970.
    pub created_ns: u64,
    /// Version of the shim that made it.
    pub cubebox: String,
    /// Version of the agent in it.
    pub agent: String,
    /// Version of the protocol that this agent speaks, "1.1".
    pub protocol: String,
    /// What wrote the memory and the devices in it.
    pub vmm: WrittenBy,
    /// What it was made from.
    pub origin: Origin,
    /// Whose it is: pods of others may not go on from it. Nobody knows it of those that
    /// versions before this field have made, from which no pod goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Tenant>,
    /// If it is a template: what that was built from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// The containers, by their ids in the guest.
    pub containers: Vec<Container>,
    /// Number of the last event that the guest had.
    pub last_event: u64,
    /// Where each stream was when the guest came to rest. A restore asks the guest itself.
    pub streams: Vec<StreamPosition>,
    /// Block disks, in the order of the VM.
    pub disks: Vec<DiskFile>,
    /// Every other file, by its path below the snapshot.
    pub files: Vec<FileDigest>,
}

impl Manifest {
    /// Its disks, in the snapshot's directory.
    pub fn disks_in(&self, dir: &Path) -> Vec<Disk> {
        let disk = |disk: &DiskFile| Disk {
            path: dir.join(&disk.file),
            serial: disk.serial.clone(),
            read_only: disk.read_only,
        };
        self.disks.iter().map(disk).collect()
    }

    /// Version of the file that this build writes, and the only one that it reads.
    pub const FORMAT: u32 = 1;
}

/// A VMM of some version: only one that knows its format can read what it has written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenBy {
    /// Name of the VMM, as in the configuration.
    pub name: String,
    /// As it calls itself, "v53.0.0".
    pub version: String,
}

/// The sandbox that a snapshot was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// containerd namespace.
    pub namespace: String,
    /// Id of the sandbox.
    pub sandbox: String,
    /// Timeline of the guest.
    pub timeline: u64,
    /// Name of the VMM backend.
    pub backend: String,
}

/// What a template was built from, as far as the shim is told. The content of the rootfs is that of the read-only
/// disk, whose digest is among the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its id.
    pub id: String,
    /// Reference of the image, if an annotation of the container tells it: CRI's, or one of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Directories of the image's layers on the host that built it, the uppermost first.
    pub layers: Vec<String>,
    /// What the init process runs.
    pub args: Vec<String>,
}

impl Template {
    /// Annotations that name an image.
    const IMAGE: [&str; 2] = ["io.kubernetes.cri.image-name", "org.opencontainers.image.ref.name"];

    /// The template `id`, built in a container with this `config.json` and these mounts for its rootfs.
    pub fn of(id: &str, spec: &Value, rootfs: &[Mount]) -> Template {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let annotation = |name: &str| text(spec.get("annotations")?.get(name)?);
        let args = spec.pointer("/process/args").and_then(Value::as_array);
        let lower = |option: &String| option.strip_prefix("lowerdir=").map(str::to_owned);
        let lower = rootfs.iter().flat_map(|mount| &mount.options).find_map(lower);
        Template {
            id: id.into(),
            image: Self::IMAGE.into_iter().find_map(annotation),
            layers: lower.iter().flat_map(|dirs| dirs.split(':')).map(str::to_owned).collect(),
            args: args.into_iter().flatten().filter_map(text).collect(),
        }
    }
}

/// A container in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its id in the guest.
    pub id: String,
    /// Pid of its init process in the guest.
    pub pid: u32,
    /// Whether that has a terminal.
    pub terminal: bool,
    /// Ids of the execs that ran.
    pub execs: Vec<String>,
    /// What containerd needs of its OCI spec to make a container that goes on from here; see
    /// [`portable_spec`](super::portable_spec).
    pub spec: Value,
}

/// A stream in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPosition {
    /// Container, in the guest.
    pub container: String,
    /// Exec, or empty.
    pub exec: String,
    /// "stdin", "stdout", "stderr" or "terminal".
    pub stream: String,
    /// Offset below which the host had acknowledged everything (stdin: the process had taken).
    pub acknowledged: u64,
    /// Offset of the last byte that the guest had, plus one.
    pub end: u64,
}

/// A disk in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    /// As the guest knows it.
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Path below the snapshot.
    pub file: String,
}

/// A file in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Path below the snapshot.
    pub path: String,
    /// Length in bytes; files may be sparse.
    pub bytes: u64,
    /// Bytes of its blocks of 64 KiB that are not all zero: what it takes on a disk. Not known of snapshots that
    /// older versions have made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<u64>,
    /// SHA-256 in hex, of what is not zero: the blocks of 64 KiB that are not all zero, each preceded by its
    /// number as 64 bits, little-endian.
    pub sha256: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_template_tells_what_it_was_built_from() {
        let spec = json!({
            "process": {"args": ["sh", "-c", "true"]},
            "annotations": {"org.opencontainers.image.ref.name": "python:3.12"},
        });
        let options = vec!["index=off".to_owned(), "lowerdir=/s/2/fs:/s/1/fs".to_owned()];
        let rootfs = [Mount { type_: "overlay".into(), options, ..Default::default() }];
        let template = Template::of("py", &spec, &rootfs);
        assert_eq!(template.image.as_deref(), Some("python:3.12"));
        assert_eq!(template.layers, ["/s/2/fs", "/s/1/fs"]);
        assert_eq!(template.args, ["sh", "-c", "true"]);
        let unknown = Template::of("py", &json!({}), &[]);
        assert_eq!((unknown.image, unknown.layers.len(), unknown.args.len()), (None, 0, 0));
    }
}
