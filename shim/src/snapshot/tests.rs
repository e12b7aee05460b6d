//! The contract of the store.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::SystemTime,
};

use cube_protocol::version;

use super::*;
use crate::vmm::Disk;

pub(super) struct Place {
    pub(super) dir: tempfile::TempDir,
    pub(super) store: Store,
}

pub(super) fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("snapshots"));
    Place { dir, store }
}

pub(super) fn manifest(name: &str) -> Manifest {
    Manifest {
        format: 1,
        name: name.into(),
        created_ns: 7,
        cubebox: "0.1.0".into(),
        agent: "0.1.0".into(),
        protocol: version::CURRENT.to_string(),
        vmm: WrittenBy::default(),
        origin: Origin { namespace: "ns".into(), sandbox: "c1".into(), timeline: 5, backend: "x".into() },
        owner: None,
        template: None,
        containers: Vec::new(),
        last_event: 3,
        streams: Vec::new(),
        disks: Vec::new(),
        files: Vec::new(),
    }
}

impl Place {
    pub(super) fn disks(&self) -> Vec<Disk> {
        [("image", true), ("writable", false)]
            .map(|(serial, read_only)| {
                let path = self.dir.path().join(serial);
                fs::write(&path, serial).unwrap();
                Disk { path, serial: serial.into(), read_only }
            })
            .into()
    }

    pub(super) fn make(&self, name: &str) -> Listed {
        let draft = self.store.begin(name).unwrap();
        fs::write(draft.vm_dir().join("state.json"), "{}").unwrap();
        let disks = self.disks();
        draft.copies(&disks).make().unwrap();
        draft.finish(manifest(name), &disks).unwrap()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.store.list().unwrap().into_iter().map(|listed| listed.unwrap().manifest.name).collect()
    }

    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join("snapshots").join(below)
    }
}

#[test]
fn a_snapshot_is_complete_when_it_has_its_name() {
    let place = place();
    let draft = place.store.begin("one").unwrap();
    assert!(place.names().is_empty());
    draft.discard().unwrap();
    let made = place.make("one");
    assert_eq!(place.names(), ["one"]);
    let (manifest, dir) = place.store.open("one").unwrap();
    assert_eq!(manifest, made.manifest);
    let files: Vec<_> = manifest.files.iter().map(|file| (file.path.as_str(), file.bytes)).collect();
    assert_eq!(files, [("vm/state.json", 2), ("disks/image", 5), ("disks/writable", 8)]);
    // printf '\0\0\0\0\0\0\0\0writable' | sha256sum
    assert!(manifest.files[2].sha256.starts_with("01257c3e7d88"), "{}", manifest.files[2].sha256);
    assert_eq!(fs::read(dir.join(&manifest.disks[1].file)).unwrap(), b"writable");
}

#[test]
fn what_the_guest_writes_later_is_not_in_it() {
    let place = place();
    let (draft, disks) = (place.store.begin("one").unwrap(), place.disks());
    draft.copies(&disks).make().unwrap();
    fs::write(&disks[1].path, "changed!").unwrap();
    draft.finish(manifest("one"), &disks).unwrap();
    assert_eq!(fs::read(place.path("one/disks/writable")).unwrap(), b"writable");
}

#[test]
fn a_manifest_leads_to_no_file_of_the_host() {
    let place = place();
    place.make("one");
    let path = place.path("one/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("\"file\": \"disks/writable\"", "\"file\": \"/etc/passwd\""),
        ("\"file\": \"disks/writable\"", "\"file\": \"disks/../manifest.json\""),
        ("\"serial\": \"writable\"", "\"serial\": \"../writable\""),
        ("\"path\": \"vm/state.json\"", "\"path\": \"/etc/passwd\""),
        ("\"path\": \"vm/state.json\"", "\"path\": \"vm/../manifest.json\""),
        ("\"path\": \"vm/state.json\"", "\"path\": \"vm/.state.json\""),
        ("\"path\": \"vm/state.json\"", "\"path\": \"vm/\""),
        ("\"path\": \"vm/state.json\"", "\"path\": \"disks/image\""),
    ] {
        let forged = text.replace(from, to);
        assert_ne!(forged, text);
        fs::write(&path, forged).unwrap();
        let refused = place.store.open("one").unwrap_err();
        assert!(matches!(refused, SnapshotError::Foreign { .. }), "{to}: {refused}");
    }
    fs::write(&path, text).unwrap();
    place.store.open("one").unwrap();
    fs::remove_file(place.path("one/disks/writable")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", place.path("one/disks/writable")).unwrap();
    assert!(matches!(place.store.open("one"), Err(SnapshotError::Foreign { .. })));
}

#[test]
fn a_sandbox_may_be_deleted_before_its_snapshot_is_complete() {
    let place = place();
    let (draft, disks) = (place.store.begin("one").unwrap(), place.disks());
    draft.copies(&disks).make().unwrap();
    disks.iter().for_each(|disk| fs::remove_file(&disk.path).unwrap());
    draft.finish(manifest("one"), &disks).unwrap();
    assert_eq!(fs::read(place.path("one/disks/image")).unwrap(), b"image");
}

