//! A snapshot as this sandbox may have it: with sockets and disks of its own.
//!
//! Cloud Hypervisor reads the directory that it restores from and finds everything else in its
//! config.json. So it gets a directory in the sandbox's run directory, with an edited copy of that, and
//! links to the large files. Nothing of the original is written to.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, BufReader},
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tracing::warn;

use super::{
    super::{
        Disk, SnapshotDefect, VSOCK_SOCKET, VmSpec, VmmError, WRITTEN_BY, program::CLOUD_HYPERVISOR_HINT,
    },
    config::ENTROPY,
    snapshot::{CONFIG, MEMORY, STATE},
    version::may_restore,
};
use crate::{files, snapshot::WrittenBy};

/// Name of the directory in the run directory.
const DIR: &str = "restore";

/// What Cloud Hypervisor restores from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) dir: PathBuf,
    pub(super) memory_bytes: u64,
}

/// Makes the directory to restore from.
pub(super) fn prepare(spec: &VmSpec, snapshot: &Path) -> Result<Source, VmmError> {
    let unusable = |source| VmmError::Restore { dir: snapshot.into(), source };
    let config = read(snapshot).and_then(|config| edit(config, spec)).map_err(unusable)?;
    for file in [STATE, MEMORY] {
        let found = fs::metadata(snapshot.join(file));
        found.map_err(|source| unusable(SnapshotDefect::Unreadable { file, source }))?;
    }
    let memory_bytes = memory_bytes(&config).map_err(unusable)?;
    let dir = spec.run_dir.join(DIR);
    write(&dir, snapshot, &config).map_err(|source| VmmError::Io {
        action: "cannot make a directory to restore from,",
        path: dir.clone(),
        source,
    })?;
    Ok(Source { dir, memory_bytes })
}

/// Fails if Cloud Hypervisor `ours` is older than the one that has written the snapshot.
pub(super) fn check_version(snapshot: &Path, ours: &str) -> Result<(), VmmError> {
    let unusable = |source| VmmError::Restore { dir: snapshot.into(), source };
    let unreadable = |source| unusable(SnapshotDefect::Unreadable { file: WRITTEN_BY, source });
    let text = fs::read(snapshot.join(WRITTEN_BY)).map_err(unreadable)?;
    let by: WrittenBy = serde_json::from_slice(&text).map_err(|error| unreadable(error.into()))?;
    if !may_restore(ours, &by.version) {
        let (theirs, ours) = (by.version, ours.to_owned());
        return Err(unusable(SnapshotDefect::Newer { theirs, ours, hint: CLOUD_HYPERVISOR_HINT }));
    }
    if ours != by.version {
        warn!(snapshot = %snapshot.display(), by = by.version, ours, "restoring what another version has written");
    }
    Ok(())
}

/// The body of vm.restore.
///
/// Memory is copied before the guest runs. Loading it on demand (userfaultfd) lets the guest run earlier,
/// but Cloud Hypervisor then touches every page in the background, those that the guest never used
/// included; it needs the snapshot to stay as it is meanwhile, ends the VM when a page cannot be read,
/// and refuses another snapshot until it is done.
pub(super) fn request(url: &str) -> Value {
    json!({"source_url": url, "memory_restore_mode": "Copy"})
}

/// All that is read of the host then.
pub(super) fn files(spec: &VmSpec) -> Result<Vec<PathBuf>, VmmError> {
    let dir = spec.run_dir.join(DIR);
    let links = [STATE, MEMORY].map(|file| dir.join(file));
    let mut files = vec![dir.clone(), dir.join(CONFIG)];
    for link in links {
        let to = fs::read_link(&link);
        files.push(to.map_err(|source| VmmError::Io { action: "cannot read", path: link, source })?);
    }
    Ok(files)
}

fn write(dir: &Path, snapshot: &Path, config: &Map<String, Value>) -> io::Result<()> {
    files::remove(dir)?;
    DirBuilder::new().mode(0o700).create(dir)?;
    fs::write(dir.join(CONFIG), serde_json::to_vec(config)?)?;
    for file in [STATE, MEMORY] {
        symlink(snapshot.join(file), dir.join(file))?;
    }
    Ok(())
}

fn read(snapshot: &Path) -> Result<Map<String, Value>, SnapshotDefect> {
    let unreadable = |source| SnapshotDefect::Unreadable { file: CONFIG, source };
    let file = File::open(snapshot.join(CONFIG)).map_err(unreadable)?;
    serde_json::from_reader(BufReader::new(file)).map_err(|error| unreadable(error.into()))
}

