//! Templates: builds that log to a place of their own, snapshots that wait until the build is ready, clones that
//! get the environment of their own create.

use std::{
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{
    Client, TaskClient,
    api::{DeleteRequest, ExecProcessRequest, StartRequest, WaitRequest},
    protobuf::well_known_types::any::Any,
};
use serde_json::Value;
use ttrpc::context;

use super::block::BLOCK;
use crate::{
    command::{poll, start},
    direct::spec,
    lab::Lab,
    logs,
    needs::Backend,
};

/// Says something on both streams, is ready once it is told to go, and lives until it is killed.
const BUILD: [&str; 3] = [
    "sh",
    "-c",
    "echo building; echo noise >&2; until [ -e /tmp/go ]; do sleep 0.05; done; touch /tmp/up; echo built; \
     trap 'exit 143' TERM; while :; do sleep 0.1; done",
];

const READY: &str = "cube.ready.exec=[\"sh\",\"-c\",\"[ -e /tmp/up ]\"]";

fn build(lab: &Lab, flags: &[&str], template: &str, id: &str) {
    let template = format!("cube.template.id={template}");
    let annotations = ["--annotation", &template, "--annotation", READY];
    lab.detached_with(&[&annotations, flags].concat(), id, &BUILD);
}

fn has_logged(lab: &Lab, template: &str, expected: &str) {
    let told = || lab.cubecli(&["cubebox", "logs", "--tpl", template]).out();
    assert!(poll(lab.limit(), || told() == expected), "{:?} in place of {expected:?}", told());
}

/// During the build, and when it is over. One at a time: the next sets the older log aside.
pub fn the_log_of_a_build_is_found_by_the_id_of_its_template(backend: Backend) {
    let lab = Lab::new(backend);
    build(&lab, &[], "py", "c");
    has_logged(&lab, "py", "building\n");
    assert_eq!(lab.cubecli(&["logs", "--stderr", "--tpl", "py"]).succeeds().out(), "noise\n");
    assert!(!lab.log_dir("c").exists(), "there is another log");
    let follower = start(&mut lab.cubecli_command(&["logs", "--follow", "--tpl", "py"]));

    let flags = ["--detach", "--null-io", "--annotation", "cube.template.id=py"];
    let second = start(&mut lab.run_command(&flags, "d", &BUILD)).wait(lab.limit());
    second.fails_with(&["another sandbox writes its log to", "/templates/py"]);
    lab.ctr(&["container", "delete", "d"]);
    for (wrong, words) in [
        ("cube.container.log_forwarding=false", "cube.container.log_forwarding=false"),
        ("cube.snapshot.restore=one", "cube.snapshot.restore"),
    ] {
        let flags = [&flags[..], &["--annotation", wrong]].concat();
        let refused = start(&mut lab.run_command(&flags, "d", &BUILD)).wait(lab.limit());
        refused.fails_with(&["cube.template.id cannot be set together", words]);
        lab.ctr(&["container", "delete", "d"]);
    }

    lab.exec("c", &["touch", "/tmp/go"]).succeeds();
    has_logged(&lab, "py", "building\nbuilt\n");
    lab.remove("c");
    assert_eq!(follower.wait(lab.limit()).succeeds().out(), "building\nbuilt\n");
    has_logged(&lab, "py", "building\nbuilt\n");

    build(&lab, &[], "py", "c");
    has_logged(&lab, "py", "building\n");
    let older = fs::read_dir(lab.template_log_dir("py").parent().unwrap()).unwrap();
    let older: Vec<PathBuf> =
        older.map(|entry| entry.unwrap().path()).filter(|dir| !dir.ends_with("py")).collect();
    assert_eq!(older.len(), 1, "{older:?}");
    assert_eq!(logs::read(&older[0], "stdout"), b"building\nbuilt\n");
    lab.remove("c");
    lab.nothing_is_left();
}

/// Whoever waits for the snapshot is told when the build ends.
pub fn a_snapshot_of_a_build_that_exits_is_an_error_at_once(backend: Backend) {
    let lab = Lab::new(backend);
    build(&lab, &[], "py", "c");
    let mut snapshot = start(&mut lab.cubecli_command(&["cubebox", "snapshot", "c"]));
    has_logged(&lab, "py", "building\n");
    assert!(snapshot.is_running());
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "c"]).succeeds();
    snapshot.wait(lab.limit()).fails_with(&["\"c\" has exited with status 137"]);
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// A build that is ready when it is told to; a snapshot with the template's name, which says what it was made
/// from; two clones, each with the environment and the limits of its own create.
pub fn clones_of_a_template_have_the_environment_that_they_are_created_with(backend: Backend) {
    let lab = Lab::new(backend);
    build(&lab, &BLOCK, "web", "c");
    let mut snapshot = start(&mut lab.cubecli_command(&["cubebox", "snapshot", "c"]));
    has_logged(&lab, "web", "building\n");
    lab.exec("c", &["true"]).succeeds();
    assert!(snapshot.is_running(), "it does not wait");
    lab.exec("c", &["touch", "/tmp/go"]).succeeds();
    assert_eq!(snapshot.wait(lab.limit()).succeeds().out(), "web\n");
    let listed = lab.cubecli(&["cubebox", "snapshots", "--json"]).succeeds().out();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let template = &listed[0]["manifest"]["template"];
    assert_eq!(template["id"], "web");
    assert_eq!(template["args"][0], "sh");
    lab.remove("c");
    has_logged(&lab, "web", "building\nbuilt\n");

    for id in ["d", "e"] {
        let (token, ready) = (format!("TOKEN=secret-{id}"), format!("[ $TOKEN = secret-{id} ]"));
        let ready = format!("cube.ready.exec=[\"sh\",\"-c\",\"{ready}\"]");
        let flags = ["--annotation", "cube.snapshot.restore=web", "--annotation", &ready];
        let flags = [&flags[..], &["--env", &token, "--memory-limit", "100663296"]].concat();
        lab.detached_with(&flags, id, &["false"]);
    }
    for id in ["d", "e"] {
        lab.cubecli(&["cubebox", "wait", "--ready", id]).succeeds();
        assert_eq!(bare_exec(&lab, id, &["sh", "-c", "echo $TOKEN"]), format!("secret-{id}\n"));
        let metrics = lab.ctr(&["task", "metrics", "--format", "json", id]).succeeds().out();
        assert!(metrics.contains("100663296"), "the limit is not that of the create: {metrics}");
        no_file_tells(&lab.run_dir(), &format!("secret-{id}"));
    }
    no_file_tells(&lab.dir().join("snapshots/web/manifest.json"), "secret");

    let flags = ["--annotation", "cube.snapshot.restore=web", "--detach", "--null-io"];
    let flags = [&flags[..], &["--mount", "type=bind,src=/tmp,dst=/data,options=rbind:rw"]].concat();
    let refused = start(&mut lab.run_command(&flags, "f", &["false"])).wait(lab.limit());
    refused.fails_with(&["\"/tmp\" on \"/data\" would be missing"]);
    lab.ctr(&["container", "delete", "f"]);

    lab.uses_sandbox(lab.key("g"));
    assert_eq!(lab.cubecli(&["cubebox", "restore", "web", "--id", "g"]).succeeds().out(), "g\n");
    lab.cubecli(&["cubebox", "wait", "--ready", "g"]).succeeds();
    for id in ["d", "e", "g"] {
        lab.remove(id);
    }
    lab.nothing_is_left();
}

