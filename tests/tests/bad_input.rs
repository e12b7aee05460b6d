//! What users, clients and guests get wrong: a clear error, and nothing left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "all of this is tests")]

use std::{
    fs::{self, File},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use cube_protocol::{
    frame::{Header, Kind},
    guest, stream, version,
};
use cube_tests::{
    cases,
    command::poll,
    direct::{Direct, bind_mount, ext4_mount, spec},
    guest::Guest,
    lab::Lab,
    logs,
    needs::Backend,
    runner,
    scenarios::lab_with_waiting_container,
};
use nix::sys::signal::{Signal, kill};
use serde_json::json;

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        a_spec_that_is_not_json_is_refused_with_the_place,
        a_spec_that_is_too_long_is_refused_with_its_size_and_the_limit,
        a_spec_that_is_missing_is_refused_with_its_path,
        a_rootfs_that_does_not_exist_is_refused_with_its_path,
        an_id_that_is_a_path_is_refused,
        a_second_create_is_refused_and_harms_nothing,
        a_field_that_is_not_supported_is_refused_by_name,
        a_limit_that_nothing_here_enforces_is_refused,
        an_unknown_annotation_is_refused_by_name,
        an_annotation_with_a_nonsense_value_is_refused,
        a_stdio_uri_that_is_not_supported_is_refused,
        a_configuration_that_is_wrong_is_refused_with_the_key,
        a_shim_without_its_agent_says_which_file_is_missing,
        delete_of_a_sandbox_that_never_was_succeeds,
        a_bundle_deleted_twice_is_deleted,
        another_protocol_version_is_refused_and_both_are_named,
        a_frame_that_the_protocol_does_not_allow_closes_the_connection_and_is_counted,
        a_stream_that_does_not_exist_is_not_found,
        a_stream_is_kept_from_lower_attempts_and_offsets_ahead_of_it,
    ])
}

/// Create must fail with all of `words`, and leave nothing.
fn create_fails(lab: &Lab, mut direct: Direct<'_>, rootfs: &Path, words: &[&str]) {
    let error = direct.create(bind_mount(rootfs)).expect_err("Create must fail").to_string();
    for word in words {
        assert!(error.to_lowercase().contains(&word.to_lowercase()), "no {word:?} in {error:?}");
    }
    direct.finish();
    lab.nothing_is_left();
}