fn memory_bytes(config: &Map<String, Value>) -> Result<u64, SnapshotDefect> {
    let size = config.get("memory").and_then(|memory| memory["size"].as_u64());
    size.ok_or(SnapshotDefect::Lacks { expected: "how much memory the VM has" })
}

/// Virtual CPUs and MiB of memory of the VM that was written to `snapshot`, if that says it.
pub fn size_in(snapshot: &Path) -> Option<(u32, u64)> {
    let config = read(snapshot).ok()?;
    let vcpus = config.get("cpus")?["boot_vcpus"].as_u64()?;
    Some((u32::try_from(vcpus).ok()?, memory_bytes(&config).ok()?.div_ceil(1 << 20)))
}

/// The configuration for this sandbox.
///
/// A snapshot may come from another host, and a configuration can name any file, socket or device of
/// this one. So what is known is replaced, or plain, and what is not known has to be empty.
fn edit(mut config: Map<String, Value>, spec: &VmSpec) -> Result<Map<String, Value>, SnapshotDefect> {
    if spec.share.is_some() {
        return Err(SnapshotDefect::Share);
    }
    // The guest has its kernel in memory. Cloud Hypervisor opens the initramfs all the same, and insists
    // on the name of a kernel, which it does not open.
    config.insert("payload".into(), json!({"kernel": "/dev/null"}));
    for (key, value) in &mut config {
        match key.as_str() {
            "cpus" | "memory" | "payload" => {}
            "disks" => *value = disks(value, &spec.disks)?,
            "vsock" => {
                let socket = json!(spec.run_dir.join(VSOCK_SOCKET));
                fields(value, "which vsock it has")?.insert("socket".into(), socket);
            }
            "rng" => drop(fields(value, "where randomness is from")?.insert("src".into(), ENTROPY.into())),
            // The devices are in the snapshot's state and have to stay; where they lead is up to us.
            "serial" => *value = json!({"mode": mode(value, "Tty", "that the serial console is a Tty")?}),
            "console" | "debug_console" => drop(mode(value, "Off", "that other consoles are off")?),
            _ if is_empty(value) => {}
            _ => return Err(SnapshotDefect::Foreign { key: key.clone() }),
        }
        if !is_plain(value) && key != "disks" {
            return Err(SnapshotDefect::Foreign { key: key.clone() });
        }
    }
    for (key, expected) in [("vsock", "which vsock it has"), ("serial", "which serial console it has")] {
        if !config.contains_key(key) {
            return Err(SnapshotDefect::Lacks { expected });
        }
    }
    Ok(config)
}

/// The disks of the snapshot with the files that take their place.
fn disks(known: &Value, given: &[Disk]) -> Result<Value, SnapshotDefect> {
    let mut known = known.as_array().cloned().unwrap_or_default();
    let mut serials = Vec::new();
    for device in &mut known {
        let serial = device["serial"].as_str().unwrap_or_default().to_owned();
        let Some(disk) = given.iter().find(|disk| disk.serial == serial) else {
            return Err(SnapshotDefect::DiskNotGiven { serial });
        };
        let read_only = device["readonly"].as_bool().unwrap_or_default();
        if read_only != disk.read_only {
            let [known, given] = [read_only, disk.read_only].map(access);
            return Err(SnapshotDefect::DiskAccess { serial, known, given });
        }
        if !is_plain(device) || device["vhost_user"] == true {
            return Err(SnapshotDefect::Foreign { key: format!("disks: {serial}") });
        }
        fields(device, "what its disks are")?.extend([
            ("path".into(), json!(disk.path)),
            ("image_type".into(), "Raw".into()),
            ("backing_files".into(), false.into()),
        ]);
        serials.push(serial);
    }
    match given.iter().find(|disk| !serials.contains(&disk.serial)) {
        Some(disk) => Err(SnapshotDefect::DiskNotInIt { serial: disk.serial.clone() }),
        None => Ok(known.into()),
    }
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

fn fields<'a>(
    object: &'a mut Value,
    expected: &'static str,
) -> Result<&'a mut Map<String, Value>, SnapshotDefect> {
    object.as_object_mut().ok_or(SnapshotDefect::Lacks { expected })
}

fn mode(console: &Value, mode: &'static str, expected: &'static str) -> Result<&'static str, SnapshotDefect> {
    if console["mode"] == mode { Ok(mode) } else { Err(SnapshotDefect::Lacks { expected }) }
}

