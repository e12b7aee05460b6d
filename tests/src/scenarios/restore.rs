//! Snapshots of sandboxes, and sandboxes that go on from one, under containerd.

use std::{thread, time::SystemTime};

use super::block::BLOCK;
use crate::{
    command::{poll, start},
    lab::Lab,
    logs,
    needs::Backend,
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

/// Ends the writer, and compares all that its log has with what it says that it has written.
pub(super) fn end(lab: &Lab, id: &str) {
    super::make_file(lab, id, "/stop");
    lab.wait_for_state(id, Some("STOPPED"));
    lab.delete_stopped(id, 0);
    let said = String::from_utf8(logs::read(&lab.log_dir(id), "stderr")).unwrap();
    let total = said.trim().parse().unwrap_or_else(|e| panic!("{id} says {said:?}: {e}"));
    logs::compare_segments(&lab.log_dir(id), "stdout", SEED.parse().unwrap(), total);
}

/// The original runs on; two clones begin where it was, at once, each with its own time and randomness, and
/// with every byte that the original's log did not have then.
pub fn clones_go_on_with_their_streams_and_so_does_the_original(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached_with(&BLOCK, "c", &WRITER);
    writes_on(&lab, "c");
    assert_eq!(lab.cubecli(&["cubebox", "snapshot", "c", "one"]).succeeds().out(), "one\n");
    let (_, after) = logged(&lab, "c");
    writes_on(&lab, "c");
    thread::scope(|scope| {
        for id in ["d", "e"] {
            let annotation = "cube.snapshot.restore=one";
            let flags = ["--detach", "--null-io", "--annotation", annotation];
            let mut command = lab.run_command(&flags, id, &["false"]);
            let limit = lab.limit();
            scope.spawn(move || start(&mut command).wait(limit).succeeds());
        }
    });
    let mut random = Vec::new();
    for id in ["d", "e"] {
        writes_on(&lab, id);
        let script = "date +%s; cat /proc/sys/kernel/random/uuid; echo $PPID; cat /proc/1/cmdline";
        let seen = lab.exec(id, &["sh", "-c", script]).succeeds().out();
        let mut lines = seen.lines();
        let time: u64 = lines.next().unwrap().parse().unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(time) < 60, "{id} has the time {time}, it is {now}");
        random.push(lines.next().unwrap().to_owned());
        assert!(seen.contains(WRITER[0]), "{seen}");
    }
    assert_ne!(random[0], random[1]);
    writes_on(&lab, "c");
    let listed = lab.cubecli(&["cubebox", "snapshots"]).succeeds().out();
    assert!(listed.lines().any(|line| line.starts_with("one ")), "{listed}");
    lab.cubecli(&["cubebox", "snapshots", "--rm", "one"]).succeeds();
    for id in ["d", "e"] {
        // Rotation may have taken the beginning since.
        assert!(logged(&lab, id).0 > 0, "the log of {id} begins with the original's first byte");
    }
    ["c", "d", "e"].iter().for_each(|id| end(&lab, id));
    assert!(after > 0);
    lab.nothing_is_left_but_fifos();
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
    ["c", "d"].iter().for_each(|id| end(&lab, id));
    lab.nothing_is_left_but_fifos();
}
