//! `cubecli logs` against logs on disk, as operators and scripts run it.

#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

mod support;

use std::{
    fs::{self, File},
    io::IoSlice,
    os::unix::{fs::symlink, process::ExitStatusExt},
    process::Stdio,
    sync::Arc,
};

use cube_shim::log::{
    dir::LogDir,
    writer::{Limits, LogWriter},
};

use support::{Host, Log};

/// 2026-01-31T12:00:00Z
const NOON: u64 = 1_769_860_800_000_000_000;
const SECOND: u64 = 1_000_000_000;

fn lines(range: std::ops::Range<u32>) -> String {
    range.map(|n| format!("line {n}\n")).collect()
}

#[test]
fn the_last_100_lines_of_stdout_are_the_default() {
    let host = Host::new();
    host.log("web-1", "stdout").write(NOON, lines(0..250).as_bytes());
    host.log("web-1", "stderr").write(NOON, b"an error\n");
    assert_eq!(host.text(&["logs", "web-1"]), lines(150..250));
    assert_eq!(host.text(&["cubebox", "logs", "we"]), lines(150..250), "a prefix is enough");
    assert_eq!(host.text(&["logs", "--tail", "3", "web"]), lines(247..250));
    assert_eq!(host.text(&["logs", "--head", "3", "web"]), lines(0..3));
    assert_eq!(host.text(&["logs", "--all", "web"]), lines(0..250));
    assert_eq!(host.text(&["logs", "--stderr", "web"]), "an error\n");
}

#[test]
fn the_log_of_a_template_is_asked_for_by_its_own_id_and_with_the_same_options() {
    let host = Host::new();
    host.template_log("py-3", "stdout").write(NOON, lines(0..250).as_bytes());
    host.template_log("py-3", "stderr").write(NOON, b"an error\n");
    host.template_log("py-3.1769860800", "stdout").write(NOON, b"an older build\n");
    host.log("py-3", "stdout").write(NOON, b"a container of that name\n");
    assert_eq!(host.text(&["logs", "--tpl", "py-3"]), lines(150..250));
    assert_eq!(host.text(&["cubebox", "logs", "--tpl", "--head", "2", "py"]), lines(0..2));
    assert_eq!(host.text(&["logs", "--stderr", "--tpl", "py-3"]), "an error\n");
    assert_eq!(host.text(&["logs", "--tpl", "py-3.1769860800"]), "an older build\n");
    assert_eq!(host.text(&["logs", "py-3"]), "a container of that name\n");
    let (code, message) = host.fails(&["logs", "--tpl", "go"]);
    assert!(code == 3 && message.contains("\"go\" in ") && message.contains("/templates"), "{message}");
    for wrong in [&["logs", "--tpl", "../etc"][..], &["logs", "--tpl", "-n", "default", "py"]] {
        assert_eq!(host.fails(wrong).0, 2);
    }
}

#[test]
fn both_streams_come_line_by_line_in_the_order_of_their_times() {
    let host = Host::new();
    let (mut out, mut err) = (host.log("c", "stdout"), host.log("c", "stderr"));
    out.write(NOON, b"o1\no2\n");
    err.write(NOON + 1, b"e1\n");
    out.write(NOON + 2, b"o3\n");
    out.rotate();
    err.write(NOON + 3, b"e2\n");
    out.write(NOON + 4, b"o4\n");
    assert_eq!(host.text(&["logs", "--both", "--all", "c"]), "o1\no2\ne1\no3\ne2\no4\n");
    assert_eq!(host.text(&["logs", "--both", "--tail", "3", "c"]), "o3\ne2\no4\n");
    assert_eq!(host.text(&["logs", "--both", "--head", "4", "c"]), "o1\no2\ne1\no3\n");
    fs::remove_file(host.log_dir("c").join("stderr.idx")).unwrap();
    assert_eq!(host.text(&["logs", "--both", "--all", "c"]), "o1\no2\no3\no4\ne1\ne2\n");
    assert_eq!(host.text(&["logs", "--both", "--tail", "1", "c"]), "o4\ne2\n");
}

