//! `cubecli cubebox rollback`: a sandbox goes back to a snapshot of its own.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::Instant,
};

use serde_json::Value;

use super::block::BLOCK;
use crate::{
    command::{poll, start},
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    soak,
    verify::compare,
};

const SEED: u64 = 5;

/// Writes without end until it is told to stop, and then says how much that was.
const WRITER: [&str; 4] = ["cube-test-writer", "until", "/stop", "5"];

fn cubebox(lab: &Lab, words: &[&str]) {
    lab.cubecli(&[&["cubebox"], words].concat()).succeeds();
}

fn logged(lab: &Lab, id: &str) -> (u32, u64) {
    let segments = logs::try_segments(&lab.log_dir(id), "stdout").unwrap_or_default();
    segments
        .last()
        .map_or((0, 0), |last| (last.header.number.try_into().unwrap(), last.header.first_offset + last.len))
}

/// Gives the end of its log.
fn writes_on(lab: &Lab, id: &str) -> u64 {
    let before = logged(lab, id);
    let grows = || {
        let now = logged(lab, id);
        // A rotation or a rollback would make a lower one look like none.
        now.0 == before.0 && now.1 > before.1 + 100_000 || now.0 > before.0
    };
    assert!(poll(lab.limit(), grows), "{id} has written {before:?}, and no more");
    logged(lab, id).1
}

/// The offset of `stream` of the container in the snapshot below which its log had everything.
fn acknowledged(snapshot: &Path, stream: &str) -> u64 {
    let manifest: Value = serde_json::from_slice(&fs::read(snapshot.join("manifest.json")).unwrap()).unwrap();
    let streams = manifest["streams"].as_array().unwrap();
    let found = streams.iter().find(|known| known["stream"] == stream && known["exec"] == "");
    found.unwrap()["acknowledged"].as_u64().unwrap()
}

/// `cat` in the container `c`.
struct Echo {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
}

