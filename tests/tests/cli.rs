//! cubecli, as operators and their scripts use it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "all of this is tests")]

use std::{
    fs,
    io::Read,
    os::unix::fs::symlink,
    process::{ExitCode, Stdio},
    time::Duration,
};

use cube_tests::{
    cases,
    command::start,
    lab::{Lab, Setup},
    needs::Backend,
    runner,
    scenarios::{WAIT, counters, lab_with_waiting_container},
};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        logs_shows_the_last_100_lines_of_stdout,
        logs_selects_lines_and_streams,
        logs_follows_until_the_container_ends,
        logs_selects_by_time_and_shows_it,
        a_unique_prefix_of_an_id_is_enough_and_candidates_are_listed_if_not,
        an_unknown_id_is_an_error_that_names_it,
        ls_lists_sandboxes,
        logs_in_the_bundle_are_found,
        links_below_the_log_root_are_not_followed,
        a_closed_pipe_ends_logs_quietly,
        gc_removes_what_is_older_than_the_retention,
        info_says_which_vmm_is_used_and_why,
        help_explains_every_command,
        counters::status_counts_every_byte,
        counters::status_needs_no_containerd,
        counters::status_names_a_shim_that_does_not_answer,
        counters::status_counts_what_a_reader_has_missed,
        counters::status_counts_reconnects,
        counters::status_counts_what_was_refused,
        counters::fifos_without_readers_share_one_inotify_instance,
    ])
}

/// A lab in which the container `c` has written `lines` lines to both streams and was deleted.
fn lab_with_log(backend: Backend, lines: u32) -> Lab {
    let lab = Lab::new(backend);
    let script = format!("i=1; while [ $i -le {lines} ]; do echo out $i; echo err $i >&2; i=$((i+1)); done");
    lab.run("c", &["sh", "-c", &script]).succeeds();
    lab
}

fn numbered(word: &str, numbers: std::ops::RangeInclusive<u32>) -> String {
    numbers.map(|n| format!("{word} {n}\n")).collect()
}

fn logs_shows_the_last_100_lines_of_stdout(backend: Backend) {
    let lab = lab_with_log(backend, 250);
    assert_eq!(lab.cubecli(&["cubebox", "logs", "c"]).succeeds().out(), numbered("out", 151..=250));
    assert_eq!(lab.cubecli(&["logs", "c"]).succeeds().out(), numbered("out", 151..=250));
}

fn logs_selects_lines_and_streams(backend: Backend) {
    let lab = lab_with_log(backend, 250);
    let logs = |flags: &[&str]| lab.cubecli(&[&["cubebox", "logs"], flags, &["c"]].concat()).succeeds();
    assert_eq!(logs(&["--tail", "5"]).out(), numbered("out", 246..=250));
    assert_eq!(logs(&["--head", "5"]).out(), numbered("out", 1..=5));
    assert_eq!(logs(&["--all"]).out(), numbered("out", 1..=250));
    assert_eq!(logs(&["--tail", "0"]).out(), "");
    assert_eq!(logs(&["--tail", "5", "--stderr"]).out(), numbered("err", 246..=250));
    let both = logs(&["--all", "--both"]);
    let seen = |word: &str| {
        let text = both.out() + &both.err();
        text.lines().filter(|line| line.contains(word)).count()
    };
    assert_eq!((seen("out "), seen("err ")), (250, 250));
}

fn logs_follows_until_the_container_ends(backend: Backend) {
    let lab = Lab::new(backend);
    let script = "echo one; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo two";
    lab.detached("c", &["sh", "-c", script]);
    let follow = start(&mut lab.cubecli_command(&["cubebox", "logs", "--follow", "c"]));
    follow.stdout.wait_for("one\n", lab.limit());
    lab.exec("c", &["touch", "/tmp/go"]).succeeds();
    follow.stdout.wait_for("one\ntwo\n", lab.limit());
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    assert_eq!(follow.wait(Duration::from_secs(20)).succeeds().out(), "one\ntwo\n");
    lab.nothing_is_left();
}

fn logs_selects_by_time_and_shows_it(backend: Backend) {
    let lab = Lab::new(backend);
    lab.run("c", &["sh", "-c", "echo early; sleep 3; echo late"]).succeeds();
    let stamped = lab.cubecli(&["cubebox", "logs", "--timestamps", "c"]).succeeds().out();
    let stamps: Vec<&str> = stamped.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(stamps.len(), 2, "{stamped}");
    assert!(stamps[0].starts_with("20") && stamps[0].contains('T') && stamps[0] < stamps[1], "{stamped}");
    let since = lab.cubecli(&["cubebox", "logs", "--since", stamps[1], "c"]).succeeds().out();
    assert_eq!(since, "late\n");
    let since = lab.cubecli(&["cubebox", "logs", "--since", "1h", "c"]).succeeds().out();
    assert_eq!(since, "early\nlate\n");
}

