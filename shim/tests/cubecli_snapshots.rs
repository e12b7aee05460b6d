//! `cubecli cubebox export`, `import`, `restore` and `snapshots --verify`, as operators and scripts run them.

#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

mod support;

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::{Output, Stdio},
};

use cube_protocol::version;
use cube_shim::snapshot::{Manifest, Store};
use serde_json::json;

use support::Host;

/// A host with the snapshot "one", of a container with or without a terminal.
fn host(terminal: bool) -> Host {
    let host = Host::new();
    let dir = host.path("snapshots");
    host.configure(&format!("[snapshot]\ndir = {dir:?}"));
    let draft = Store::at(&dir).begin("one").unwrap();
    fs::write(draft.vm_dir().join("memory-ranges"), vec![7; 100_000]).unwrap();
    let container = json!({"id": "c", "pid": 1, "terminal": terminal, "execs": [], "spec": {"process": {}}});
    let manifest = json!({
        "format": Manifest::FORMAT, "name": "one", "created_ns": 1, "cubebox": "0.1.0", "agent": "0.1.0",
        "protocol": version::CURRENT.to_string(), "vmm": {"name": "x", "version": "1.0"},
        "origin": {"namespace": "ns", "sandbox": "c", "timeline": 1, "backend": "x"},
        "containers": [container], "last_event": 0, "streams": [], "disks": [], "files": [],
    });
    draft.finish(serde_json::from_value(manifest).unwrap(), &[]).unwrap();
    host
}

fn refused(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    words.iter().for_each(|word| assert!(text.contains(word), "no {word:?} in {text}"));
}

#[test]
fn a_snapshot_goes_through_a_file_or_a_pipe_and_scripts_see_nothing_but_its_name() {
    let host = host(false);
    let archive = host.path("archive");
    let path = archive.to_str().unwrap();
    let exported = host.run(&["cubebox", "export", "one", path]);
    assert!(exported.status.success() && exported.stdout.is_empty() && exported.stderr.is_empty());
    assert_eq!(fs::metadata(&archive).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(host.text(&["cubebox", "import", path, "two"]), "two\n");
    let piped = host.run(&["cubebox", "export", "one", "-"]);
    let mut import = host.command(&["cubebox", "import", "-", "three"]);
    let mut import = import.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    import.stdin.take().unwrap().write_all(&piped.stdout).unwrap();
    assert_eq!(import.wait_with_output().unwrap().stdout, b"three\n");
    for name in ["one", "two", "three"] {
        assert_eq!(host.text(&["cubebox", "snapshots", "--verify", name]), "");
    }
}

#[test]
fn what_is_there_is_not_overwritten_and_what_is_not_there_leaves_no_file() {
    let host = host(false);
    let path = host.path("archive").to_str().unwrap().to_owned();
    refused(&host.run(&["cubebox", "export", "two", &path]), 3, &["no snapshot \"two\""]);
    refused(&host.run(&["cubebox", "import", &path]), 1, &[&path, "No such file"]);
    assert!(!host.path("archive").exists());
    fs::write(host.path("archive"), "mine").unwrap();
    refused(&host.run(&["cubebox", "export", "one", &path]), 1, &[&path, "exists"]);
    refused(&host.run(&["cubebox", "import", &path, "two"]), 1, &["import"]);
    assert_eq!(fs::read(host.path("archive")).unwrap(), b"mine");
}

#[test]
fn damage_is_found_and_named() {
    let host = host(false);
    let memory = host.path("snapshots/one/vm/memory-ranges");
    fs::write(&memory, vec![8; 100_000]).unwrap();
    let words = [memory.to_str().unwrap(), "damaged"];
    refused(&host.run(&["cubebox", "snapshots", "--verify", "one"]), 1, &words);
    let archive = host.path("archive");
    refused(&host.run(&["cubebox", "export", "one", archive.to_str().unwrap()]), 1, &words);
    assert!(!archive.exists());
    refused(&host.run(&["cubebox", "snapshots", "--verify", "two"]), 3, &[]);
}

#[test]
fn a_restore_says_what_it_needs() {
    let nobody = ["--address", "/nonexistent/containerd.sock"];
    let restore = |host: &Host, name| host.run(&[&["cubebox", "restore", name], &nobody[..]].concat());
    refused(&restore(&host(false), "one"), 1, &[nobody[1], "CONTAINERD_ADDRESS"]);
    refused(&restore(&host(false), "two"), 3, &["no snapshot \"two\""]);
    refused(&restore(&host(true), "one"), 1, &["terminal", "ctr run --tty", "cube.snapshot.restore=one"]);
}
