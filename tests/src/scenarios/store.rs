//! Snapshots on their way to another host, and back into a sandbox.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    process::Stdio,
};

use cube_protocol::version;
use cube_shim::snapshot::{Manifest, Store, untold};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::{
    block::BLOCK,
    restore::{WRITER, end, logged, writes_on},
};
use crate::{
    command::{poll, start},
    lab::{IMAGE, Lab},
    needs::Backend,
};

/// What a snapshot of the container `c` would be, but for its files.
fn manifest(lab: &Lab) -> Value {
    json!({
        "format": Manifest::FORMAT, "name": "one", "created_ns": 1, "cubebox": "0.1.0", "agent": "0.1.0",
        "protocol": version::CURRENT.to_string(), "vmm": {"name": "", "version": ""},
        "origin": {"namespace": lab.namespace(), "sandbox": "c", "timeline": 1, "backend": ""},
        "containers": [{"id": "c", "pid": 1, "terminal": false, "execs": [], "spec": {
            "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": ["true"], "cwd": "/"},
            "linux": {"namespaces": [{"type": "network"}]},
        }}],
        "last_event": 0, "streams": [], "disks": [], "files": [],
    })
}

/// The snapshot is whole, but not one of a VM. containerd has been asked by then.
pub fn a_restore_that_fails_leaves_no_container(backend: Backend) {
    let lab = Lab::new(backend);
    let draft = Store::at(&lab.dir().join("snapshots")).begin("one").unwrap();
    draft.finish(serde_json::from_value(manifest(&lab)).unwrap(), &[]).unwrap();
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
    let imported =
        lab.cubecli(&["cubebox", "import", "--namespace", lab.namespace(), path, "two"]).succeeds();
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

/// Of an import that waits for the rest of its archive, and is told to end.
pub fn an_import_that_is_interrupted_leaves_nothing(backend: Backend) {
    let lab = Lab::new(backend);
    let store = Store::at(&lab.dir().join("snapshots"));
    let draft = store.begin("one").unwrap();
    let mut random = Vec::new();
    // Not to be compressed, so that half of the archive is half of the file.
    let bytes = 4 << 20;
    std::io::Read::read_to_end(
        &mut std::io::Read::take(File::open("/dev/urandom").unwrap(), bytes),
        &mut random,
    )
    .unwrap();
    fs::write(draft.vm_dir().join("memory-ranges"), &random).unwrap();
    draft.finish(serde_json::from_value(manifest(&lab)).unwrap(), &[]).unwrap();
    let mut archive = Vec::new();
    store.export("one", &mut archive, &mut untold).unwrap();
    let new = lab.dir().join("snapshots/.two.new");
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let mut import = lab.cubecli_command(&["cubebox", "import", "-", "two"]);
        let mut import = start(import.stdin(Stdio::piped()));
        let mut stdin = import.stdin();
        stdin.write_all(&archive[..archive.len() / 2]).unwrap();
        let is_begun = || new.join("vm/memory-ranges").metadata().is_ok_and(|file| file.len() == bytes);
        assert!(poll(lab.limit(), is_begun), "the import has not begun");
        kill(import.pid(), signal).unwrap();
        import.wait(lab.limit()).exits_with(code).fails_with(&["interrupted"]);
        assert!(!new.exists(), "{signal}");
        drop(stdin);
    }
    let imported = lab.cubecli_command(&["cubebox", "import", "-n", "ours", "-", "two"]);
    let mut import = imported;
    let mut import = start(import.stdin(Stdio::piped()));
    import.feed(archive);
    assert_eq!(import.wait(lab.limit()).succeeds().out(), "two\n");
    let listed = lab.cubecli(&["cubebox", "snapshots"]).succeeds().out();
    assert!(listed.contains("two") && listed.contains("ours/c"), "{listed}");
    lab.nothing_is_left();
}

/// Whatever it says of where it comes from.
pub fn what_an_archive_says_is_printable(backend: Backend) {
    let lab = Lab::new(backend);
    let store = Store::at(&lab.dir().join("snapshots"));
    let mut hostile = manifest(&lab);
    hostile["origin"]["sandbox"] = "\x1b]0;owned\x07\u{9b}2J\u{202e}c".into();
    hostile["containers"][0]["id"] = "\x1b[2J".into();
    let draft = store.begin("one").unwrap();
    draft.finish(serde_json::from_value(hostile.clone()).unwrap(), &[]).unwrap();
    let archive = lab.dir().join("archive");
    let path = archive.to_str().unwrap();
    lab.cubecli(&["cubebox", "export", "one", path]).succeeds();
    lab.cubecli(&["cubebox", "import", path, "two"]).succeeds();
    let printable = |text: String| {
        assert!(text.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{text:?}");
        text
    };
    let listed = printable(lab.cubecli(&["cubebox", "snapshots"]).succeeds().out());
    assert!(listed.contains("\\u{1b}]0;owned\\u{7}\\u{9b}2J\\u{202e}c"), "{listed}");
    let listed = printable(lab.cubecli(&["cubebox", "snapshots", "--json"]).succeeds().out());
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["manifest"]["origin"]["sandbox"], hostile["origin"]["sandbox"]);
    // A spec that cubecli could not give to containerd.
    let path = lab.dir().join("snapshots/two/manifest.json");
    let mut damaged: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    damaged["containers"][0]["spec"] = json!(["no object"]);
    damaged["protocol"] = version::CURRENT.to_string().into();
    fs::write(&path, damaged.to_string()).unwrap();
    let refused = lab.cubecli(&["cubebox", "restore", "two", "--id", "d"]).exits_with(1);
    assert!(printable(refused.err()).contains("is no object"), "{refused}");
    lab.nothing_is_left();
}