#[test]
fn timestamps_are_those_of_the_write_of_a_lines_first_byte() {
    let host = Host::new();
    let mut log = host.log("c", "stdout");
    log.write(NOON, b"one\ntw");
    log.write(NOON + 1500, b"o\nthree");
    let expected = "2026-01-31T12:00:00.000000000Z one\n\
                    2026-01-31T12:00:00.000000000Z two\n\
                    2026-01-31T12:00:00.000001500Z three";
    assert_eq!(host.text(&["logs", "--timestamps", "c"]), expected);
    fs::remove_file(host.log_dir("c").join("stdout.idx")).unwrap();
    assert_eq!(host.text(&["logs", "-t", "c"]), "- one\n- two\n- three");
}

#[test]
fn since_leaves_out_what_is_older_and_combines_with_head_and_tail() {
    let host = Host::new();
    let mut log = host.log("c", "stdout");
    for n in 0..200 {
        log.write(NOON + u64::from(n) * SECOND, lines(n..n + 1).as_bytes());
        if n % 30 == 29 {
            log.rotate();
        }
    }
    let since = |time: &str, more: &[&str]| host.text(&[&["logs", "--since", time, "c"], more].concat());
    assert_eq!(since("2026-01-31T12:01:00Z", &[]), lines(60..200));
    assert_eq!(since("2026-01-31T13:01:00+01:00", &["--head", "2"]), lines(60..62));
    assert_eq!(since("1769860860", &["--tail", "2"]), lines(198..200));
    assert_eq!(since("1769860998", &["--tail", "50"]), lines(198..200));
    assert_eq!(since("2200-01-01T00:00:00Z", &[]), "");
    let (code, message) = host.fails(&["logs", "--since", "noonish", "c"]);
    assert!(code == 2 && message.contains("RFC 3339"), "{message}");
}

#[test]
fn lost_bytes_are_counted_on_standard_error_and_the_output_is_the_bytes() {
    let host = Host::new();
    let mut log = host.log("c", "stdout");
    log.write(NOON, b"before\n");
    log.gap(NOON, 12_345);
    log.write(NOON, b"after\n");
    let output = host.run(&["logs", "c"]);
    assert!(output.status.success());
    assert_eq!(output.stdout, b"before\nafter\n");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "[12345 bytes lost]\n");
}

