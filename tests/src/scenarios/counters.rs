//! `cubecli cubebox status`: its counters are exact, whatever happens to the connections behind them.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::{WAIT, lab_with_waiting_container};
use crate::{
    command::{poll, start},
    direct::{Direct, bind_mount},
    guest,
    lab::{Lab, Setup},
    needs::Backend,
    proxy::{
        Proxy,
        plan::{Plan, Target},
    },
};

fn status(lab: &Lab, id: &str) -> Value {
    let printed = lab.cubecli(&["cubebox", "status", "--json", id]).succeeds().out();
    serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{e}: {printed}"))
}

/// A stream of the init process, or of the first exec.
fn stream(status: &Value, exec: bool, name: &str) -> Value {
    let process = status["processes"].as_array().unwrap().iter().find(|p| p["exec"].is_string() == exec);
    let streams = process.and_then(|process| process["streams"].as_array());
    streams.into_iter().flatten().find(|stream| stream["name"] == name).cloned().unwrap_or_default()
}

#[track_caller]
fn wait_for_stream(lab: &Lab, exec: bool, what: impl Fn(&Value) -> bool) -> Value {
    let mut seen = Value::Null;
    let reached = poll(lab.limit(), || {
        seen = status(lab, "c");
        what(&stream(&seen, exec, "stdout"))
    });
    assert!(reached, "{seen:#}");
    stream(&seen, exec, "stdout")
}

/// Received, acknowledged and in the log is what the process has written, to the byte.
pub fn status_counts_every_byte(backend: Backend) {
    let lab = Lab::new(backend);
    let bytes = 3_000_001;
    let script = format!("cube-test-writer repeat 61 {bytes}; {}", WAIT[2]);
    lab.detached("c", &["sh", "-c", &script]);
    // The guest hears of an acknowledgement a moment after the shim has sent it.
    let stdout = wait_for_stream(&lab, false, |s| s["acknowledged"] == bytes && s["guest_lag"] == 0);
    for counter in ["received", "acknowledged"] {
        assert_eq!(stdout[counter], bytes, "{counter}: {stdout}");
    }
    for counter in ["written", "lost", "dropped", "discarded", "reconnects", "refused", "lag", "guest_lag"] {
        assert_eq!(stdout[counter], 0, "{counter}: {stdout}");
    }
    assert_eq!(stdout["log"]["bytes"], bytes);
    let status = status(&lab, "c");
    assert_eq!(
        (status["state"].as_str(), status["vmm"]["backend"].as_str()),
        (Some("running"), Some(backend.name()))
    );
    assert_eq!(status["processes"][0]["state"], "running");
    assert!(status["guest"]["memory_total_bytes"].as_u64() > Some(1 << 20), "{status:#}");
    lab.remove("c");
    lab.cubecli(&["cubebox", "status", "c"]).fails_with(&["\"c\"", "cubebox ls"]);
    lab.nothing_is_left();
}

/// It asks nobody but the shim.
pub fn status_needs_no_containerd(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    lab.stop_containerd();
    let page = lab.cubecli(&["cubebox", "status", "c"]).succeeds().out();
    for word in ["running", backend.name(), "connected", "stdout"] {
        assert!(page.contains(word), "no {word:?} in:\n{page}");
    }
    lab.start_containerd();
    lab.remove("c");
    lab.nothing_is_left();
}

/// It says which process, and what to do.
pub fn status_names_a_shim_that_does_not_answer(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let shim = lab.shim_pid("c");
    kill(shim, Signal::SIGSTOP).unwrap();
    let refused = lab.cubecli(&["cubebox", "status", "c"]);
    kill(shim, Signal::SIGCONT).unwrap();
    refused.fails_with(&["does not answer", &format!("kill -KILL {shim}")]);
    assert_eq!(status(&lab, "c")["shim"]["pid"], shim.as_raw());
    lab.remove("c");
    lab.nothing_is_left();
}

