//! Snapshots of sandboxes, and sandboxes that go on from one, under containerd.

use std::{collections::BTreeSet, thread, time::SystemTime};

use super::{block::BLOCK, full_flow};
use crate::{
    command::{poll, start},
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    soak,
};

const SEED: &str = "5";

/// Writes without end until it is told to stop, and then says how much that was.
pub(super) const WRITER: [&str; 4] = ["cube-test-writer", "until", "/stop", SEED];

/// Range of the stream that the log of container `id` has.
pub(super) fn logged(lab: &Lab, id: &str) -> (u64, u64) {
    let segments = logs::try_segments(&lab.log_dir(id), "stdout").unwrap_or_default();
    let begin = segments.first().map_or(0, |first| first.header.first_offset);
    (begin, segments.last().map_or(0, |last| last.header.first_offset + last.len))
}

pub(super) fn writes_on(lab: &Lab, id: &str) {
    let (_, before) = logged(lab, id);
    let grows = || logged(lab, id).1 > before + 100_000;
    assert!(poll(lab.limit(), grows), "{id} has written {before} bytes, and no more");
}

fn restore(lab: &Lab, snapshot: &str, id: &str) {
    let annotation = format!("cube.snapshot.restore={snapshot}");
    // What it is told to run is not what runs.
    lab.detached_with(&["--annotation", &annotation], id, &["false"]);
}

/// Ends the writer, and compares all that its log has with what it says that it has written, which it gives.
pub(super) fn end(lab: &Lab, id: &str) -> u64 {
    super::make_file(lab, id, "/stop");
    lab.wait_for_state(id, Some("STOPPED"));
    lab.delete_stopped(id, 0);
    let said = String::from_utf8(logs::read(&lab.log_dir(id), "stderr")).unwrap();
    let total = said.trim().parse().unwrap_or_else(|e| panic!("{id} says {said:?}: {e}"));
    logs::compare_segments(&lab.log_dir(id), "stdout", SEED.parse().unwrap(), total);
    total
}

/// The original runs on; clones begin where it was, two at once, each with its own time and randomness, and
/// with every byte that the original's log did not have then.
pub fn clones_go_on_with_their_streams_and_so_does_the_original(backend: Backend) {
    let pairs = soak::rounds(1, 5);
    // Nothing is rotated away.
    let log = "segment_bytes = 67108864\nsegments = 40".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    lab.detached_with(&BLOCK, "c", &WRITER);
    writes_on(&lab, "c");
    assert_eq!(lab.cubecli(&["cubebox", "snapshot", "c", "one"]).succeeds().out(), "one\n");
    let listed = lab.cubecli(&["cubebox", "snapshots"]).succeeds().out();
    assert!(listed.lines().any(|line| line.starts_with("one ")), "{listed}");
    let (mut random, mut begins, mut bytes) = (BTreeSet::new(), BTreeSet::new(), 0);
    for pair in 0..pairs {
        writes_on(&lab, "c");
        let clones = ["d", "e"].map(|name| format!("{name}{pair}"));
        thread::scope(|scope| {
            for id in &clones {
                let annotation = "cube.snapshot.restore=one";
                let flags = ["--detach", "--null-io", "--annotation", annotation];
                let mut command = lab.run_command(&flags, id, &["false"]);
                let limit = lab.limit();
                scope.spawn(move || start(&mut command).wait(limit).succeeds());
            }
        });
        random.extend(clones.each_ref().map(|id| own_randomness(&lab, id)));
        writes_on(&lab, "c");
        if pair + 1 == pairs {
            lab.cubecli(&["cubebox", "snapshots", "--rm", "one"]).succeeds();
        }
        for id in &clones {
            let (begin, _) = logged(&lab, id);
            begins.insert(begin);
            bytes += end(&lab, id) - begin;
        }
    }
    assert_eq!(random.len() as u32, 2 * pairs, "two clones drew the same: {random:?}");
    bytes += end(&lab, "c");
    assert!(begins.len() == 1 && begins.first() > Some(&0), "one snapshot, and logs begin at {begins:?}");
    lab.nothing_is_left_but_fifos();
    let name = format!("clones of one snapshot, {}", backend.name());
    soak::record(&name, "clones, two at once", 2 * pairs);
    soak::record(&name, "bytes compared", bytes);
}