#[test]
fn bytes_come_out_as_they_went_in() {
    let host = Host::new();
    let bytes: Vec<u8> = (0..300_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut log = host.log("c", "stdout");
    for (n, piece) in bytes.chunks(4099).enumerate() {
        log.write(NOON + n as u64, piece);
        if n % 50 == 0 {
            log.rotate();
        }
    }
    assert!(host.ok(&["logs", "--all", "c"]) == bytes);
    assert!(host.ok(&["logs", "--head", "1000000000", "c"]) == bytes);
    assert!(host.ok(&["logs", "--tail", "1000000000", "c"]) == bytes);
}

#[test]
fn a_million_empty_lines_are_lines() {
    let host = Host::new();
    host.log("c", "stdout").write(NOON, &vec![b'\n'; 1_000_000]);
    assert_eq!(host.ok(&["logs", "--tail", "70000", "c"]).len(), 70_000);
    assert_eq!(host.ok(&["logs", "--head", "70000", "c"]).len(), 70_000);
    assert_eq!(host.ok(&["logs", "--all", "--timestamps", "c"]).len(), 32_000_000);
}

#[test]
fn a_line_of_256_mib_needs_less_than_64_mib_of_memory() {
    let host = Host::new();
    host.log("c", "stdout").write(NOON, b"first\n");
    let length = 6 + (256 << 20);
    File::options().write(true).open(host.log_dir("c").join("stdout")).unwrap().set_len(length).unwrap();
    for (args, expected) in [("--tail 1", 256 << 20), ("--all", length), ("--all --timestamps", length + 62)]
    {
        let script = format!("ulimit -v 65536; exec \"$0\" logs {args} c | wc -c");
        let output = std::process::Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_cubecli")])
            .env("CUBE_CONFIG", host.path("config.toml"))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args}");
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), expected.to_string(), "{args}");
    }
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let host = Host::new();
    host.log("c", "stdout").write(NOON, &vec![b'\n'; 4 << 20]);
    host.sandbox("c", host.log_dir("c"));
    for how in ["--all", "--follow"] {
        let mut command = host.command(&["logs", how, "c"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{how}: {}", output.status);
        assert_eq!(output.stderr, b"", "{how}");
    }
}

#[test]
fn exit_codes_tell_scripts_what_is_wrong() {
    let host = Host::new();
    for id in ["web-1", "web-2", "db"] {
        host.log(id, "stdout").write(NOON, b"x\n");
    }
    let (code, message) = host.fails(&["logs", "web"]);
    assert_eq!(code, 4);
    assert!(message.contains("default/web-1") && message.contains("default/web-2"), "{message}");
    let (code, message) = host.fails(&["logs", "cache"]);
    assert!(code == 3 && message.contains("\"cache\""), "{message}");
    for id in ["../db", "default/db", "..", ""] {
        let (code, message) = host.fails(&["logs", id]);
        assert!(code == 2 && message.contains("not a valid container ID"), "{message}");
    }
    let (code, _) = host.fails(&["logs", "--namespace", "../default", "db"]);
    assert_eq!(code, 2);
    let (code, _) = host.fails(&["logs", "--head", "1", "--tail", "1", "db"]);
    assert_eq!(code, 2);
    assert_eq!(host.fails(&["logs", "--namespace", "other", "db"]).0, 3);
    assert_eq!(host.fails(&["logs", "--pid", "4194303", "db"]).0, 3, "beyond any pid");
}

#[test]
fn a_link_in_place_of_a_log_file_is_refused() {
    let host = Host::new();
    let secret = host.path("secret");
    fs::write(&secret, "secret\n").unwrap();
    fs::create_dir_all(host.log_dir("c")).unwrap();
    symlink(&secret, host.log_dir("c").join("stdout")).unwrap();
    symlink(host.log_dir("c"), host.log_dir("d")).unwrap();
    for id in ["c", "d"] {
        let output = host.run(&["logs", id]);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(output.stdout, b"");
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains("symbolic link"), "{message}");
    }
}

#[test]
fn following_prints_each_byte_once_across_rotations_and_ends_with_the_container() {
    let host = Host::new();
    let mut log = host.log("c", "stdout");
    log.write(NOON, b"begin\n");
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let mut follower = host.start(&["logs", "--follow", "c"]);
    follower.wait_for(6);
    let mut expected = b"begin\n".to_vec();
    for n in 0..2000u64 {
        let piece: Vec<u8> = (0..n % 97).map(|i| (n + i) as u8).collect();
        log.write(NOON + n, &piece);
        expected.extend_from_slice(&piece);
        if n % 100 == 99 {
            log.rotate();
        }
    }
    follower.wait_for(expected.len());
    log.write(NOON, b"end");
    expected.extend_from_slice(b"end");
    sandbox.remove().unwrap();
    let (status, printed) = follower.finish();
    assert!(status.success(), "{status}");
    assert!(printed == expected);
}

#[test]
fn following_ends_when_the_id_is_used_again() {
    let host = Host::new();
    let mut log = host.log("c", "stdout");
    log.write(NOON, b"old\n");
    let _sandbox = host.sandbox("c", host.log_dir("c"));
    let mut follower = host.start(&["logs", "--follow", "c"]);
    follower.wait_for(4);
    fs::rename(host.log_dir("c"), host.log_dir("c.1769860800")).unwrap();
    Log::create(&host.log_dir("c"), "stdout").write(NOON, b"new\n");
    let (status, printed) = follower.finish();
    assert!(status.success());
    assert_eq!(printed, b"old\n");
    assert_eq!(host.text(&["logs", "c.1769860800"]), "old\n");
}

