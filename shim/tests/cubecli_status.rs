//! `cubecli cubebox status` with shims that answer, hang, refuse or are gone.
#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

mod support;

use std::{os::unix::net::UnixListener, time::Instant};

use async_trait::async_trait;
use cube_shim::control::{
    sandbox::{
        Control, Events, Exit, Guest, GuestLag, Log, Process, Ready, Shim, StatusRequest, StatusResponse,
        Stream, Vmm,
    },
    sandbox_ttrpc::Sandbox,
};
use protobuf::MessageField;
use serde_json::{Value, json};
use support::{Host, serve};
use ttrpc::r#async::TtrpcContext;

/// A shim that answers, or refuses to.
struct Fake(Option<StatusResponse>);

#[async_trait]
impl Sandbox for Fake {
    async fn status(&self, _: &TtrpcContext, _: StatusRequest) -> ttrpc::Result<StatusResponse> {
        let refusal = ttrpc::get_status(ttrpc::Code::UNIMPLEMENTED, "/cube.shim.v1.Sandbox/Status");
        self.0.clone().ok_or(ttrpc::Error::RpcStatus(refusal))
    }
}

fn example() -> StatusResponse {
    let log = Log { segments: 4, bytes: 64 << 20, rotated_away: 7, lost: 8, ..Default::default() };
    let stdout = Stream {
        name: "stdout".into(),
        connected: true,
        received: 123_456_789,
        acknowledged: 123_456_780,
        written: 5000,
        lost: 12,
        dropped: 5,
        discarded: 3,
        reconnects: 2,
        refused: 1,
        lag: 9,
        guest_lag: MessageField::some(GuestLag { bytes: 17, ..Default::default() }),
        log: MessageField::some(log),
        ..Default::default()
    };
    let init = Process {
        container_id: "c".into(),
        state: "running".into(),
        guest_pid: 12,
        streams: vec![stdout],
        ready: MessageField::some(Ready {
            probe: "tcp 127.0.0.1:5432".into(),
            reason: "connection refused".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let exec = Process {
        container_id: "c".into(),
        exec_id: "sh".into(),
        state: "stopped".into(),
        exit: MessageField::some(Exit { status: 137, at_ns: 1_000_000_000, ..Default::default() }),
        ..Default::default()
    };
    StatusResponse {
        namespace: "default".into(),
        sandbox_id: "c".into(),
        state: "running".into(),
        created_at_ns: 1,
        shim: MessageField::some(Shim { version: "9.9".into(), pid: 55, ..Default::default() }),
        vmm: MessageField::some(Vmm {
            backend: "qemu".into(),
            reason: "no KVM".into(),
            pid: 4711,
            uptime_ns: 125_000_000_000,
            timeline: 0xabc,
            agent_version: "9.8".into(),
            ..Default::default()
        }),
        guest: MessageField::some(Guest { memory_total_bytes: 256 << 20, ..Default::default() }),
        control: MessageField::some(Control { connected: true, reconnects: 3, ..Default::default() }),
        events: MessageField::some(Events { waiting: 2, ..Default::default() }),
        processes: vec![init, exec],
        refused_connections: 1,
        ..Default::default()
    }
}

fn json_of(host: &Host, id: &str) -> Value {
    serde_json::from_slice(&host.ok(&["cubebox", "status", "--json", id])).unwrap()
}

#[test]
fn a_status_is_a_page_for_people() {
    let host = Host::new();
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let _shim = serve(&sandbox.socket().unwrap(), Fake(Some(example())));
    let text = host.text(&["cubebox", "status", "c"]);
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let line = |name: &str| lines.iter().find(|line| line.starts_with(&[name])).unwrap()[1..].join(" ");
    assert_eq!(line("sandbox"), "default/c");
    assert_eq!(line("vm"), "qemu (pid 4711) for 2m: no KVM");
    assert_eq!(line("guest"), "256.0 MiB memory, 0 available, agent 0 resident");
    assert_eq!(line("control"), "connected, 3 reconnects, last event 0");
    assert_eq!(line("c/sh"), "stopped - 137 at 1970-01-01T00:00:01.000000000Z");
    assert!(text.contains("not yet: connection refused  tcp 127.0.0.1:5432"), "{text}");
    assert!(text.contains("117.7 MiB"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 130), "{text}");
}

#[test]
fn a_status_is_an_object_with_every_number_in_full_for_programs() {
    let host = Host::new();
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let _shim = serve(&sandbox.socket().unwrap(), Fake(Some(example())));
    let status = json_of(&host, "c");
    assert_eq!(status["vmm"]["timeline"], "0000000000000abc");
    let ready = json!({"probe": "tcp 127.0.0.1:5432", "since": null, "reason": "connection refused"});
    assert_eq!((&status["processes"][0]["ready"], &status["processes"][1]["ready"]), (&ready, &Value::Null));
    assert_eq!(status["processes"][1]["exec"], "sh");
    assert_eq!(status["processes"][1]["exit"]["status"], 137);
    let expected = json!({
        "name": "stdout", "connected": true, "received": 123_456_789, "acknowledged": 123_456_780, "written": 5000,
        "lost": 12, "dropped": 5, "discarded": 3, "reconnects": 2, "refused": 1, "lag": 9, "guest_lag": 17,
        "complete": false, "truncated": false,
        "log": {"segments": 4, "bytes": 64 << 20, "rotated_away": 7, "lost": 8, "waits_for": null},
    });
    assert_eq!(status["processes"][0]["streams"][0], expected);
}

#[test]
fn a_guest_that_does_not_answer_hides_nothing_else() {
    let host = Host::new();
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let mut status = example();
    status.guest = MessageField::none();
    status.guest_error = "the guest did not answer Info within 1s".into();
    let _shim = serve(&sandbox.socket().unwrap(), Fake(Some(status)));
    let text = host.text(&["cubebox", "status", "c"]);
    assert!(text.contains("does not answer: the guest did not answer Info within 1s"), "{text}");
    let status = json_of(&host, "c");
    assert!(status["guest"].is_null() && status["processes"][0]["streams"][0]["received"] == 123_456_789);
}

#[test]
fn an_id_may_be_shortened_as_long_as_it_is_clear() {
    let host = Host::new();
    let sandboxes = ["web-1", "web-2"].map(|id| host.sandbox(id, host.log_dir(id)));
    let _shims = sandboxes.map(|dir| serve(&dir.socket().unwrap(), Fake(Some(example()))));
    assert_eq!(json_of(&host, "web-1")["state"], "running");
    let (code, message) = host.fails(&["cubebox", "status", "web"]);
    assert!(code == 4 && message.contains("default/web-1") && message.contains("default/web-2"), "{message}");
    let (code, message) = host.fails(&["cubebox", "status", "nosuch"]);
    assert!(code == 3 && message.contains("\"nosuch\"") && message.contains("cubebox ls"), "{message}");
    assert_eq!(host.fails(&["cubebox", "status", "--namespace", "other", "web-1"]).0, 3);
}

#[test]
fn a_shim_that_says_nothing_is_named_with_what_to_do() {
    let host = Host::new();
    let dirs = ["gone", "hangs", "refuses"].map(|id| host.sandbox(id, host.log_dir(id)));
    let _hanging = UnixListener::bind(dirs[1].socket().unwrap()).unwrap();
    let _refusing = serve(&dirs[2].socket().unwrap(), Fake(None));
    let begun = Instant::now();
    let status = |id| host.fails(&["cubebox", "status", id]);
    let (code, message) = status("gone");
    assert!(
        code == 1 && message.contains("default/gone") && message.contains("cubebox rm --force gone"),
        "{message}"
    );
    let (code, message) = status("hangs");
    let kill = format!("kill -KILL {}", std::process::id());
    assert!(code == 1 && message.contains("default/hangs") && message.contains(&kill), "{message}");
    let (code, message) = status("refuses");
    assert!(code == 1 && message.contains("another version"), "{message}");
    assert!(begun.elapsed() < support::LIMIT);
}