#[test]
fn a_name_is_had_once_and_leads_nowhere_else() {
    let place = place();
    place.make("one");
    let state = |error: SnapshotError| match error {
        SnapshotError::Exists { state, .. } => state,
        other => panic!("{other}"),
    };
    assert_eq!(state(place.store.begin("one").unwrap_err()), "exists");
    let _draft = place.store.begin("two").unwrap();
    assert_eq!(state(place.store.begin("two").unwrap_err()), "is being made");
    for name in ["", "..", "../x", "a/b", ".hidden"] {
        assert!(matches!(place.store.open(name), Err(SnapshotError::Name(_))), "{name}");
        assert!(matches!(place.store.remove(name), Err(SnapshotError::Name(_))), "{name}");
    }
    assert!(matches!(place.store.open("three"), Err(SnapshotError::NotFound { .. })));
    assert!(matches!(place.store.remove("three"), Err(SnapshotError::NotFound { .. })));
}

#[test]
fn what_was_left_half_made_goes_and_what_is_being_made_stays() {
    let place = place();
    fs::create_dir_all(place.path(".dead.new/vm")).unwrap();
    fs::create_dir_all(place.path(".gone.old/vm")).unwrap();
    let draft = place.store.begin("alive").unwrap();
    assert_eq!(place.store.collect(true).unwrap().len(), 2);
    assert_eq!(place.store.collect(false).unwrap(), [place.path(".dead.new"), place.path(".gone.old")]);
    assert!(draft.vm_dir().exists() && !place.path(".dead.new").exists());
    drop(draft);
    fs::write(place.path(".alive.new/vm/leftover"), "x").unwrap();
    place.make("alive");
    assert!(!place.path("alive/vm/leftover").exists());
    place.store.remove("alive").unwrap();
    assert!(place.names().is_empty() && !place.path("alive").exists());
}

#[test]
fn what_cannot_work_is_refused_with_both_versions() {
    let place = place();
    place.make("one");
    let path = place.path("one/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let refused = |from: &str, to: &str| {
        fs::write(&path, text.replace(from, to)).unwrap();
        place.store.open("one").unwrap_err().to_string()
    };
    let error = refused("\"format\": 1", "\"format\": 2");
    assert!(error.contains("format 2") && error.contains("format 1"), "{error}");
    let ours = version::CURRENT.to_string();
    let error = refused(&format!("\"protocol\": \"{ours}\""), "\"protocol\": \"2.0\"");
    assert!(error.contains("2.0") && error.contains(&ours), "{error}");
    refused("\"containers\"", "\"container\"");
    fs::write(&path, &text).unwrap();
    fs::write(place.path("one/disks/writable"), "short").unwrap();
    let error = place.store.open("one").unwrap_err().to_string();
    assert!(error.contains("disks/writable has 5 bytes") && error.contains("says 8"), "{error}");
}

#[test]
fn contents_are_read_when_a_file_has_changed_and_only_then() {
    let place = place();
    place.make("one");
    let mut read = 0;
    let mut hold = || {
        read = 0;
        let held = place.store.hold("one", &mut |done, _| {
            read = done;
            Ok(())
        });
        (held.map(drop), read)
    };
    let (held, read) = hold();
    held.unwrap();
    assert_eq!(read, 0, "finish has seen all of it");
    // The same content in another file.
    let path = place.path("one/disks/writable");
    fs::rename(&path, place.path("old")).unwrap();
    fs::write(&path, "writable").unwrap();
    let (held, read) = hold();
    held.unwrap();
    assert_eq!(read, 8, "that file alone");
    assert_eq!(hold().1, 0);
    // Another content in the same file, of the same length.
    fs::write(&path, "WRITABLE").unwrap();
    File::open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    for _ in 0..2 {
        let error = hold().0.unwrap_err();
        assert!(
            matches!(&error, SnapshotError::Damaged { path, .. } if path.ends_with("writable")),
            "{error}"
        );
    }
    place.store.open("one").expect("nobody has read it");
    fs::remove_file(place.path("one/verified.json")).unwrap();
    fs::write(&path, "writable").unwrap();
    assert_eq!(hold().1, 15, "without a stamp everything is read");
}

#[test]
fn damage_that_left_no_trace_is_found_when_it_is_looked_for() {
    let place = place();
    place.make("one");
    place.store.verify("one", &mut untold).unwrap();
    let path = place.path("one/disks/writable");
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "wrytable").unwrap();
    File::open(&path).unwrap().set_modified(modified).unwrap();
    place.store.hold("one", &mut untold).unwrap();
    let error = place.store.verify("one", &mut untold).unwrap_err();
    assert!(matches!(error, SnapshotError::Damaged { .. }), "{error}");
}