#[test]
fn following_goes_on_with_a_log_that_its_writer_has_made_again() {
    let host = Host::new();
    let dir = host.log_dir("c");
    let limits = Limits { segment_bytes: 1 << 20, segments: 2 };
    let created = Arc::new(LogDir::create(&dir).unwrap());
    let mut writer = LogWriter::create(created, "stdout", limits, 0).unwrap();
    let mut write = |text: &str| writer.append(&mut &mut [IoSlice::new(text.as_bytes())][..]).unwrap();
    let sandbox = host.sandbox("c", dir.clone());
    write("before\n");
    let mut follower = host.start(&["logs", "--follow", "c"]);
    follower.wait_for(7);
    fs::remove_dir_all(&dir).unwrap();
    write("after\n");
    follower.wait_for(13);
    fs::remove_file(dir.join("stdout")).unwrap();
    write("again\n");
    follower.wait_for(19);
    sandbox.remove().unwrap();
    let (status, printed) = follower.finish();
    assert!(status.success());
    assert_eq!(String::from_utf8(printed).unwrap(), "before\nafter\nagain\n");
    let output = host.run(&["logs", "--all", "c"]);
    assert_eq!(output.stdout, b"again\n");
    assert_eq!(output.stderr, b"[6 bytes lost]\n");
}

#[test]
fn following_a_deleted_container_prints_what_there_is_and_ends() {
    let host = Host::new();
    host.log("c", "stdout").write(NOON, b"all there is\n");
    let (status, printed) = host.start(&["logs", "--follow", "c"]).finish();
    assert!(status.success());
    assert_eq!(printed, b"all there is\n");
}

#[test]
fn following_both_streams_keeps_the_order_of_times() {
    let host = Host::new();
    let (mut out, mut err) = (host.log("c", "stdout"), host.log("c", "stderr"));
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let mut follower = host.start(&["logs", "--follow", "--both", "--timestamps", "c"]);
    let mut expected = String::new();
    for n in 0..50u64 {
        let (log, name) = if n % 3 == 0 { (&mut err, "err") } else { (&mut out, "out") };
        log.write(NOON + n, format!("{name} {n}\n").as_bytes());
        expected += &format!("2026-01-31T12:00:00.{n:09}Z {name} {n}\n");
        // Lines that are there at once are put in order; those of different times are as they come.
        if n % 10 == 9 {
            follower.wait_for(expected.len());
        }
    }
    sandbox.remove().unwrap();
    let (status, printed) = follower.finish();
    assert!(status.success());
    assert_eq!(sorted(&printed), expected, "each line once, with its own time");
    let of = |name: &str| lines_with(&printed, name);
    assert!(of("out").is_sorted() && of("err").is_sorted());
}

fn sorted(printed: &[u8]) -> String {
    let mut lines: Vec<&str> = std::str::from_utf8(printed).unwrap().split_inclusive('\n').collect();
    lines.sort_unstable();
    lines.concat()
}

fn lines_with(printed: &[u8], word: &str) -> Vec<String> {
    let text = String::from_utf8_lossy(printed);
    text.lines().filter(|line| line.contains(word)).map(String::from).collect()
}

#[test]
fn following_ends_after_the_lines_that_head_asks_for() {
    let host = Host::new();
    let mut log = host.log("c", "stdout");
    log.write(NOON, b"1\n");
    let _sandbox = host.sandbox("c", host.log_dir("c"));
    let mut follower = host.start(&["logs", "--follow", "--head", "2", "c"]);
    follower.wait_for(2);
    log.write(NOON, b"2\n3\n");
    assert_eq!(follower.finish().1, b"1\n2\n");
}

