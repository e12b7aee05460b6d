//! What containerd's Checkpoint leaves in the directory that it gives.
//!
//! containerd packs that directory into its content store. So it holds no memory and no disk, but a file
//! of a few hundred bytes that names a snapshot in our own store.

use std::path::{Path, PathBuf};

use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    shim::oci::CheckpointOptions,
};
use serde::Deserialize;
use serde_json::json;

use crate::{
    errors::Error,
    options::OptionsError,
    snapshot::{Listed, SnapshotError},
};

/// Name of the file.
const FILE: &str = "cube-snapshot.json";

/// Type of the options that containerd's clients send, without the host that `Any` may have before it.
const OPTIONS_TYPE: &str = "containerd.runc.v1.CheckpointOptions";

/// A checkpoint as it was asked for.
pub(super) struct Wanted {
    path: String,
}

impl Wanted {
    /// Checks the request.
    ///
    /// # Errors
    ///
    /// [`Error::Unimplemented`] for options that ask for more than a snapshot that the sandbox outlives.
    pub(super) fn read(path: String, options: Option<&Any>) -> Result<Wanted, Error> {
        if !Path::new(&path).is_absolute() {
            let reason = "it must be an absolute path";
            return Err(Error::Argument { field: "path", value: path, reason });
        }
        let options = match options {
            Some(any) if any.type_url.rsplit('/').next() == Some(OPTIONS_TYPE) => {
                CheckpointOptions::parse_from_bytes(&any.value)
                    .map_err(|source| OptionsError::Decode { type_url: any.type_url.clone(), source })?
            }
            _ => CheckpointOptions::new(),
        };
        let refused = |what: &str, hint| Err(Error::Unimplemented { what: what.into(), hint });
        if options.exit {
            return refused("a checkpoint that ends the container", ": take one, and kill it then");
        }
        if !options.image_path.is_empty() {
            return refused("image_path", ": the data stays in snapshot.dir of the configuration");
        }
        Ok(Wanted { path })
    }

    /// The directory, which exists or not.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Names the snapshot there.
    pub(super) async fn write(&self, snapshot: &Listed) -> Result<(), Error> {
        let dir = PathBuf::from(&self.path);
        let text = json!({
            "snapshot": snapshot.manifest.name,
            "format": snapshot.manifest.format,
            "created_ns": snapshot.manifest.created_ns,
        });
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| SnapshotError::Io { action: "cannot write", path, source }
        };
        tokio::fs::create_dir_all(&dir).await.map_err(failed(&dir))?;
        let file = dir.join(FILE);
        tokio::fs::write(&file, text.to_string()).await.map_err(failed(&file))?;
        Ok(())
    }
}

/// The name of the snapshot that a checkpoint stands for; `dir` as containerd has unpacked it.
pub(super) async fn read(dir: &str) -> Result<String, Error> {
    let file = Path::new(dir).join(FILE);
    let failed = |source| SnapshotError::Io {
        action: "this is no checkpoint of ours: cannot read",
        path: file.clone(),
        source,
    };
    let text = tokio::fs::read(&file).await.map_err(failed)?;
    let named: Named = serde_json::from_slice(&text)
        .map_err(|source| SnapshotError::Manifest { path: file.clone(), source })?;
    Ok(named.snapshot)
}

/// What is read of the file.
#[derive(Deserialize)]
struct Named {
    snapshot: String,
}