/// Numbers, words and flags, or objects of those; no list, in which memory zones with files would be.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().all(is_plain),
        Value::Array(list) => list.is_empty(),
        _ => true,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::errors::chain;

    /// What Cloud Hypervisor 54 wrote for a VM with two disks, the second of them hot-plugged.
    const ORIGINAL: &str = include_str!("testdata/config.json");

    #[test]
    fn making_the_directory_anew_costs_nobody_a_file() {
        files::testing::costs_nobody_a_file(
            |root| {
                write(&root.join(DIR), Path::new("/no/such"), &Map::new()).unwrap();
                root.join(DIR)
            },
            |root| {
                write(&root.join(DIR), Path::new("/no/such"), &Map::new())?;
                files::remove(&root.join(DIR))
            },
        );
    }

    struct Lab {
        dir: tempfile::TempDir,
        spec: VmSpec,
    }

    impl Lab {
        fn new() -> Lab {
            let dir = tempfile::tempdir().unwrap();
            let (snapshot, run_dir) = (dir.path().join("snapshot"), dir.path().join("run"));
            fs::create_dir(&snapshot).unwrap();
            fs::create_dir(&run_dir).unwrap();
            fs::write(snapshot.join(CONFIG), ORIGINAL).unwrap();
            fs::write(snapshot.join(STATE), "{}").unwrap();
            fs::write(snapshot.join(MEMORY), "memory").unwrap();
            let disk = |serial: &str| Disk {
                path: dir.path().join(serial),
                serial: serial.into(),
                read_only: false,
            };
            let spec = VmSpec {
                sandbox_id: "clone".into(),
                run_dir,
                cgroup: "/nonexistent".into(),
                user: 0,
                group: 0,
                vcpus: 9,
                memory_mib: 9999,
                share: None,
                disks: vec![disk("hot-1"), disk("rootfs-0")],
                cmdline: String::new(),
                restore: Some(snapshot),
            };
            Lab { dir, spec }
        }

        fn snapshot(&self) -> PathBuf {
            self.dir.path().join("snapshot")
        }

        fn prepare(&self) -> Result<Source, VmmError> {
            prepare(&self.spec, &self.snapshot())
        }

        /// Prepares after a change of the snapshot's config.json.
        fn prepare_with(&self, change: impl Fn(&mut Value)) -> Result<Source, VmmError> {
            let mut config: Value = serde_json::from_str(ORIGINAL).unwrap();
            change(&mut config);
            fs::write(self.snapshot().join(CONFIG), config.to_string()).unwrap();
            self.prepare()
        }
    }

    fn text(result: Result<Source, VmmError>) -> String {
        chain(&result.unwrap_err())
    }

    #[test]
    fn a_clone_has_its_own_socket_and_disks_and_is_else_the_same() {
        let lab = Lab::new();
        let source = lab.prepare().unwrap();
        let edited: Value = serde_json::from_slice(&fs::read(source.dir.join(CONFIG)).unwrap()).unwrap();
        let mut expected: Value = serde_json::from_str(ORIGINAL).unwrap();
        expected["vsock"]["socket"] = json!(lab.spec.run_dir.join(VSOCK_SOCKET));
        expected["disks"][0]["path"] = json!(lab.dir.path().join("rootfs-0"));
        expected["disks"][1]["path"] = json!(lab.dir.path().join("hot-1"));
        expected["payload"] = json!({"kernel": "/dev/null"});
        assert_eq!(edited, expected);
        assert_eq!(source.memory_bytes, 256 << 20, "what the snapshot says, not what a new VM would get");
    }

    #[test]
    fn nothing_is_copied_but_the_configuration_and_nothing_is_written_to_the_original() {
        let lab = Lab::new();
        let source = lab.prepare().unwrap();
        for file in [STATE, MEMORY] {
            assert_eq!(fs::read_link(source.dir.join(file)).unwrap(), lab.snapshot().join(file));
        }
        assert_eq!(fs::metadata(&source.dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_to_string(lab.snapshot().join(CONFIG)).unwrap(), ORIGINAL);
        lab.prepare().expect("a second time, in a run directory that was used");
        assert_eq!(fs::read_to_string(lab.snapshot().join(MEMORY)).unwrap(), "memory");
    }

    #[test]
    fn disks_are_told_by_serial_and_each_needs_its_counterpart() {
        let mut lab = Lab::new();
        let hot = lab.spec.disks.remove(0);
        assert!(text(lab.prepare()).contains("\"hot-1\", for which no file was given"));
        lab.spec.disks.push(Disk { read_only: true, ..hot.clone() });
        assert!(text(lab.prepare()).contains("\"hot-1\" as writable, and the file was given as read-only"));
        lab.spec.disks.push(Disk { serial: "more".into(), ..hot.clone() });
        lab.spec.disks[1].read_only = false;
        assert!(text(lab.prepare()).contains("no disk with the serial \"more\""));
    }

    #[test]
    fn a_configuration_cannot_reach_for_other_things_of_this_host() {
        let lab = Lab::new();
        lab.prepare_with(|config| config["net"] = Value::Null).unwrap();
        lab.prepare_with(|config| config["fs"] = json!([])).unwrap();
        for (key, value) in [
            ("fs", json!([{"tag": "cube", "socket": "/x"}])),
            ("net", json!([{"tap": "tap0"}])),
            ("devices", json!([{"path": "/sys/bus/pci/devices/0000:00:02.0"}])),
            ("pmem", json!([{"file": "/etc/shadow"}])),
            ("platform", json!({"iommufd": true})),
            ("gdb", json!(true)),
            ("something_new", json!("/x")),
        ] {
            let error = text(lab.prepare_with(|config| config[key] = value.clone()));
            assert!(error.contains(&format!("has {key:?}")), "{error}");
        }
        let zones = json!([{"id": "a", "size": 1, "file": "/etc/shadow"}]);
        assert!(text(lab.prepare_with(|c| c["memory"]["zones"] = zones.clone())).contains("has \"memory\""));
        let error = text(lab.prepare_with(|config| config["disks"][0]["vhost_user"] = true.into()));
        assert!(error.contains("has \"disks: rootfs-0\""), "{error}");
        let edited = lab.prepare_with(|config| config["rng"]["src"] = "/etc/shadow".into()).unwrap();
        assert!(!fs::read_to_string(edited.dir.join(CONFIG)).unwrap().contains("shadow"));
    }

    #[test]
    fn what_is_missing_is_named_with_the_directory() {
        let lab = Lab::new();
        for (key, expected) in [
            ("vsock", "which vsock it has"),
            ("serial", "which serial console it has"),
            ("memory", "how much memory the VM has"),
        ] {
            let error = text(lab.prepare_with(|config| drop(config.as_object_mut().unwrap().remove(key))));
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(lab.snapshot().to_str().unwrap()), "{error}");
        }
        for nonsense in [Value::Null, json!(5), json!("x"), json!([1])] {
            for key in ["vsock", "rng", "serial", "console", "memory"] {
                lab.prepare_with(|config| config[key] = nonsense.clone()).unwrap_err();
            }
            lab.prepare_with(|config| config["disks"] = nonsense.clone()).unwrap_err();
            lab.prepare_with(|config| config["disks"][0] = nonsense.clone()).unwrap_err();
        }
        let error = text(lab.prepare_with(|config| config["serial"]["mode"] = "File".into()));
        assert!(error.contains("that the serial console is a Tty"), "{error}");
        fs::write(lab.snapshot().join(CONFIG), &ORIGINAL[..100]).unwrap();
        assert!(text(lab.prepare()).contains("cannot read config.json"));
        fs::write(lab.snapshot().join(CONFIG), ORIGINAL).unwrap();
        fs::remove_file(lab.snapshot().join(MEMORY)).unwrap();
        assert!(text(lab.prepare()).contains("cannot read memory-ranges: No such file"));
    }

    #[test]
    fn what_a_newer_version_has_written_is_refused_with_both() {
        let lab = Lab::new();
        let check = |ours| check_version(&lab.snapshot(), ours).map_err(|error| chain(&error));
        assert!(check("v54.0").unwrap_err().contains("cannot read vmm.json"));
        fs::write(lab.snapshot().join(WRITTEN_BY), r#"{"name":"cloud-hypervisor","version":"v54.1"}"#)
            .unwrap();
        check("v54.1").unwrap();
        check("v55.0").unwrap();
        let error = check("v54.0").unwrap_err();
        for part in ["v54.1", "v54.0", "install"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_vm_with_a_shared_directory_has_no_snapshot() {
        let mut lab = Lab::new();
        lab.spec.share = Some("/share".into());
        assert!(text(lab.prepare()).contains("no shared directory"));
    }
}
