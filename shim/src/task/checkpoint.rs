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
    /// Where a copy of the snapshot's data is to be.
    pub(super) image_path: Option<PathBuf>,
    /// Whether the container is to end with it.
    pub(super) exit: bool,
}

impl Wanted {
    /// Checks the request.
    ///
    /// # Errors
    ///
    /// [`Error::Unimplemented`] for what only CRIU can do, which takes processes one by one. What it has to be
    /// allowed (`open_tcp`, `external_unix_sockets`, `terminal`, `file_locks`) is in the memory of a VM anyway:
    /// containerd's own client always sets `file_locks`.
    pub(super) fn read(path: String, options: Option<&Any>) -> Result<Wanted, Error> {
        absolute("path", &path)?;
        let options = match options {
            Some(any) if any.type_url.rsplit('/').next() == Some(OPTIONS_TYPE) => {
                CheckpointOptions::parse_from_bytes(&any.value)
                    .map_err(|source| OptionsError::Decode { type_url: any.type_url.clone(), source })?
            }
            _ => CheckpointOptions::new(),
        };
        for (name, is_set) in [
            ("empty_namespaces", !options.empty_namespaces.is_empty()),
            ("cgroups_mode", !options.cgroups_mode.is_empty()),
            ("work_path", !options.work_path.is_empty()),
        ] {
            if is_set {
                let what = format!("the checkpoint option {name}");
                return Err(Error::Unimplemented { what, hint: ": it is for CRIU, and this is a VM" });
            }
        }
        let image_path = match options.image_path.as_str() {
            "" => None,
            dir => Some(absolute("image_path", dir)?.to_owned()),
        };
        Ok(Wanted { path, image_path, exit: options.exit })
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

fn absolute<'a>(field: &'static str, path: &'a str) -> Result<&'a Path, Error> {
    match Path::new(path) {
        absolute if absolute.is_absolute() => Ok(absolute),
        _ => Err(Error::Argument { field, value: path.into(), reason: "it must be an absolute path" }),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &CheckpointOptions) -> Result<Wanted, Error> {
        let any = Any {
            type_url: OPTIONS_TYPE.into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        Wanted::read("/checkpoint".into(), Some(&any))
    }

    #[test]
    fn a_copy_and_an_end_can_be_asked_for() {
        let wanted =
            read(&CheckpointOptions { exit: true, image_path: "/image".into(), ..Default::default() });
        let wanted = wanted.unwrap();
        assert!(wanted.exit && wanted.image_path.as_deref() == Some(Path::new("/image")));
        let wanted = Wanted::read("/checkpoint".into(), None).unwrap();
        assert!(!wanted.exit && wanted.image_path.is_none());
    }

    #[test]
    fn what_a_vm_keeps_anyway_may_be_asked_for() {
        let options = CheckpointOptions {
            open_tcp: true,
            external_unix_sockets: true,
            terminal: true,
            file_locks: true,
            ..Default::default()
        };
        assert!(!read(&options).unwrap().exit);
    }

    #[test]
    fn what_only_criu_can_do_is_refused_by_name() {
        type Set = fn(&mut CheckpointOptions);
        let options: [(&str, Set); 3] = [
            ("empty_namespaces", |options| options.empty_namespaces.push("network".into())),
            ("cgroups_mode", |options| options.cgroups_mode = "soft".into()),
            ("work_path", |options| options.work_path = "/work".into()),
        ];
        for (name, set) in options {
            let mut options = CheckpointOptions::new();
            set(&mut options);
            let Err(Error::Unimplemented { what, .. }) = read(&options) else { panic!("{name} is taken") };
            assert!(what.contains(name), "{what}");
        }
    }

    #[test]
    fn paths_are_absolute() {
        let relative = CheckpointOptions { image_path: "image".into(), ..Default::default() };
        assert!(matches!(read(&relative), Err(Error::Argument { field: "image_path", .. })));
        assert!(matches!(Wanted::read("path".into(), None), Err(Error::Argument { field: "path", .. })));
    }
}