#[test]
fn an_interrupt_ends_following_as_shells_expect_it() {
    let host = Host::new();
    host.log("c", "stdout").write(NOON, b"x\n");
    let _sandbox = host.sandbox("c", host.log_dir("c"));
    // A shell that runs the tests in the background has them ignore SIGINT, and children inherit that.
    // SAFETY: no handler is installed, and nothing else in this process changes SIGINT.
    unsafe {
        nix::sys::signal::signal(nix::sys::signal::Signal::SIGINT, nix::sys::signal::SigHandler::SigDfl)
    }
    .unwrap();
    let mut follower = host.start(&["logs", "--follow", "c"]);
    follower.wait_for(2);
    let pid = nix::unistd::Pid::from_raw(follower.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    // What a shell shows as 130.
    assert_eq!(follower.finish().0.signal(), Some(2));
}

#[test]
fn logs_in_bundles_are_found_through_the_state_of_the_sandbox() {
    let host = Host::new();
    host.configure("[log]\ndir = 'bundle'");
    let bundle = host.path("containerd/default/web-1");
    Log::create(&bundle, "stdout").write(NOON, b"from the bundle\n");
    let _sandbox = host.sandbox("web-1", bundle);
    assert_eq!(host.text(&["logs", "web"]), "from the bundle\n");
}

#[test]
fn logs_in_another_mount_namespace_are_found_by_the_pid_of_a_process_in_it() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mount namespaces need root");
        return;
    }
    let host = Host::new();
    let logs = host.path("logs");
    fs::create_dir(&logs).unwrap();
    let script = format!(
        "mount -t tmpfs tmpfs {0} && mkdir -p {0}/default/c && echo hidden > {0}/default/c/stdout && echo ready && exec sleep 600",
        logs.display()
    );
    let mut other = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let pid = other.id().to_string();
    let (without, with) = (host.run(&["logs", "c"]), host.run(&["logs", "--pid", &pid, "c"]));
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(without.status.code(), Some(3));
    assert_eq!(String::from_utf8(with.stdout).unwrap(), "hidden\n", "{:?}", with.stderr);
}

/// Writes `total` bytes as the shim does, as fast as it can, in odd sizes. Returns them.
fn write_with_rotation(dir: &std::path::Path, segments: u32, total: usize) -> Vec<u8> {
    let limits = Limits { segment_bytes: 64 << 10, segments };
    let mut writer = LogWriter::create(Arc::new(LogDir::open(dir).unwrap()), "stdout", limits, 0).unwrap();
    let mut state = 1u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let bytes: Vec<u8> = (0..total).map(|_| random() as u8).collect();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(1 + random() as usize % 20_000));
        rest = after;
        let mut parts = &mut [IoSlice::new(piece)][..];
        writer.append(&mut parts).unwrap();
    }
    bytes
}

#[test]
fn a_follower_of_the_shims_own_writer_gets_each_byte_once() {
    let host = Host::new();
    fs::create_dir_all(host.log_dir("c")).unwrap();
    let sandbox = host.sandbox("c", host.log_dir("c"));
    fs::write(host.log_dir("c").join("stdout"), "").unwrap();
    let follower = host.start(&["logs", "--follow", "--all", "c"]);
    let written = write_with_rotation(&host.log_dir("c"), 100_000, 32 << 20);
    sandbox.remove().unwrap();
    let (status, printed) = follower.finish();
    assert!(status.success(), "{status}");
    assert!(printed == written, "{} of {} bytes", printed.len(), written.len());
    assert!(host.ok(&["logs", "--all", "c"]) == written);
}

#[test]
fn what_rotation_takes_away_from_a_follower_that_is_too_slow_is_counted() {
    let host = Host::new();
    Log::create(&host.log_dir("c"), "stdout");
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let mut command = host.command(&["logs", "--follow", "--all", "c"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Nobody reads while this is written: the pipe fills up, and the follower falls behind.
    let written = write_with_rotation(&host.log_dir("c"), 2, 16 << 20);
    sandbox.remove().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let messages = String::from_utf8(output.stderr).unwrap();
    let count = |line: &str| -> usize {
        line.strip_prefix('[').unwrap().strip_suffix(" bytes lost]").unwrap().parse().unwrap()
    };
    let lost: usize = messages.lines().map(count).sum();
    assert!(lost > 0, "{messages}");
    assert_eq!(output.stdout.len() + lost, written.len(), "{messages}");
    assert!(written.ends_with(&output.stdout[output.stdout.len() - 60_000..]));
}
