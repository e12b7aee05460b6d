//! The snapshot store: `snapshot.dir` of the configuration.
//!
//! ```text
//! <dir>/<name>/manifest.json    what it is, and the digest of every other file
//!              verified.json    which versions of the files were found to have their digests
//!              vm/              memory and devices, as the VMM has written them
//!              disks/<serial>   block disks at the same instant
//! <dir>/.<name>.new/            one that is being made; locked (flock) for as long
//! <dir>/.suspended-<key>/       no snapshot: memory of a sandbox that is paused to disk
//! ```
//!
//! A snapshot has the whole memory of the sandbox in it, keys and all: directories are 0700, files 0600.
//! It is complete and on disk when it gets its name, and is never changed afterwards.

mod archive;
mod check;
mod digest;
mod draft;
mod manifest;
mod meter;
mod spec;
mod store;
mod suspended;
#[cfg(test)]
mod tests;
mod verify;

use std::{io, path::PathBuf};

pub use self::{
    archive::Import,
    draft::{Copies, Draft},
    manifest::{
        Container, DiskFile, FileDigest, MANIFEST, Manifest, Origin, StreamPosition, Template, WrittenBy,
    },
    meter::{Told, untold},
    spec::portable_spec,
    store::{Listed, Store},
    suspended::Suspended,
    verify::Held,
};

/// Directory of what the VMM has written, below a snapshot.
const VM: &str = "vm";

/// Directory of the disks.
const DISKS: &str = "disks";

/// A snapshot that cannot be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name is no name.
    #[error(
        "the snapshot name {0:?} is not valid: 1 to 76 letters and digits, with single dots, dashes or underscores between them"
    )]
    Name(String),
    /// The name is taken.
    #[error(
        "a snapshot {name:?} {state}: choose another name, or remove it with `cubecli cubebox snapshots --rm {name}`"
    )]
    Exists {
        /// The name.
        name: String,
        /// "exists" or "is being made".
        state: &'static str,
    },
    /// The path leads to no snapshot of the store.
    #[error(
        "{path:?} is no snapshot in {dir}: give the name of one, as `cubecli cubebox snapshots` lists them, or its path there"
    )]
    Outside {
        /// The path.
        path: String,
        /// The store.
        dir: PathBuf,
    },
    /// There is none of this name.
    #[error("there is no snapshot {name:?} in {dir}: `cubecli cubebox snapshots` lists them")]
    NotFound {
        /// The name.
        name: String,
        /// The store.
        dir: PathBuf,
    },
    /// The manifest is none of a version that this build reads.
    #[error("{path} is not a manifest that this version of Cubebox can read")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// The manifest has another format.
    #[error("the snapshot {name:?} has format {found}, this version of Cubebox reads format {known}")]
    Format {
        /// The snapshot.
        name: String,
        /// Of the snapshot.
        found: u32,
        /// Of this build.
        known: u32,
    },
    /// The agent in the snapshot speaks a protocol that this build does not.
    #[error(
        "the agent in the snapshot {name:?} speaks protocol {found:?}, this version of Cubebox speaks {known:?}"
    )]
    Protocol {
        /// The snapshot.
        name: String,
        /// Of the snapshot.
        found: String,
        /// Of this build.
        known: String,
    },
    /// The manifest names what is no file of its snapshot. It may come from another host, and must not lead to
    /// files of this one.
    #[error("the manifest of the snapshot {name:?} names {path:?}, which is no file of the snapshot")]
    Foreign {
        /// The snapshot.
        name: String,
        /// The path.
        path: String,
    },
    /// A file is not as long as the manifest says.
    #[error("{path} has {found} bytes, its manifest says {expected}: the snapshot is damaged")]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes found.
        found: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// A file has other contents than the manifest says.
    #[error("{path} has the digest {found}, its manifest says {expected}: the snapshot is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its digest.
        found: String,
        /// The one that it should have.
        expected: String,
    },
    /// It cannot be removed now.
    #[error("the snapshot {name:?} is being restored, exported or verified: try again when that is done")]
    InUse {
        /// The name.
        name: String,
    },
    /// What is to be imported is no snapshot, or not all of one.
    #[error("this is no snapshot that can be imported: {what}")]
    Archive {
        /// What is wrong with it.
        what: String,
    },
    /// What is to be imported is larger than imports may be.
    #[error(
        "the snapshot has {needed} bytes of data, and an import may have {limit}: if it is meant to be so large, raise snapshot.import_limit"
    )]
    Limit {
        /// Its size.
        needed: u64,
        /// That of the configuration.
        limit: u64,
    },
    /// What is to be imported is larger than what is free.
    #[error("the snapshot has {needed} bytes of data, and {free} are free on the file system of {dir}")]
    Space {
        /// The store.
        dir: PathBuf,
        /// Its size.
        needed: u64,
        /// What is free.
        free: u64,
    },
    /// The manifest has more of something than a snapshot can have.
    #[error("the manifest of the snapshot {name:?} names {found} {what}, and a snapshot has {max} at most")]
    Many {
        /// The snapshot.
        name: String,
        /// "files", for example.
        what: &'static str,
        /// How many.
        found: usize,
        /// How many there may be.
        max: usize,
    },
    /// The manifest says nothing by which the content of a file could be known.
    #[error("the manifest of the snapshot {name:?} is damaged: the digest of {path:?} is none")]
    NoDigest {
        /// The snapshot.
        name: String,
        /// The file.
        path: String,
    },
    /// The spec of a container is none.
    #[error(
        "the manifest of the snapshot {name:?} is damaged: {field} of the spec of its container {container:?} is no object"
    )]
    Spec {
        /// The snapshot.
        name: String,
        /// The container.
        container: String,
        /// What is not.
        field: &'static str,
    },
    /// What is to be imported cannot be read.
    #[error("cannot read what is to be imported")]
    Input(#[source] io::Error),
    /// The archive cannot be written.
    #[error("cannot write the archive")]
    Output(#[source] io::Error),
}

fn failed(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { action, path: path.into(), source }
}
