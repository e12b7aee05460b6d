//! What somebody else does to a running container, its log and its client, and what goes on all the same.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::symlink,
    path::Path,
    process::{ChildStdin, Stdio},
};

use crate::{
    command::{Running, poll, start},
    lab::{IMAGE, Lab},
    needs::Backend,
};

/// A container that writes what it is told to, line by line.
struct Writer<'a> {
    lab: &'a Lab,
    client: Running,
    stdin: ChildStdin,
    written: String,
}

impl Writer<'_> {
    fn new(lab: &Lab) -> Writer<'_> {
        let script = ["sh", "-c", "echo ready; cat"];
        let mut client = start(lab.run_command(&["--rm"], "c", &script).stdin(Stdio::piped()));
        client.stdout.wait_for("ready\n", lab.limit());
        let stdin = client.stdin();
        Writer { lab, client, stdin, written: "ready\n".into() }
    }

    /// Has it write `line`, and waits until its client has that.
    fn says(&mut self, line: &str) {
        self.written += &format!("{line}\n");
        writeln!(self.stdin, "{line}").unwrap();
        self.client.stdout.wait_for(&self.written, self.lab.limit());
    }

    /// Like [`says`](Writer::says), and waits until the log ends with that.
    fn logs(&mut self, line: &str) {
        self.says(line);
        let data = self.lab.log_dir("c").join("stdout");
        let wanted = format!("{line}\n");
        let has = || fs::read(&data).is_ok_and(|bytes| bytes.ends_with(wanted.as_bytes()));
        assert!(poll(self.lab.limit(), has), "{line:?} is not in the log");
    }

    fn end(self) {
        drop(self.stdin);
        assert_eq!(self.client.wait(self.lab.limit()).succeeds().out(), self.written);
    }
}

/// What `cubecli logs` prints and what it says is missing.
fn log(lab: &Lab) -> (String, String) {
    let printed = lab.cubecli(&["logs", "--all", "c"]).succeeds();
    (printed.out(), printed.err())
}

/// Removed, renamed, truncated, replaced: output goes on, in a log that says what it has lost, and to a client
/// that misses nothing.
pub fn a_log_that_somebody_takes_away_goes_on_and_says_what_is_lost(backend: Backend) {
    let lab = Lab::new(backend);
    let dir = lab.log_dir("c");
    let data = dir.join("stdout");
    let mut writer = Writer::new(&lab);
    let follower = start(&mut lab.cubecli_command(&["logs", "--follow", "--all", "c"]));
    follower.stdout.wait_for("ready\n", lab.limit());

    writer.logs("one");
    fs::remove_dir_all(&dir).unwrap();
    writer.logs("two");
    assert_eq!(log(&lab), ("two\n".into(), "[10 bytes lost]\n".into()));
    follower.stdout.wait_for("ready\none\ntwo\n", lab.limit());

    File::options().write(true).open(&data).unwrap().set_len(0).unwrap();
    writer.logs("three");
    assert_eq!(log(&lab), ("three\n".into(), "[4 bytes lost]\n".into()));

    // A name is looked at every 100 ms.
    let rotated = dir.join("stdout-20260131");
    fs::rename(&data, &rotated).unwrap();
    until_written_to(&mut writer, &data);
    assert!(fs::read_to_string(&rotated).unwrap().starts_with("three\n"));

    let victim = lab.dir().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    symlink(&victim, &dir).unwrap();
    // Refused: it waits, and goes on without a log after a while.
    writer.says("four");
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0, "the link was followed");
    fs::remove_file(&dir).unwrap();
    until_written_to(&mut writer, &data);
    assert!(log(&lab).1.contains("bytes lost"));
    let told = fs::read_to_string(lab.dir().join("containerd.log")).unwrap();
    for message in ["output waits for the log", "somebody has removed or renamed the log"] {
        assert!(told.contains(message), "containerd's log does not say {message:?}");
    }
    follower.stdout.wait_for("last\n", lab.limit());
    writer.end();
    follower.wait(lab.limit()).succeeds();
    lab.nothing_is_left();
}

/// Has the container write until that is in a new file `data`.
fn until_written_to(writer: &mut Writer<'_>, data: &Path) {
    let mut line = 0;
    let written = poll(writer.lab.limit(), || {
        line += 1;
        writer.says(&format!("line {line}"));
        data.exists()
    });
    assert!(written, "nothing is in {}", data.display());
    writer.logs("last");
}

/// `ctr run --rm` and `ctr task attach` both delete the task when it has ended: one of them is second.
pub fn two_clients_that_delete_one_task_leave_nothing_behind(backend: Backend) {
    let lab = Lab::new(backend);
    for _ in 0..4 {
        let script = "while [ ! -e /go ]; do echo tick; sleep 0.1; done; exit 3";
        let first = lab.attached("c", &["sh", "-c", script]);
        first.stdout.wait_for("tick\n", lab.limit());
        let second = start(&mut lab.ctr_command(&["task", "attach", "c"]));
        // Each tick goes to one of them.
        second.stdout.wait_for("tick\n", lab.limit());
        super::make_file(&lab, "c", "/go");
        first.wait(lab.limit()).exits_with(3);
        let second = second.wait(lab.limit());
        assert!(!second.err().contains("being deleted"), "{second}");
        assert_eq!(lab.ctr(&["container", "ls", "--quiet"]).succeeds().out(), "");
    }
    lab.nothing_is_left();
}

/// containerd does not know a task that is being created, and lets its container go.
pub fn a_task_whose_container_is_removed_while_it_boots_goes_as_well(backend: Backend) {
    let lab = Lab::new(backend);
    // What an image is unpacked to goes with its container, and then the creation may fail.
    let rootfs = lab.dir().join("rootfs");
    fs::create_dir(&rootfs).unwrap();
    let target = rootfs.to_str().unwrap();
    lab.ctr(&["image", "mount", "--rw", "--snapshotter", lab.snapshotter(), IMAGE, target]).succeeds();
    let argv = ["/bin/sh", "-c", super::WAIT[2]];
    let mut client = start(&mut lab.rootfs_command(&[], &rootfs, "c", &argv));
    let begun = || lab.bundle("c").join("address").exists();
    assert!(poll(lab.limit(), begun), "no shim");
    lab.ctr(&["container", "rm", "c"]).succeeds();
    assert!(client.is_running(), "the VM booted before its container was removed");
    client.wait(lab.limit()).fails_with(&["container", "in namespace", "not found"]);
    lab.wait_for_state("c", None);
    lab.ctr(&["image", "unmount", "--rm", "--snapshotter", lab.snapshotter(), target]).succeeds();
    fs::remove_dir(&rootfs).unwrap();
    lab.nothing_is_left();
}
