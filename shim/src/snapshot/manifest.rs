//! What a snapshot is.

use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    /// SHA-256 in hex, of what is not zero: the blocks of 64 KiB that are not all zero, each preceded by its
    /// number as 64 bits, little-endian.
    pub sha256: String,
}