/// The output of an exec whose own environment is `PATH`: containerd's client would add that of the container.
fn bare_exec(lab: &Lab, id: &str, argv: &[&str]) -> String {
    let address = fs::read_to_string(lab.bundle(id).join("address")).unwrap();
    let task = TaskClient::new(Client::connect(address.trim()).unwrap());
    let context = || context::with_timeout(lab.limit().as_nanos() as i64);
    let (id, exec_id) = (id.to_owned(), "bare".to_owned());
    let output = lab.dir().join(format!("{id}.bare"));
    let process = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: spec(argv)["process"].to_string().into_bytes(),
        ..Default::default()
    };
    let exec = ExecProcessRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        stdout: format!("file://{}", output.display()),
        spec: Some(process).into(),
        ..Default::default()
    };
    task.exec(context(), &exec).unwrap();
    let request = StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
    task.start(context(), &request).unwrap();
    let request = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
    assert_eq!(task.wait(context(), &request).unwrap().exit_status, 0);
    // It drains the output.
    task.delete(context(), &DeleteRequest { id, exec_id, ..Default::default() }).unwrap();
    let text = fs::read_to_string(&output).unwrap();
    fs::remove_file(output).unwrap();
    text
}

/// Looks into `path`, or every regular file below it.
fn no_file_tells(path: &Path, secret: &str) {
    let meta = fs::symlink_metadata(path).unwrap();
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            no_file_tells(&entry.unwrap().path(), secret);
        }
    } else if meta.is_file() {
        let content = fs::read(path).unwrap();
        let found = content.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{} tells {secret:?}", path.display());
    }
}