/// What clone `id` draws, once it writes on. Panics unless it has the time, and runs what the original ran.
fn own_randomness(lab: &Lab, id: &str) -> String {
    writes_on(lab, id);
    let script = "date +%s; cat /proc/sys/kernel/random/uuid; cat /proc/1/cmdline";
    let seen = lab.exec(id, &["sh", "-c", script]).succeeds().out();
    let mut lines = seen.lines();
    let time: u64 = lines.next().unwrap().parse().unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(time) < 60, "{id} has the time {time}, it is {now}");
    assert!(seen.contains(WRITER[0]), "{seen}");
    lines.next().unwrap().to_owned()
}

/// Again and again, with everything in flight: what is written while the sandbox stands still waits.
pub fn snapshots_in_full_flow_cost_and_double_no_byte(backend: Backend) {
    let rounds = soak::rounds(1, 10);
    let lab = Lab::new(backend);
    let bytes = full_flow::run(&lab, &BLOCK, rounds, |round| {
        let name = format!("s{round}");
        lab.cubecli(&["cubebox", "snapshot", "c", &name]).succeeds();
        lab.cubecli(&["cubebox", "snapshots", "--rm", &name]).succeeds();
    });
    lab.nothing_is_left();
    let name = format!("snapshots in full flow, {}", backend.name());
    soak::record(&name, "snapshots", rounds);
    soak::record(&name, "bytes compared", bytes);
}

/// A name that is none, a snapshot that is not there, and a sandbox that cannot have one.
pub fn what_cannot_be_snapshotted_or_restored_says_why(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached("c", &super::WAIT);
    let refused = lab.cubecli(&["cubebox", "snapshot", "c", "one"]);
    let words: &[&str] =
        if backend == Backend::CloudHypervisor { &["cube.rootfs.mode=block"] } else { &["cloud-hypervisor"] };
    refused.fails_with(words);
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
    lab.cubecli(&["cubebox", "snapshot", "c", "../one"]).fails_with(&["\"../one\" is not valid"]);
    for (snapshot, word) in
        [("one", "no snapshot \"one\""), ("/etc", "\"/etc\" is no snapshot"), ("..", "not valid")]
    {
        let annotation = format!("cube.snapshot.restore={snapshot}");
        let flags = ["--detach", "--null-io", "--annotation", &annotation];
        start(&mut lab.run_command(&flags, "d", &["false"])).wait(lab.limit()).fails_with(&[word]);
        lab.ctr(&["container", "delete", "d"]);
    }
    lab.remove("c");
    lab.nothing_is_left();
}

/// Again and again from the same snapshot, and of a clone again.
pub fn a_clone_can_be_snapshotted_like_any_other(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached_with(&BLOCK, "c", &WRITER);
    writes_on(&lab, "c");
    lab.cubecli(&["cubebox", "snapshot", "c", "one"]).succeeds();
    end(&lab, "c");
    restore(&lab, "one", "d");
    writes_on(&lab, "d");
    lab.cubecli(&["cubebox", "snapshot", "d", "two"]).succeeds();
    end(&lab, "d");
    restore(&lab, "two", "e");
    writes_on(&lab, "e");
    end(&lab, "e");
    lab.nothing_is_left_but_fifos();
}

/// containerd's own way: its client pauses the task, has it checkpointed, packs what it finds, and resumes.
pub fn containerd_checkpoints_a_task_and_restores_it_live(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached_with(&BLOCK, "c", &WRITER);
    writes_on(&lab, "c");
    lab.ctr(&["containers", "checkpoint", "--image", "--task", "c", "localhost/warm:1"]).succeeds();
    assert_eq!(lab.task("c").unwrap().0, "RUNNING");
    writes_on(&lab, "c");
    // Named after the sandbox and the time.
    let listed = lab.cubecli(&["cubebox", "snapshots"]).succeeds().out();
    assert!(listed.lines().any(|line| line.starts_with("c-20")), "{listed}");
    // What containerd keeps of it is a few hundred bytes.
    let blobs = lab.ctr(&["content", "ls"]).succeeds().out();
    let large = blobs.lines().skip(1).filter(|line| line.contains("MB") || line.contains("GB")).count();
    assert!(large <= 1, "besides the image's own layer: {blobs}");

    lab.uses_sandbox(lab.key("d"));
    lab.ctr(&["containers", "restore", "--live", "d", "localhost/warm:1"]).succeeds();
    assert_eq!(lab.task("d").unwrap().0, "RUNNING");
    writes_on(&lab, "d");
    for id in ["c", "d"] {
        end(&lab, id);
    }
    lab.nothing_is_left_but_fifos();
}