/// What a FIFO reader missed because the log was rotated meanwhile is counted, and nothing else.
pub fn status_counts_what_a_reader_has_missed(backend: Backend) {
    let lab = Lab::with(Setup { log: "segment_bytes = 131072\nsegments = 2".into(), ..backend.into() });
    let bytes: u64 = 4 << 20;
    let script = format!("cube-test-writer repeat 61 {bytes}; {}", WAIT[2]);
    let mut direct = Direct::new(&lab, "c", &["sh", "-c", &script]);
    let rootfs = direct.unpack_image();
    let fifo = direct.bundle.with_file_name("fifo").with_extension("stdout");
    drop(direct.read_fifos());
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let unread = wait_for_stream(&lab, false, |stream| stream["acknowledged"] == bytes);
    assert_eq!((unread["written"].as_u64(), unread["lost"].as_u64()), (Some(0), Some(0)), "{unread}");
    assert_eq!(unread["lag"], bytes);
    let kept = unread["log"]["bytes"].as_u64().unwrap();
    assert_eq!(unread["log"]["rotated_away"], bytes - kept);

    let mut reader = fs::File::open(fifo).unwrap();
    let read = thread::spawn(move || {
        let mut read = Vec::new();
        reader.read_to_end(&mut read).map(|n| n as u64)
    });
    let caught_up = wait_for_stream(&lab, false, |stream| stream["lag"] == 0);
    let (written, lost) = (caught_up["written"].as_u64().unwrap(), caught_up["lost"].as_u64().unwrap());
    assert_eq!(written + lost, bytes);
    assert!(lost > 0 && written >= kept, "{caught_up}");
    assert_eq!(caught_up["dropped"], 0, "the log has it");
    direct.kill(9).unwrap();
    direct.wait().unwrap();
    assert_eq!(read.join().unwrap().unwrap(), written);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

/// Connections that are cut are counted, bytes that are sent again are not.
pub fn status_counts_reconnects(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let proxy = Proxy::at(&guest::socket(&lab, "c"));
    proxy.follow(Target::Streams, Plan::random(1, 700_001));
    let bytes = 8 << 20;
    let script = format!("cube-test-writer repeat 61 {bytes}; cat");
    let mut exec =
        start(lab.exec_command(&[], "c", &["sh", "-c", &script]).stdin(std::process::Stdio::piped()));
    let stdout = wait_for_stream(&lab, true, |stream| stream["acknowledged"] == bytes && stream["lag"] == 0);
    assert_eq!((&stdout["received"], &stdout["written"]), (&stdout["acknowledged"], &stdout["acknowledged"]));
    let reconnects = stdout["reconnects"].as_u64().unwrap();
    assert!(reconnects > 5, "{reconnects} of {} cuts", proxy.cuts());
    assert_eq!((&stdout["refused"], &stdout["lost"]), (&Value::from(0), &Value::from(0)));
    exec.feed(Vec::new());
    assert_eq!(exec.wait(lab.limit()).succeeds().stdout.len(), bytes);
    lab.remove("c");
    lab.nothing_is_left();
}

/// A guest that breaks the protocol on one connection is counted once, and the stream goes on.
pub fn status_counts_what_was_refused(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    babble_once(&guest::socket(&lab, "c"));
    let mut exec = start(
        lab.exec_command(&[], "c", &["sh", "-c", "echo through; cat"]).stdin(std::process::Stdio::piped()),
    );
    exec.stdout.wait_for("through\n", lab.limit());
    assert_eq!(status(&lab, "c")["refused_connections"], 1);
    exec.feed(Vec::new());
    exec.wait(lab.limit()).succeeds();
    let left = poll(lab.limit(), || status(&lab, "c")["processes"].as_array().map(Vec::len) == Some(1));
    assert!(left, "the exec was deleted");
    assert_eq!(status(&lab, "c")["refused_connections"], 1, "what happened stays counted");
    lab.remove("c");
    lab.nothing_is_left();
}

/// Takes the place of a guest's socket: the first new connection gets what is no frame.
fn babble_once(path: &Path) {
    let real = path.with_extension("real");
    fs::rename(path, &real).unwrap();
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let mut connections = listener.incoming().flatten();
        if let Some(mut first) = connections.next() {
            let mut line = [0; 13];
            first.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 1025\n");
            first.write_all(b"OK 1\n").unwrap();
            first.write_all(&[0xff; 64]).unwrap();
            // Until the shim has had enough.
            first.read_to_end(&mut Vec::new()).ok();
        }
        for near in connections {
            // Nobody is there any more when the sandbox is deleted.
            let Ok(far) = UnixStream::connect(&real) else { continue };
            for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                thread::spawn(move || {
                    std::io::copy(&mut from, &mut to).ok();
                    to.shutdown(std::net::Shutdown::Write).ok();
                });
            }
        }
    });
}

/// inotify instances are limited per user: FIFOs that nobody reads share one, and give back what they had.
pub fn fifos_without_readers_share_one_inotify_instance(backend: Backend) {
    let lab = Lab::new(backend);
    // Without --null-io: FIFOs that nobody reads, once ctr has gone.
    let script = "while :; do echo out; echo err >&2; sleep 0.1; done";
    let mut detached = lab.run_command(&["--detach"], "c", &["sh", "-c", script]);
    start(&mut detached).wait(lab.limit()).succeeds();
    let descriptors = || {
        let links = fs::read_dir(format!("/proc/{}/fd", lab.shim_pid("c"))).unwrap().flatten();
        links
            .flat_map(|link| fs::read_link(link.path()))
            .map(|link| link.display().to_string())
            .collect::<Vec<_>>()
    };
    let instances = || descriptors().iter().filter(|link| link.contains("inotify")).count();
    assert!(poll(lab.limit(), || instances() == 1), "{:#?}", descriptors());
    let before = descriptors().len();
    for _ in 0..5 {
        lab.exec("c", &["echo", "seen"]).succeeds();
    }
    assert!(poll(lab.limit(), || descriptors().len() <= before), "{before}: {:#?}", descriptors());
    assert_eq!(instances(), 1);
    lab.remove("c");
    lab.nothing_is_left_but_fifos();
}