fn a_spec_that_is_not_json_is_refused_with_the_place(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["true"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    fs::write(direct.bundle.join("config.json"), "{\"ociVersion\": \"1.0.2\",\n  oops }").unwrap();
    create_fails(&lab, direct, &rootfs, &["config.json", "line 2"]);
}

fn a_spec_that_is_too_long_is_refused_with_its_size_and_the_limit(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["true"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    let file = File::options().write(true).open(direct.bundle.join("config.json")).unwrap();
    file.set_len(40_000_000).unwrap();
    create_fails(&lab, direct, &rootfs, &["config.json", "40000000 bytes", "33554432"]);
}

fn a_spec_that_is_missing_is_refused_with_its_path(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["true"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    fs::remove_file(direct.bundle.join("config.json")).unwrap();
    create_fails(&lab, direct, &rootfs, &["config.json", "no such file"]);
}

fn a_rootfs_that_does_not_exist_is_refused_with_its_path(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["true"]);
    direct.start_shim();
    create_fails(&lab, direct, Path::new("/nosuch/rootfs"), &["/nosuch/rootfs", "no such file"]);
    let mut direct = Direct::new(&lab, "d", &["true"]);
    direct.start_shim();
    let error = direct.create(ext4_mount(Path::new("/nosuch.ext4"))).unwrap_err().to_string();
    assert!(error.contains("ext4"), "{error}");
    direct.finish();
    lab.nothing_is_left();
}

fn an_id_that_is_a_path_is_refused(backend: Backend) {
    let lab = Lab::new(backend);
    for id in ["../escape", "a/b", "..", "."] {
        let mut direct = Direct::new(&lab, "c", &["true"]);
        direct.id = id.into();
        let failed = direct.shim("start");
        assert_ne!(failed.code(), 0, "{failed}");
        let text = failed.out() + &failed.err();
        assert!(text.contains(id), "the id must be named: {failed}");
        let deleted = direct.shim("delete");
        assert_ne!(deleted.code(), 0, "{deleted}");
        direct.id = "c".into();
        direct.finish();
    }
    assert!(!lab.dir().join("escape").exists() && !lab.run_dir().join("escape").exists());
    lab.nothing_is_left();
}

fn a_second_create_is_refused_and_harms_nothing(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["sleep", "1000"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    let pid = direct.create(bind_mount(&rootfs)).unwrap();
    let error = direct.create(bind_mount(&rootfs)).unwrap_err().to_string();
    assert!(error.to_lowercase().contains("exist") && error.contains('c'), "{error}");
    assert_eq!(direct.state().unwrap().pid, pid);
    direct.start().unwrap();
    assert!(direct.start().is_err(), "a second Start must fail");
    direct.kill(9).unwrap();
    assert_eq!(direct.wait().unwrap(), 137);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

fn a_field_that_is_not_supported_is_refused_by_name(backend: Backend) {
    let lab = Lab::new(backend);
    let unsupported = [
        ("seccomp", json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ERRNO" } } })),
        (
            "uidMappings",
            json!({ "linux": { "uidMappings": [{ "containerID": 0, "hostID": 1, "size": 1 }] } }),
        ),
    ];
    for (name, addition) in unsupported {
        let mut direct = Direct::new(&lab, "c", &["true"]);
        let mut spec = spec(&["true"]);
        for (key, value) in addition["linux"].as_object().unwrap() {
            spec["linux"][key] = value.clone();
        }
        direct.write_spec(&spec);
        let rootfs = direct.unpack_image();
        direct.start_shim();
        create_fails(&lab, direct, &rootfs, &[name]);
    }
}

fn a_limit_that_nothing_here_enforces_is_refused(backend: Backend) {
    let controllers = cube_tests::leftovers::cgroup2().join("cgroup.controllers");
    let lab = Lab::new(backend);
    if fs::read_to_string(controllers).unwrap().split_whitespace().any(|name| name == "memory") {
        let flags = ["--memory-limit", "67108864"];
        lab.run_with(&flags, "c", &["cube-test-writer", "hog", "256"]).exits_with(137);
    } else {
        lab.run_with(&["--memory-limit", "67108864"], "c", &["true"]).fails_with(&["memory"]);
    }
    lab.nothing_is_left();
}

fn an_unknown_annotation_is_refused_by_name(backend: Backend) {
    let lab = Lab::new(backend);
    let flags = ["--annotation", "cube.container.log_forwardin=false"];
    lab.run_with(&flags, "c", &["true"]).fails_with(&["cube.container.log_forwardin"]);
    lab.run_with(&["--annotation", "org.example.cube=1"], "c", &["true"]).succeeds();
    lab.nothing_is_left();
}

fn an_annotation_with_a_nonsense_value_is_refused(backend: Backend) {
    let lab = Lab::new(backend);
    for (name, value) in [
        ("cube.container.log_mode", "sometimes"),
        ("cube.container.log_forwarding", "maybe"),
        ("cube.sandbox.vcpus", "0"),
        ("cube.sandbox.memory_mib", "-5"),
    ] {
        let annotation = format!("{name}={value}");
        lab.run_with(&["--annotation", &annotation], "c", &["true"]).fails_with(&[name, value]);
    }
    lab.nothing_is_left();
}

fn a_stdio_uri_that_is_not_supported_is_refused(backend: Backend) {
    let lab = Lab::new(backend);
    for uri in ["ttrpc://elsewhere", "fifo:///nosuch?streaming_id=1", "binary:///nosuch/logger"] {
        let mut command = lab.run_command(&["--detach", "--log-uri", uri], "c", &["true"]);
        let failed = cube_tests::command::start(&mut command).wait(lab.limit());
        assert_ne!(failed.code(), 0, "{uri}: {failed}");
        lab.ctr(&["container", "delete", "c"]);
    }
    lab.nothing_is_left();
}

fn a_configuration_that_is_wrong_is_refused_with_the_key(backend: Backend) {
    let lab = Lab::new(backend);
    let good = fs::read_to_string(lab.config_file()).unwrap();
    let too_few = good.replace("[log]\n", "[log]\nsegments = 0\n");
    for (text, word) in [(too_few, "log.segments"), (format!("colour = 'red'\n{good}"), "colour")] {
        fs::write(lab.config_file(), text).unwrap();
        lab.run("c", &["true"]).fails_with(&[word, "config.toml"]);
    }
    fs::remove_file(lab.config_file()).unwrap();
    lab.run("c", &["true"]).fails_with(&["config.toml", "no such file"]);
    lab.nothing_is_left();
}

fn a_shim_without_its_agent_says_which_file_is_missing(backend: Backend) {
    let lab = Lab::new(backend);
    let text = fs::read_to_string(lab.config_file()).unwrap();
    let text: String = text
        .lines()
        .map(|line| {
            if line.starts_with("agent =") { "agent = '/nosuch/cube-agent'" } else { line }.to_owned() + "\n"
        })
        .collect();
    fs::write(lab.config_file(), text).unwrap();
    lab.run("c", &["true"]).fails_with(&["/nosuch/cube-agent"]);
    lab.nothing_is_left();
}

fn delete_of_a_sandbox_that_never_was_succeeds(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = Direct::new(&lab, "c", &["true"]);
    let deleted = direct.shim("delete").succeeds();
    assert!(deleted.took < Duration::from_secs(4), "{deleted}");
    direct.finish();
    lab.nothing_is_left();
}

fn a_bundle_deleted_twice_is_deleted(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["sleep", "1000"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    // As containerd does when it lost the shim, again when it was restarted meanwhile.
    kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
    for _ in 0..2 {
        let deleted = direct.shim("delete").succeeds();
        assert!(deleted.took < Duration::from_secs(4), "{deleted}");
    }
    direct.finish();
    lab.nothing_is_left();
}

fn another_protocol_version_is_refused_and_both_are_named(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let theirs = guest::Version { major: 77, minor: 5, ..Default::default() };
    let error = Guest::of(&lab, "c").hello(theirs).expect_err("major 77 must be refused").to_string();
    assert!(error.contains("77.5") && error.contains(&version::CURRENT.to_string()), "{error}");
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
}

fn a_frame_that_the_protocol_does_not_allow_closes_the_connection_and_is_counted(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let guest = Guest::of(&lab, "c");
    let open = Header::new(Kind::Open, 0).encode();
    let with = |at: usize, bytes: &[u8]| {
        let mut header = open;
        header[at..at + bytes.len()].copy_from_slice(bytes);
        header
    };
    let malformed = [with(4, &u32::MAX.to_le_bytes()), with(0, &[200]), with(1, &[0x80]), with(2, &[1, 0])];
    let before = guest.info().refused_connections;
    for header in &malformed {
        guest.exchange(header);
    }
    assert_eq!(guest.info().refused_connections - before, malformed.len() as u64);
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
}

fn open(container: &str, attempt: u64) -> stream::Open {
    let stream = stream::Stream::STDOUT.into();
    stream::Open { container_id: container.into(), stream, attempt, ..Default::default() }
}

fn a_stream_that_does_not_exist_is_not_found(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let guest = Guest::of(&lab, "c");
    let timeline = guest.info().timeline;
    let exec = stream::Open { exec_id: "nosuch".into(), ..open("c", 1) };
    for open in [open("nosuch", 1), open("../c", 1), exec] {
        let error = guest.open_fails(&stream::Open { timeline, ..open }, 0);
        assert_eq!(error.code.enum_value(), Ok(stream::ErrorCode::NOT_FOUND), "{error}");
    }
}

fn a_stream_is_kept_from_lower_attempts_and_offsets_ahead_of_it(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached("c", &["sh", "-c", "echo hello; while :; do sleep 0.1; done"]);
    let log = lab.log_dir("c");
    assert!(poll(lab.limit(), || logs::read(&log, "stdout") == b"hello\n"));
    let guest = Guest::of(&lab, "c");
    let timeline = guest.info().timeline;
    let code = |open, offset| {
        let error = guest.open_fails(&stream::Open { timeline, ..open }, offset);
        error.code.enum_value().unwrap()
    };
    assert_eq!(code(open("c", 0), 6), stream::ErrorCode::STALE_ATTEMPT);
    assert_eq!(code(open("c", u64::MAX - 2), 7), stream::ErrorCode::OFFSET_AHEAD);
    assert_eq!(code(open("c", u64::MAX - 1), 5), stream::ErrorCode::OFFSET_LOST);
    let other = stream::Open { timeline: !timeline, ..open("c", u64::MAX) };
    assert_eq!(guest.open_fails(&other, 6).code.enum_value(), Ok(stream::ErrorCode::OTHER_TIMELINE));
    lab.remove("c");
    lab.nothing_is_left();
}
