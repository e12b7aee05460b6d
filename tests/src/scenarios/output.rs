//! Where output goes, and where input comes from.

use std::{fs, os::unix::fs::PermissionsExt, process::Stdio, time::Duration};

use super::lab_with_waiting_container;
use crate::{
    command::{Running, poll, start},
    lab::Lab,
    logs,
    needs::Backend,
};

/// To both, each stream for itself, and the log stays when the container is gone.
pub fn output_lands_in_the_log_and_on_stdout(backend: Backend) {
    let lab = Lab::new(backend);
    let script = "for i in 1 2 3; do echo out $i; echo err $i >&2; done";
    let finished = lab.run("c", &["sh", "-c", script]).succeeds();
    let (out, err) = ("out 1\nout 2\nout 3\n", "err 1\nerr 2\nerr 3\n");
    assert_eq!((finished.out().as_str(), finished.err().as_str()), (out, err));
    lab.nothing_is_left();
    let dir = lab.log_dir("c");
    assert_eq!(logs::read(&dir, "stdout"), out.as_bytes());
    assert_eq!(logs::read(&dir, "stderr"), err.as_bytes());
    for name in ["stdout", "stderr", "stdout.idx", "stderr.idx"] {
        let mode = fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "mode of {name}");
    }
}

/// Not when a buffer is full or the process ends.
pub fn output_arrives_while_the_process_runs(backend: Backend) {
    let lab = Lab::new(backend);
    // By a signal and not by an exec: what an exec leaves to its client is deleted with the container.
    let script = "trap 'echo last; exit 0' USR1; echo first; while :; do sleep 0.1; done";
    let mut running = lab.attached("c", &["sh", "-c", script]);
    running.stdout.wait_for("first\n", lab.limit());
    let logged =
        poll(Duration::from_secs(5), || fs::read(lab.log_dir("c").join("stdout")).unwrap() == b"first\n");
    assert!(logged, "the line is on stdout but not in the log");
    assert!(running.is_running());
    lab.ctr(&["task", "kill", "--signal", "SIGUSR1", "c"]).succeeds();
    assert_eq!(running.wait(lab.limit()).succeeds().out(), "first\nlast\n");
    lab.nothing_is_left();
}

/// A pipe into the process, and its end.
pub fn stdin_is_piped_in_and_its_end_is_seen(backend: Backend) {
    let lab = Lab::new(backend);
    let cat = |id, script| start(lab.run_command(&["--rm"], id, &["sh", "-c", script]).stdin(Stdio::piped()));
    let text = feed_when_ready(&lab, cat("c", "echo ready; cat; echo end"), b"one\ntwo\n".to_vec());
    assert_eq!(text, "one\ntwo\nend\n");
    let mut large = vec![0; 8 << 20];
    cube_test_writer::fill(9, 0, &mut large);
    let expected = lab.run("e", &["cube-test-writer", "sha256", "9", "0", "8388608"]).succeeds().out();
    let found = feed_when_ready(&lab, cat("d", "echo ready; sha256sum"), large);
    assert_eq!(found.split(' ').next(), Some(expected.trim()));
    lab.nothing_is_left();
}

/// ctr forgets to pass on an end of input that it sees before the process has started.
fn feed_when_ready(lab: &Lab, mut running: Running, bytes: Vec<u8>) -> String {
    running.stdout.wait_for("ready\n", lab.limit());
    running.feed(bytes);
    let text = running.wait(lab.limit()).succeeds().out();
    text.strip_prefix("ready\n").unwrap().to_owned()
}

/// So does an exec.
pub fn stdin_of_an_exec_is_piped_in_and_its_end_is_seen(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let script = ["sh", "-c", "echo ready; cat; echo end"];
    let cat = start(lab.exec_command(&[], "c", &script).stdin(Stdio::piped()));
    assert_eq!(feed_when_ready(&lab, cat, b"hello\n".to_vec()), "hello\nend\n");
    lab.remove("c");
    lab.nothing_is_left();
}

/// `ctr run -d` leaves FIFOs that nobody reads: the log gets everything, and the process ends.
pub fn fifos_without_a_reader_stall_nothing(backend: Backend) {
    let lab = Lab::new(backend);
    let stream = ["cube-test-writer", "stream", "1", "20000000", "2", "20000000"];
    start(&mut lab.run_command(&["--detach"], "c", &stream)).wait(lab.limit()).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    logs::compare_segments(&lab.log_dir("c"), "stdout", 1, 20_000_000);
    logs::compare_segments(&lab.log_dir("c"), "stderr", 2, 20_000_000);
    lab.nothing_is_left_but_fifos();
}

/// `cube.container.log_forwarding=false`.
pub fn no_log_is_kept_where_none_is_wanted(backend: Backend) {
    let lab = Lab::new(backend);
    let flags = ["--annotation", "cube.container.log_forwarding=false"];
    assert_eq!(lab.run_with(&flags, "c", &["echo", "secret"]).succeeds().out(), "secret\n");
    assert!(!lab.log_dir("c").join("stdout").exists());
    lab.nothing_is_left();
}

/// `file://`: both streams append to one file.
pub fn a_file_uri_gets_both_streams(backend: Backend) {
    let lab = Lab::new(backend);
    let file = lab.dir().join("both.log");
    let uri = format!("file://{}", file.display());
    lab.detached_with_log(&uri, "c", &["sh", "-c", "echo out; sleep 0.3; echo err >&2"]);
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    assert_eq!(fs::read_to_string(&file).unwrap(), "out\nerr\n");
    lab.nothing_is_left();
}

/// `binary://`: fds 3, 4 and 5, the two variables, arguments from the query.
pub fn a_binary_uri_runs_a_log_program_as_containerds_own_shim_does(backend: Backend) {
    let lab = Lab::new(backend);
    let program = lab.dir().join("logger");
    let result = lab.dir().join("logged");
    let script = format!(
        "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $*\" > {0}.env\ncat <&3 > {0}.out &\ncat <&4 > {0}.err\nwait\n",
        result.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?-key=value", program.display());
    lab.detached_with_log(&uri, "c", &["sh", "-c", "echo out; echo err >&2"]);
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    let read = |suffix| fs::read_to_string(format!("{}.{suffix}", result.display())).unwrap_or_default();
    assert_eq!((read("out").as_str(), read("err").as_str()), ("out\n", "err\n"));
    assert_eq!(read("env"), format!("c {} -key value\n", lab.namespace()));
    lab.nothing_is_left();
}