#[test]
fn what_is_being_read_cannot_be_removed_and_what_is_removed_cannot_be_read() {
    let place = place();
    place.make("one");
    let (a, b) =
        (place.store.hold("one", &mut untold).unwrap(), place.store.hold("one", &mut untold).unwrap());
    drop(a);
    assert!(matches!(place.store.remove("one"), Err(SnapshotError::InUse { .. })));
    assert!(b.dir.join(&b.manifest.files[0].path).exists());
    drop(b);
    place.store.remove("one").unwrap();
    assert!(matches!(place.store.hold("one", &mut untold), Err(SnapshotError::NotFound { .. })));
}

#[test]
fn a_verification_can_be_ended() {
    let place = place();
    place.make("one");
    let error = place.store.verify("one", &mut |_, _| Err(std::io::ErrorKind::Interrupted.into()));
    assert!(matches!(error, Err(SnapshotError::Io { .. })), "{error:?}");
}

#[test]
fn the_manifest_says_what_the_vmm_says_of_itself() {
    let place = place();
    let draft = place.store.begin("one").unwrap();
    let by = WrittenBy { name: "vmm".into(), version: "v7.1".into() };
    fs::write(draft.vm_dir().join(crate::vmm::WRITTEN_BY), serde_json::to_vec(&by).unwrap()).unwrap();
    assert_eq!(draft.finish(manifest("one"), &[]).unwrap().manifest.vmm, by);
}

#[test]
fn removing_snapshots_and_their_parts_costs_nobody_a_file() {
    use crate::files::testing::costs_nobody_a_file;
    let begin = |root: &Path| drop(Store::at(root).begin("one").unwrap());
    let collect = |root: &Path| Store::at(root).collect(false).map(drop);
    let part = |below: &'static str| {
        move |root: &Path| {
            begin(root);
            root.join(below)
        }
    };
    costs_nobody_a_file(part(".one.new"), collect);
    costs_nobody_a_file(part(".one.new/vm"), collect);
    costs_nobody_a_file(part(".one.new"), |root| match Store::at(root).begin("one") {
        Ok(draft) => draft.discard(),
        Err(e) => Err(e),
    });
    costs_nobody_a_file(
        |root| {
            Store::at(root).begin("one").unwrap().finish(manifest("one"), &[]).unwrap();
            root.join("one")
        },
        |root| Store::at(root).remove("one"),
    );
}

#[test]
fn what_looks_like_a_part_of_a_snapshot_and_is_somebodys_stays() {
    let place = place();
    place.make("one");
    for (path, is_dir) in
        [(".bashrc.new", false), (".mail.old", true), (".-.new", true), (".config.new/app", true)]
    {
        let path = place.path(path);
        match is_dir {
            true => fs::create_dir_all(path.join("precious")).unwrap(),
            false => fs::write(&path, "x").unwrap(),
        }
    }
    assert!(place.store.collect(false).unwrap().is_empty());
    place.store.begin("mail").unwrap();
    let refused = place.store.begin("config").unwrap_err();
    assert!(crate::errors::chain(&refused).contains(".config.new"), "{refused}");
    for path in [".bashrc.new", ".mail.old/precious", ".-.new/precious", ".config.new/app/precious"] {
        assert!(place.path(path).exists(), "{path}");
    }
}

#[test]
fn a_path_of_the_store_is_that_of_a_snapshot_whichever_links_it_has() {
    let place = place();
    place.make("one");
    let link = place.dir.path().join("link");
    std::os::unix::fs::symlink(place.path(""), &link).unwrap();
    for path in [place.path("one"), link.join("one"), link.join("../snapshots/./one/")] {
        assert_eq!(place.store.resolve(path.to_str().unwrap()).unwrap(), "one", "{}", path.display());
    }
}

#[test]
fn who_owns_an_import_is_not_for_the_archive_to_say() {
    let place = place();
    let draft = place.store.begin("one").unwrap();
    let pod = Tenant { namespace: "k8s.io".into(), pod_namespace: Some("team-a".into()) };
    draft.finish(Manifest { owner: Some(pod.clone()), ..manifest("one") }, &[]).unwrap();
    assert!(place.store.hold_for(&pod, "one", &mut untold).is_ok());
    let mut archive = Vec::new();
    place.store.export("one", &mut archive, &mut untold).unwrap();
    let import = Import { name: Some("two"), namespace: "k8s.io", pod_namespace: None, limit: u64::MAX };
    let imported = place.store.import(&archive[..], import, &mut untold).unwrap();
    assert_eq!(imported.manifest.owner, Some(Tenant { namespace: "k8s.io".into(), pod_namespace: None }));
    let refused = place.store.hold_for(&pod, "two", &mut untold).unwrap_err();
    assert!(matches!(refused, SnapshotError::NotOwned { .. }), "{refused}");
    let import = Import { name: Some("three"), pod_namespace: Some("team-b"), ..import };
    place.store.import(&archive[..], import, &mut untold).unwrap();
    let other = Tenant { pod_namespace: Some("team-b".into()), ..pod.clone() };
    assert!(place.store.hold_for(&other, "three", &mut untold).is_ok());
    assert!(place.store.hold_for(&pod, "three", &mut untold).is_err());
}
