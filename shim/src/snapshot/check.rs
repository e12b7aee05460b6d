//! What a manifest may say. It may come from another host, or have been edited by hand.

use std::{fs, io::ErrorKind, path::Path};

use cube_protocol::version;
use serde_json::Value;

use super::{DISKS, MANIFEST, Manifest, SnapshotError, VM, failed};

/// Reads the manifest of the snapshot `name` in `dir`.
///
/// # Errors
///
/// [`SnapshotError::NotFound`] if there is none, and those of [`parse`].
pub(super) fn read(name: &str, dir: &Path) -> Result<Manifest, SnapshotError> {
    let path = dir.join(MANIFEST);
    let text = fs::read(&path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => {
            let dir = dir.parent().unwrap_or(dir).to_owned();
            SnapshotError::NotFound { name: name.into(), dir }
        }
        _ => failed("cannot read", &path)(source),
    })?;
    parse(name, &path, &text)
}

/// The manifest of the snapshot `name`, which is in the file `path`.
pub(super) fn parse(name: &str, path: &Path, text: &[u8]) -> Result<Manifest, SnapshotError> {
    let unreadable = |source| SnapshotError::Manifest { path: path.into(), source };
    let value: Value = serde_json::from_slice(text).map_err(unreadable)?;
    match value["format"].as_u64() {
        Some(found) if found != u64::from(Manifest::FORMAT) => {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            Err(SnapshotError::Format { name: name.into(), found, known: Manifest::FORMAT })
        }
        _ => serde_json::from_value(value).map_err(unreadable),
    }
}

/// Most files, disks and containers of a snapshot. One has four files of its VMM, and two disks for each container.
const MANY: usize = 64;

/// Longest name of a file: with its directory it fits into the header of a tar archive.
const NAME_MAX: usize = 90;

/// Longest file: the largest memory that a sandbox can have, and a disk has less.
const FILE_MAX: u64 = 16 << 40;

/// Checks that this build can go on from such a snapshot, and that it leads to no file but its own.
///
/// # Errors
///
/// [`SnapshotError::Protocol`] for an agent that could not be talked to, [`SnapshotError::Foreign`],
/// [`SnapshotError::Many`], [`SnapshotError::Spec`], and [`SnapshotError::Limit`] for a file that none can be.
pub(super) fn usable(name: &str, manifest: &Manifest) -> Result<(), SnapshotError> {
    let ours = version::CURRENT;
    if manifest.protocol.split('.').next() != Some(&ours.major.to_string()) {
        let (found, known) = (shortened(&manifest.protocol), ours.to_string());
        return Err(SnapshotError::Protocol { name: name.into(), found, known });
    }
    let counts = [
        ("files", manifest.files.len()),
        ("disks", manifest.disks.len()),
        ("containers", manifest.containers.len()),
    ];
    for (what, found) in counts {
        if found > MANY {
            return Err(SnapshotError::Many { name: name.into(), what, found, max: MANY });
        }
    }
    for container in &manifest.containers {
        is_spec(&container.spec).map_err(|field| SnapshotError::Spec {
            name: name.into(),
            container: shortened(&container.id),
            field,
        })?;
    }
    let foreign = |path: &str| Err(SnapshotError::Foreign { name: name.into(), path: shortened(path) });
    for (number, file) in manifest.files.iter().enumerate() {
        let twice = manifest.files[..number].iter().any(|other| other.path == file.path);
        if twice || !is_path(&file.path) {
            return foreign(&file.path);
        }
        if file.sha256.len() != 64 || !file.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SnapshotError::NoDigest { name: name.into(), path: file.path.clone() });
        }
        if file.bytes > FILE_MAX || file.data.is_some_and(|data| data > file.bytes) {
            return Err(SnapshotError::Limit {
                needed: file.bytes.max(file.data.unwrap_or(0)),
                limit: FILE_MAX,
            });
        }
    }
    for disk in &manifest.disks {
        let known = manifest.files.iter().any(|file| file.path == disk.file);
        if !known || !is_serial(&disk.serial) || disk.file != format!("{DISKS}/{}", disk.serial) {
            return foreign(&disk.file);
        }
    }
    Ok(())
}

/// Checks that every file is there, is a file, and has the length that it should have.
///
/// # Errors
///
/// [`SnapshotError::Foreign`] for what is no file, [`SnapshotError::Length`].
pub(super) fn lengths(name: &str, manifest: &Manifest, dir: &Path) -> Result<(), SnapshotError> {
    for file in &manifest.files {
        let path = dir.join(&file.path);
        let meta = fs::symlink_metadata(&path).map_err(failed("cannot open", &path))?;
        if !meta.is_file() {
            return Err(SnapshotError::Foreign { name: name.into(), path: file.path.clone() });
        }
        if meta.len() != file.bytes {
            return Err(SnapshotError::Length { path, found: meta.len(), expected: file.bytes });
        }
    }
    Ok(())
}

/// Checks that what is set in a spec before it is given to containerd can be set; else gives what cannot.
fn is_spec(spec: &Value) -> Result<(), &'static str> {
    let object = |field: &'static str, value: Option<&Value>| match value {
        None | Some(Value::Null | Value::Object(_)) => Ok(()),
        Some(_) => Err(field),
    };
    if !spec.is_object() {
        return Err("the whole");
    }
    object("annotations", spec.get("annotations"))?;
    object("process", spec.get("process"))
}

/// What a manifest says, for messages.
fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Whether it can be the path of a file of a snapshot, below it: a plain name in one of its two directories.
fn is_path(path: &str) -> bool {
    let name = [VM, DISKS].iter().find_map(|sub| path.strip_prefix(sub)?.strip_prefix('/'));
    name.is_some_and(|name| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=NAME_MAX).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(plain)
    })
}

/// Whether it can be the serial of a virtio-blk device, and a file name.
fn is_serial(serial: &str) -> bool {
    (1..=20).contains(&serial.len())
        && serial.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}