impl Echo {
    fn start(lab: &Lab) -> Echo {
        let mut command = lab.exec_command(&[], "c", &["cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Echo { child, stdin, stdout }
    }

    fn says(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).unwrap();
        let mut said = vec![0; text.len()];
        self.stdout.read_exact(&mut said).unwrap();
        assert_eq!(String::from_utf8(said).unwrap(), text);
    }

    fn end(mut self) {
        drop(self.stdin);
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
        assert!(self.child.wait().unwrap().success());
    }
}

/// Compares every byte that is retained of a log, timeline by timeline: the first begins with 0, each other
/// with `begin`, unless that was rotated away. Gives the end of each, and how many bytes were compared.
fn compare_timelines(dir: &Path, begin: u64) -> (Vec<u64>, u64) {
    let (mut ends, mut compared) = (Vec::<u64>::new(), 0);
    let mut last = None;
    for segment in logs::segments(dir, "stdout") {
        if last != Some(segment.header.timeline) {
            let from = match (last, segment.header.number) {
                (None, 1) => 0,
                (None, _) => segment.header.first_offset,
                (Some(_), _) => begin,
            };
            assert_eq!(segment.header.first_offset, from, "{segment:?} begins a timeline");
            ends.push(from);
            last = Some(segment.header.timeline);
        }
        let end = ends.last_mut().unwrap();
        assert_eq!(segment.header.first_offset, *end, "{segment:?} does not follow the one before");
        let file = File::open(&segment.path).unwrap();
        let bytes = compare(file, SEED, *end).unwrap_or_else(|e| panic!("{}: {e}", segment.path.display()));
        (*end, compared) = (*end + bytes, compared + bytes);
    }
    (ends, compared)
}

/// Memory, processes and disk are what they were; what was logged stays, and the log goes on where the
/// snapshot's was.
pub fn a_rollback_in_full_flow_keeps_the_old_log_and_goes_on_exactly(backend: Backend) {
    let rounds = soak::rounds(1, 5);
    let log = "segment_bytes = 67108864\nsegments = 40".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    lab.detached_with(&BLOCK, "c", &WRITER);
    writes_on(&lab, "c");
    lab.exec("c", &["sh", "-c", "echo then > /disk"]).succeeds();
    let mut echo = Echo::start(&lab);
    echo.says("before\n");
    cubebox(&lab, &["snapshot", "c", "one"]);
    let begin = acknowledged(&lab.dir().join("snapshots/one"), "stdout");
    let mut reached = Vec::new();
    for round in 0..rounds {
        reached.push(writes_on(&lab, "c"));
        lab.exec("c", &["sh", "-c", "echo now > /disk; sync"]).succeeds();
        echo.says(&format!("round {round}\n"));
        let mut late = start(&mut lab.exec_command(&[], "c", &["sh", "-c", "echo late; sleep 100000"]));
        late.stdout.wait_for("late", lab.limit());
        assert!(late.is_running());
        if round % 2 == 1 {
            cubebox(&lab, &["pause", "c"]);
        }
        let pid = lab.task("c").unwrap().1;
        let begun = Instant::now();
        cubebox(&lab, &["rollback", "c", "one"]);
        let took = begun.elapsed();
        println!("round {round}: {took:?}");
        soak::record("rollback, cloud-hypervisor", "ms", took.as_millis());
        late.wait(lab.limit()).exits_with(137);
        let (state, other) = lab.task("c").unwrap();
        assert!(state == "RUNNING" && other != pid, "{state} with pid {other}, and {pid} before");
        assert_eq!(lab.exec("c", &["cat", "/disk"]).succeeds().out(), "then\n");
        echo.says(&format!("and on {round}\n"));
        writes_on(&lab, "c");
    }
    echo.end();
    super::make_file(&lab, "c", "/stop");
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 0);
    let said = String::from_utf8(logs::read(&lab.log_dir("c"), "stderr")).unwrap();
    let total: u64 = said.trim().parse().unwrap_or_else(|e| panic!("it says {said:?}: {e}"));
    let (ends, compared) = compare_timelines(&lab.log_dir("c"), begin);
    assert_eq!(*ends.last().unwrap(), total, "{ends:?}");
    assert!(ends.len() > 1, "nothing is left of the time before a rollback");
    // Each but the last, from the end: the first may have been rotated away.
    for (end, reached) in ends.iter().rev().skip(1).zip(reached.iter().rev()) {
        assert!(end >= reached, "{ends:?} do not have all of {reached:?}, which was logged");
    }
    println!("from {begin}, timelines end at {ends:?}");
    soak::record("rollback, cloud-hypervisor", "rollbacks", rounds);
    soak::record("rollback, cloud-hypervisor", "bytes compared", compared);
    lab.nothing_is_left_but_fifos();
}

/// A clone is its origin's continuation, up to where it was made; nothing else is.
pub fn a_clone_goes_back_to_its_origin_and_nobody_to_a_stranger(backend: Backend) {
    let lab = Lab::new(backend);
    lab.detached_with(&BLOCK, "c", &super::WAIT);
    lab.exec("c", &["sh", "-c", "echo origin > /disk"]).succeeds();
    cubebox(&lab, &["snapshot", "c", "one"]);
    lab.detached_with(&["--annotation", "cube.snapshot.restore=one"], "d", &["false"]);
    lab.exec("d", &["sh", "-c", "echo clone > /disk"]).succeeds();
    cubebox(&lab, &["snapshot", "d", "two"]);
    lab.cubecli(&["cubebox", "rollback", "c", "two"]).fails_with(&["of another sandbox", "restore=two"]);
    lab.cubecli(&["cubebox", "rollback", "c", "three"]).fails_with(&["no snapshot \"three\""]);
    assert_eq!(lab.exec("c", &["cat", "/disk"]).succeeds().out(), "origin\n");
    cubebox(&lab, &["rollback", "d", "one"]);
    assert_eq!(lab.exec("d", &["cat", "/disk"]).succeeds().out(), "origin\n");
    cubebox(&lab, &["rollback", "d", "two"]);
    assert_eq!(lab.exec("d", &["cat", "/disk"]).succeeds().out(), "clone\n");
    for id in ["c", "d"] {
        lab.remove(id);
    }
    lab.nothing_is_left();
}