fn a_unique_prefix_of_an_id_is_enough_and_candidates_are_listed_if_not(backend: Backend) {
    let lab = Lab::new(backend);
    for id in ["web-1", "web-2", "database"] {
        lab.run(id, &["echo", id]).succeeds();
    }
    assert_eq!(lab.cubecli(&["cubebox", "logs", "data"]).succeeds().out(), "database\n");
    lab.cubecli(&["cubebox", "logs", "web"]).fails_with(&["web-1", "web-2"]);
    assert_eq!(lab.cubecli(&["cubebox", "logs", "web-1"]).succeeds().out(), "web-1\n");
}

fn an_unknown_id_is_an_error_that_names_it(backend: Backend) {
    let lab = Lab::new(backend);
    for id in ["nosuch", "../../etc", "a/b", ""] {
        let failed = lab.cubecli(&["cubebox", "logs", id]).fails_with(&[id]);
        assert_eq!(failed.out(), "");
    }
}

fn ls_lists_sandboxes(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    lab.detached("another", &WAIT);
    let list = lab.cubecli(&["cubebox", "ls"]).succeeds().out();
    for word in ["another", "process"] {
        assert!(list.contains(word), "no {word:?} in:\n{list}");
    }
    assert!(list.lines().any(|line| line.split_whitespace().any(|word| word == "c")), "{list}");
    lab.remove("c");
    lab.remove("another");
    let list = lab.cubecli(&["cubebox", "ls"]).succeeds().out();
    assert!(!list.to_lowercase().contains("running"), "{list}");
    lab.nothing_is_left();
}

fn logs_in_the_bundle_are_found(backend: Backend) {
    let lab = Lab::with(Setup { log_in_bundle: true, ..backend.into() });
    lab.detached("c", &["sh", "-c", "echo here; while :; do sleep 0.1; done"]);
    assert!(cube_tests::command::poll(lab.limit(), || {
        fs::read(lab.bundle("c").join("stdout")).is_ok_and(|bytes| bytes == b"here\n")
    }));
    assert_eq!(lab.cubecli(&["cubebox", "logs", "c"]).succeeds().out(), "here\n");
    lab.remove("c");
    assert!(!lab.bundle("c").exists());
    lab.nothing_is_left();
}

fn links_below_the_log_root_are_not_followed(backend: Backend) {
    let lab = lab_with_log(backend, 3);
    fs::write(lab.dir().join("secret"), "secret\n").unwrap();
    let log = lab.log_dir("c").join("stdout");
    fs::remove_file(&log).unwrap();
    symlink(lab.dir().join("secret"), &log).unwrap();
    let failed = lab.cubecli(&["cubebox", "logs", "c"]);
    assert!(!failed.out().contains("secret"), "{failed}");
    let linked = lab.log_dir("linked");
    symlink(lab.dir(), &linked).unwrap();
    fs::rename(lab.dir().join("secret"), lab.dir().join("stdout")).unwrap();
    let failed = lab.cubecli(&["cubebox", "logs", "linked"]);
    assert!(!failed.out().contains("secret"), "{failed}");
}

fn a_closed_pipe_ends_logs_quietly(backend: Backend) {
    let lab = Lab::new(backend);
    lab.run("c", &["cube-test-writer", "repeat", "61626364650a", "8000000"]).succeeds();
    let mut command = lab.cubecli_command(&["cubebox", "logs", "--all", "c"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"abcde\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

fn gc_removes_what_is_older_than_the_retention(backend: Backend) {
    let lab = Lab::with(Setup { log: "retention_hours = 0".into(), ..backend.into() });
    lab.detached("stays", &["sh", "-c", "echo on; while :; do sleep 0.1; done"]);
    lab.run("goes", &["echo", "off"]).succeeds();
    lab.cubecli(&["cubebox", "gc"]).succeeds();
    assert!(!lab.log_dir("goes").exists());
    assert!(lab.log_dir("stays").join("stdout").exists(), "gc must spare what runs");
    lab.remove("stays");
    lab.nothing_is_left();
}

fn info_says_which_vmm_is_used_and_why(backend: Backend) {
    let lab = Lab::new(backend);
    let info = lab.cubecli(&["info"]).succeeds().out();
    let config = lab.config_file().display().to_string();
    for word in [env!("CARGO_PKG_VERSION"), "process", &config] {
        assert!(info.contains(word), "no {word:?} in:\n{info}");
    }
}

fn help_explains_every_command(backend: Backend) {
    let lab = Lab::new(backend);
    let help = lab.cubecli(&["--help"]).succeeds().out();
    for word in ["cubebox", "logs", "info"] {
        assert!(help.contains(word), "no {word:?} in:\n{help}");
    }
    let help = lab.cubecli(&["cubebox", "logs", "--help"]).succeeds().out();
    for word in ["--tail", "--head", "--all", "--stderr", "--both", "--follow", "--since", "--timestamps"] {
        assert!(help.contains(word), "no {word:?} in:\n{help}");
    }
    assert_eq!(lab.cubecli(&["cubebox", "logs"]).code(), 2, "exit status of wrong use");
}
