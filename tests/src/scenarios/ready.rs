//! Ready probes, and `cubecli cubebox wait --ready`.

use serde_json::Value;

use super::lab_with_waiting_container;
use crate::{
    command::{poll, start},
    lab::Lab,
    needs::Backend,
};

/// What `cubecli cubebox status` says of the probe of `c`.
fn probe(lab: &Lab) -> Value {
    let status = lab.cubecli(&["cubebox", "status", "--json", "c"]).succeeds().out();
    let status: Value = serde_json::from_str(&status).unwrap();
    status["processes"][0]["ready"].clone()
}

fn wait(lab: &Lab) {
    lab.cubecli(&["cubebox", "wait", "--ready", "c"]).succeeds();
}

/// Waits for the file /tmp/go, then runs `command`.
fn after_go(command: &str) -> [String; 3] {
    let script = format!("trap 'exit 143' TERM; while [ ! -e /tmp/go ]; do sleep 0.1; done; {command}");
    ["sh".into(), "-c".into(), script]
}

/// Starts `c` with one annotation.
fn lab_with(backend: Backend, annotation: &str, argv: &[String]) -> Lab {
    let lab = Lab::new(backend);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    lab.detached_with(&["--annotation", annotation], "c", &argv);
    lab
}

/// Waits until the last attempt has failed with `reason`, and looks who tells it.
#[track_caller]
fn fails_with(lab: &Lab, reason: &str) {
    let failed = || probe(lab)["reason"] == reason;
    assert!(poll(lab.limit(), failed), "{}", probe(lab));
    let waited = lab.cubecli(&["cubebox", "wait", "--ready", "--timeout", "1", "c"]);
    let told = format!("\"c\", {}: {reason}", probe(lab)["probe"].as_str().unwrap());
    assert_eq!(waited.fails_with(&["not ready after 1s", &told]).code(), 1);
}

fn go(lab: &Lab) {
    lab.exec("c", &["touch", "/tmp/go"]).succeeds();
}

#[track_caller]
fn became_ready(lab: Lab) {
    let probe = probe(&lab);
    assert!(probe["since"].is_string() && probe["reason"].is_null(), "{probe}");
    wait(&lab);
    lab.remove("c");
    lab.nothing_is_left();
}

/// With a pause in the middle of the wait, which is none of its business.
pub fn a_web_server_that_comes_up_late_is_waited_for_through_a_pause(backend: Backend) {
    let serve = "mkdir /tmp/www; echo fine >/tmp/www/healthz; exec httpd -f -p 8080 -h /tmp/www";
    let lab = lab_with(backend, "cube.ready.http=8080/healthz", &after_go(serve));
    fails_with(&lab, "connection refused");
    assert_eq!(probe(&lab)["probe"], "http 127.0.0.1:8080/healthz");
    let waiting = start(&mut lab.cubecli_command(&["cubebox", "wait", "--ready", "c"]));
    lab.ctr(&["task", "pause", "c"]).succeeds();
    let paused = lab.cubecli(&["cubebox", "wait", "--ready", "--timeout", "1", "c"]);
    paused.fails_with(&["the sandbox is paused"]);
    lab.ctr(&["task", "resume", "c"]).succeeds();
    go(&lab);
    waiting.wait(lab.limit()).succeeds();
    became_ready(lab);
}

/// 404 is an answer, but not the one that is wanted.
pub fn a_page_that_is_missing_is_not_ready(backend: Backend) {
    let serve = "mkdir /tmp/www; httpd -p 8080 -h /tmp/www; while :; do sleep 0.1; done";
    let lab = lab_with(backend, "cube.ready.http=http://localhost:8080/healthz", &after_go(serve));
    go(&lab);
    fails_with(&lab, "HTTP 404");
    lab.exec("c", &["touch", "/tmp/www/healthz"]).succeeds();
    wait(&lab);
    became_ready(lab);
}

/// It need not say a word.
pub fn a_port_that_takes_connections_is_ready(backend: Backend) {
    let lab = lab_with(backend, "cube.ready.tcp=5432", &after_go("exec nc -ll -p 5432 -e cat"));
    fails_with(&lab, "connection refused");
    go(&lab);
    wait(&lab);
    became_ready(lab);
}

/// It runs beside the init process, and makes neither an exec nor an event.
pub fn a_program_that_ends_with_0_is_ready(backend: Backend) {
    let exec = r#"cube.ready.exec=["sh","-c","echo noise; [ -e /tmp/up ]"]"#;
    let lab = lab_with(backend, exec, &after_go("touch /tmp/up; while :; do sleep 0.1; done"));
    fails_with(&lab, "exit status 1");
    go(&lab);
    wait(&lab);
    let status = lab.cubecli(&["cubebox", "status", "c"]).succeeds().out();
    assert!(status.contains("since 20") && status.contains("exec [\"sh\""), "{status}");
    became_ready(lab);
}

/// The wait does not last longer than the container.
pub fn a_container_that_exits_before_it_is_ready_is_an_error(backend: Backend) {
    let lab = lab_with(backend, "cube.ready.tcp=5432", &after_go("exit 7"));
    let waiting = start(&mut lab.cubecli_command(&["cubebox", "wait", "--ready", "c"]));
    go(&lab);
    waiting.wait(lab.limit()).fails_with(&["\"c\" has exited with status 7"]);
    lab.wait_for_state("c", Some("STOPPED"));
    lab.cubecli(&["cubebox", "wait", "--ready", "c"]).fails_with(&["exited with status 7"]);
    lab.delete_stopped("c", 7);
    lab.cubecli(&["cubebox", "wait", "--ready", "c"]).fails_with(&["no sandbox"]);
    lab.nothing_is_left();
}

/// And has nothing in its status.
pub fn without_a_probe_a_container_that_runs_is_ready(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    lab.cubecli(&["cubebox", "wait", "--ready", "--timeout", "0", "c"]).succeeds();
    assert!(probe(&lab).is_null());
    lab.remove("c");
    lab.nothing_is_left();
}

/// Before anything is made.
pub fn a_probe_that_makes_no_sense_is_refused(backend: Backend) {
    let lab = Lab::new(backend);
    let run = |annotations: &[&str]| {
        let flags: Vec<&str> = annotations.iter().flat_map(|a| ["--annotation", a]).collect();
        let run = lab.run_with(&flags, "c", &["true"]);
        lab.ctr(&["container", "delete", "c"]);
        run
    };
    run(&["cube.ready.http=https://localhost/"]).fails_with(&[
        "cube.ready.http",
        "https://localhost/",
        "8080/healthz",
    ]);
    run(&["cube.ready.tcp=web:80"]).fails_with(&["cube.ready.tcp", "web:80"]);
    run(&["cube.ready.exec=/bin/check"]).fails_with(&["cube.ready.exec", "JSON array"]);
    run(&["cube.ready.tcp=80", "cube.ready.http=80"]).fails_with(&["more than one ready probe"]);
    lab.nothing_is_left();
}
