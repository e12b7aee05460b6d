//! Snapshots on their way to another host, and back into a sandbox.

use std::{fs::File, os::unix::fs::FileExt};

use cube_protocol::version;
use cube_shim::snapshot::{Manifest, Store};
use serde_json::json;

use super::{
    block::BLOCK,
    restore::{WRITER, end, logged, writes_on},
};
use crate::{
    lab::{IMAGE, Lab},
    needs::Backend,
};

/// The snapshot is whole, but not one of a VM. containerd has been asked by then.
pub fn a_restore_that_fails_leaves_no_container(backend: Backend) {
    let lab = Lab::new(backend);
    let manifest = json!({
        "format": Manifest::FORMAT, "name": "one", "created_ns": 1, "cubebox": "0.1.0", "agent": "0.1.0",
        "protocol": version::CURRENT.to_string(), "vmm": {"name": "", "version": ""},
        "origin": {"namespace": lab.namespace(), "sandbox": "c", "timeline": 1, "backend": ""},
        "containers": [{"id": "c", "pid": 1, "terminal": false, "execs": [], "spec": {
            "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": ["true"], "cwd": "/"},
            "linux": {"namespaces": [{"type": "network"}]},
        }}],
        "last_event": 0, "streams": [], "disks": [], "files": [],
    });
    let draft = Store::at(&lab.dir().join("snapshots")).begin("one").unwrap();
    draft.finish(serde_json::from_value(manifest).unwrap(), &[]).unwrap();
    lab.uses_sandbox(lab.key("d"));
    let words: &[&str] = match backend {
        Backend::CloudHypervisor => &["cannot read config.json"],
        _ => &["cloud-hypervisor"],
    };
    lab.cubecli(&["cubebox", "restore", "one", "--id", "d"]).fails_with(words);
    let containers = lab.ctr(&["containers", "list", "--quiet"]).succeeds().out();
    assert_eq!(containers, "", "containers that are left");
    // Nobody reads it any more.
    lab.cubecli(&["cubebox", "snapshots", "--rm", "one"]).succeeds();
    lab.nothing_is_left();
}

/// Exported, removed and imported under another name, it goes on exactly where it was, with nothing of its
/// original there any more. Damaged, it does not, and leaves nothing.
pub fn an_imported_snapshot_goes_on_without_its_image_and_its_original(backend: Backend) {
    let lab = Lab::new(backend);
    let archive = lab.dir().join("archive");
    let path = archive.to_str().unwrap();
    lab.detached_with(&BLOCK, "c", &WRITER);
    writes_on(&lab, "c");
    lab.cubecli(&["cubebox", "snapshot", "c", "one"]).succeeds();
    end(&lab, "c");
    lab.ctr(&["image", "remove", "--sync", IMAGE]).succeeds();

    lab.cubecli(&["cubebox", "export", "one", path]).succeeds();
    lab.cubecli(&["cubebox", "export", "one", path]).fails_with(&["exists"]);
    lab.cubecli(&["cubebox", "import", path]).fails_with(&["\"one\" exists", "snapshots --rm one"]);
    lab.cubecli(&["cubebox", "snapshots", "--rm", "one"]).succeeds();
    let imported = lab.cubecli(&["cubebox", "import", path, "two"]).succeeds();
    assert_eq!((imported.out().as_str(), imported.err().as_str()), ("two\n", ""));
    lab.cubecli(&["cubebox", "snapshots", "--verify", "two"]).succeeds();
    let bytes = archive.metadata().unwrap().len();
    println!("the archive has {} KiB", bytes >> 10);

    lab.cubecli(&["cubebox", "restore", "one", "--id", "d"]).exits_with(3);
    lab.uses_sandbox(lab.key("d"));
    let restored = lab.cubecli(&["cubebox", "restore", "two", "--id", "d"]).succeeds();
    assert_eq!((restored.out().as_str(), restored.err().as_str()), ("d\n", ""));
    assert_eq!(lab.task("d").unwrap().0, "RUNNING");
    writes_on(&lab, "d");
    assert!(logged(&lab, "d").0 > 0, "the log begins with the original's first byte");
    assert_eq!(lab.exec("d", &["hostname"]).succeeds().out(), "d\n");
    lab.cubecli(&["cubebox", "restore", "two", "--id", "d"]).fails_with(&["\"d\"", "already exists"]);
    writes_on(&lab, "d");
    end(&lab, "d");

    let state = lab.dir().join("snapshots/two/vm/state.json");
    File::options().write(true).open(state).unwrap().write_all_at(b"?", 0).unwrap();
    lab.cubecli(&["cubebox", "restore", "two", "--id", "e"]).fails_with(&["state.json", "damaged"]);
    let containers = lab.ctr(&["containers", "list", "--quiet"]).succeeds().out();
    assert_eq!(containers, "", "containers that are left");
    lab.nothing_is_left_but_fifos();
}
