//! Logs on a disk that fills and empties, hangs and breaks.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};

use crate::{
    command::{Capture, poll, start},
    disk::Disk,
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    soak,
    verify::compare,
};

/// Where the writers of these tests look for their end.
const STOP: &str = "/stop";

/// Segments of which a small disk holds several.
const SMALL_SEGMENTS: &str = "segment_bytes = 262144\nsegments = 4";

/// A single segment, of which nothing is ever rotated away.
const ONE_SEGMENT: &str = "segment_bytes = 1099511627776\nsegments = 2";

/// Longest time for Delete of a container whose output cannot be written: 4 s for the output, what the
/// guest takes to end, and as much again for a busy machine.
const DELETE_LIMIT: Duration = Duration::from_secs(15);

/// A lab whose logs are on a disk of their own.
fn lab_on(log: &str, backend: Backend, disk: impl FnOnce(&Path) -> Disk) -> (Lab, Disk) {
    let lab = Lab::with(Setup { log: log.to_owned(), ..backend.into() });
    let disk = disk(&lab.dir().join("log"));
    lab.disown_what_exists();
    (lab, disk)
}

/// A container that writes a stream as fast as it can.
struct Writer<'lab> {
    lab: &'lab Lab,
    id: &'static str,
    seed: u64,
    argv: Vec<String>,
}

impl<'lab> Writer<'lab> {
    /// One that is told to stop, or whose length is known. Not started yet.
    fn new(lab: &'lab Lab, id: &'static str, bytes: Option<u64>) -> Writer<'lab> {
        // Its process is found by the seed, and other tests run on the same host.
        static SEEDS: AtomicU64 = AtomicU64::new(0);
        let seed = (u64::from(std::process::id()) << 16) | SEEDS.fetch_add(1, Ordering::Relaxed);
        let argv = match bytes {
            Some(bytes) => ["stream".to_owned(), seed.to_string(), bytes.to_string()],
            None => ["until".to_owned(), STOP.to_owned(), seed.to_string()],
        };
        let argv = ["cube-test-writer".to_owned()].into_iter().chain(argv).collect();
        Writer { lab, id, seed, argv }
    }

    /// One that is told to stop, with its output in the log alone.
    fn detached(lab: &'lab Lab, id: &'static str, flags: &[&str]) -> Writer<'lab> {
        let writer = Writer::new(lab, id, None);
        start(&mut writer.command(&[&["--detach", "--null-io"], flags].concat()))
            .wait(lab.limit())
            .succeeds();
        writer
    }

    /// `ctr run` with `flags`.
    fn command(&self, flags: &[&str]) -> Command {
        let argv: Vec<&str> = self.argv.iter().map(String::as_str).collect();
        self.lab.run_command(flags, self.id, &argv)
    }

    /// Bytes that it has written so far.
    fn written(&self) -> u64 {
        let line: String = self.argv.iter().map(|word| format!("{word}\0")).collect();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            if fs::read(process.path().join("cmdline")).is_ok_and(|found| found == line.as_bytes()) {
                let io = fs::read_to_string(process.path().join("io")).unwrap_or_default();
                let count = io.lines().find_map(|line| line.strip_prefix("wchar: "));
                return count.map_or(0, |count| count.parse().unwrap());
            }
        }
        0
    }

    /// Whether it has been in the same write(2) for a while, which takes microseconds otherwise.
    fn is_stuck(&self) -> bool {
        let before = self.written();
        thread::sleep(Duration::from_millis(300));
        before > 0 && self.written() == before
    }

    fn tell_to_stop(&self) {
        super::make_file(self.lab, self.id, STOP);
    }

    fn state(&self) -> Option<String> {
        self.lab.task(self.id).map(|(state, _)| state)
    }

    /// What it has said of the length of its stream.
    fn total(&self) -> u64 {
        let said = logs::read(&self.lab.log_dir(self.id), "stderr");
        String::from_utf8(said).unwrap().trim().parse().unwrap()
    }

    /// Compares what the log holds, which ends anywhere. Gives that end.
    fn compare_prefix(&self) -> u64 {
        let dir = self.lab.log_dir(self.id);
        let last = logs::segments(&dir, "stdout").pop().unwrap();
        let end = last.header.first_offset + last.len;
        logs::compare_segments(&dir, "stdout", self.seed, end);
        end
    }
}

/// How often shims of `lab` have said that a log waits, and that it goes on.
fn told(lab: &Lab) -> (usize, usize) {
    let text = fs::read_to_string(lab.dir().join("containerd.log")).unwrap();
    (text.matches("output waits for the log").count(), text.matches("the log is being written again").count())
}

fn log_waits(lab: &Lab) -> bool {
    let (waits, goes_on) = told(lab);
    waits > goes_on
}

/// Takes all room, again and again: the log makes room for itself as long as it can.
fn fill_until_the_log_waits(lab: &Lab, disk: &Disk) {
    let waits = poll(lab.limit(), || {
        disk.fill();
        log_waits(lab)
    });
    assert!(waits, "the log finds room on a full disk");
}

fn empty_until_the_log_goes_on(lab: &Lab, disk: &Disk) {
    disk.empty();
    assert!(poll(lab.limit(), || !log_waits(lab)), "the log does not go on when there is room");
}

/// The container's output waits in its pipe while calls are answered. Each time the disk is full is told
/// once. What is retained in the end is exact, up to the last byte.
pub fn a_full_disk_makes_the_writer_wait_and_costs_no_byte(backend: Backend) {
    let (lab, disk) = lab_on(SMALL_SEGMENTS, backend, |point| Disk::tmpfs(point, 4 << 20));
    let writer = Writer::detached(&lab, "c", &[]);
    let rounds = soak::rounds(3, 200);
    for _ in 0..rounds {
        fill_until_the_log_waits(&lab, &disk);
        empty_until_the_log_goes_on(&lab, &disk);
    }
    fill_until_the_log_waits(&lab, &disk);
    assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the log");
    writer.tell_to_stop();
    assert!(writer.is_stuck(), "the writer goes on without room for its output");
    assert_eq!(writer.state().as_deref(), Some("RUNNING"));

    disk.empty();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    assert_eq!(told(&lab), (rounds as usize + 1, rounds as usize + 1), "told once, each way");
    let total = writer.total();
    let first = logs::compare_segments(&lab.log_dir("c"), "stdout", writer.seed, total);
    soak::record("full disk, block", "times full", rounds + 1);
    soak::record("full disk, block", "bytes written", total);
    soak::record("full disk, block", "bytes retained and compared", total - first);
    disk.unmount();
    lab.nothing_is_left();
}

/// The log gives up old segments when the disk is full, but none that the reader has yet to read.
pub fn a_full_disk_costs_an_attached_reader_no_byte(backend: Backend) {
    let (lab, disk) = lab_on(SMALL_SEGMENTS, backend, |point| Disk::tmpfs(point, 4 << 20));
    let writer = Writer::new(&lab, "c", None);
    let seed = writer.seed;
    let mut client = writer.command(&["--rm"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (out, err) = (client.stdout.take().unwrap(), client.stderr.take().unwrap());
    let reader = thread::spawn(move || compare(out, seed, 0).unwrap());
    let said = Capture::of(err);
    assert!(poll(lab.limit(), || writer.written() > 0), "the writer does not begin: {}", said.text());
    for _ in 0..soak::rounds(3, 200) {
        fill_until_the_log_waits(&lab, &disk);
        empty_until_the_log_goes_on(&lab, &disk);
    }
    writer.tell_to_stop();
    said.wait_until("length of the stream", lab.limit(), |bytes| bytes.ends_with(b"\n"));
    let total: u64 = said.text().trim().parse().unwrap();
    assert_eq!(reader.join().unwrap(), total, "bytes at the reader");
    assert!(client.wait().unwrap().success());
    logs::compare_segments(&lab.log_dir("c"), "stdout", seed, total);
    soak::record("full disk, attached reader", "bytes read and compared", total);
    disk.unmount();
    lab.nothing_is_left();
}

/// `drop-oldest`: the writer never stands still, and what is in the log and what the log says is missing
/// are together what was written.
pub fn a_full_disk_does_not_stall_a_writer_whose_oldest_output_is_dropped(backend: Backend) {
    let (lab, disk) = lab_on(ONE_SEGMENT, backend, |point| Disk::tmpfs(point, 512 << 20));
    let writer = Writer::detached(&lab, "c", &["--annotation", "cube.container.log_mode=drop-oldest"]);
    let (mut most, enough) = (0, 64 << 20);
    // Each round leaves the log less room to grow.
    for _ in 0..soak::rounds(2, 10) {
        fill_until_the_log_waits(&lab, &disk);
        let (before, since) = (writer.written(), Instant::now());
        assert!(poll(lab.limit(), || writer.written() > before + enough), "the writer waits for the log");
        let mib = (writer.written() - before) >> 20;
        most = most.max(mib * 1000 / since.elapsed().as_millis() as u64);
        assert!(log_waits(&lab), "there was room for a moment");
        empty_until_the_log_goes_on(&lab, &disk);
    }
    fill_until_the_log_waits(&lab, &disk);
    writer.tell_to_stop();
    lab.wait_for_state("c", Some("STOPPED"));
    assert!(log_waits(&lab), "there was room for a moment");
    empty_until_the_log_goes_on(&lab, &disk);
    lab.remove("c");
    let (total, account) = (writer.total(), logs::account(&lab.log_dir("c"), "stdout", writer.seed));
    assert_eq!(account.kept + account.lost, total, "{account:?} of {total} bytes");
    assert!(account.lost > enough, "{account:?} of {total} bytes");
    soak::record("full disk, drop-oldest", "bytes written", total);
    soak::record("full disk, drop-oldest", "bytes kept and compared", account.kept);
    soak::record("full disk, drop-oldest", "bytes counted as lost", account.lost);
    soak::record("full disk, drop-oldest", "writer while it is full, MiB/s", most);
    disk.unmount();
    lab.nothing_is_left();
}

/// Delete gives up in its time what the disk does not take, and says how much. A container cannot be
/// created without its log, and the error says why.
pub fn a_full_disk_keeps_no_container_from_being_deleted(backend: Backend) {
    let (lab, disk) = lab_on(SMALL_SEGMENTS, backend, |point| Disk::tmpfs(point, 4 << 20));
    let writer = Writer::detached(&lab, "c", &[]);
    fill_until_the_log_waits(&lab, &disk);
    assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the log");
    delete_in_time(&lab, "full disk");
    let text = fs::read_to_string(lab.dir().join("containerd.log")).unwrap();
    let discarded = text.split(" bytes of output were discarded").next().and_then(|told| {
        let digits = told.rsplit(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse::<u64>().ok()
    });
    let discarded = discarded.expect("it is told what was discarded");
    assert!(discarded > 0);
    assert!(writer.compare_prefix() + discarded > 0);
    lab.nothing_is_left();

    let flags = ["--detach", "--null-io"];
    let refused = start(&mut lab.run_command(&flags, "d", &["true"])).wait(lab.limit());
    refused.fails_with(&["log", "no space left on device"]);
    lab.ctr(&["container", "delete", "d"]);
    lab.nothing_is_left();
    disk.empty();
    lab.run("c", &["true"]).succeeds();
    disk.unmount();
    lab.nothing_is_left();
}

fn delete_in_time(lab: &Lab, experiment: &str) {
    let since = Instant::now();
    lab.remove("c");
    assert!(since.elapsed() < DELETE_LIMIT, "Delete took {:?}", since.elapsed());
    soak::record(experiment, "Delete, ms", since.elapsed().as_millis());
}

/// Nobody is there to say what was discarded, but what the log has is exact.
pub fn a_shim_that_dies_on_a_full_disk_leaves_an_exact_prefix(backend: Backend) {
    let (lab, disk) = lab_on(SMALL_SEGMENTS, backend, |point| Disk::tmpfs(point, 4 << 20));
    for round in 0..soak::rounds(1, 20) {
        let writer = Writer::detached(&lab, "c", &[]);
        fill_until_the_log_waits(&lab, &disk);
        let before = writer.compare_prefix();
        kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
        let gone = || writer.state().is_none_or(|state| state == "STOPPED");
        assert!(poll(lab.limit(), gone), "the task lives on");
        lab.ctr(&["task", "delete", "--force", "c"]);
        lab.ctr(&["container", "delete", "c"]).succeeds();
        assert!(writer.compare_prefix() >= before, "round {round}: the log lost what was acknowledged");
        // A dead shim never says that its log goes on.
        fs::write(lab.dir().join("containerd.log"), "").unwrap();
        disk.empty();
        // Kept, the logs of some rounds would fill the disk.
        fs::remove_dir_all(lab.log_dir("c")).unwrap();
        // containerd says that there is no such task, and goes on to clean up: only a new one shows the end.
        let forgotten = || {
            let flags = ["--null-io", "--annotation", "cube.container.log_forwarding=false"];
            let ran = start(&mut lab.run_command(&flags, "c", &["true"])).wait(lab.limit());
            lab.ctr(&["container", "delete", "c"]);
            ran.status.success()
        };
        assert!(poll(lab.limit(), forgotten), "containerd does not forget the task");
    }
    disk.unmount();
    lab.nothing_is_left();
}

/// A disk that takes for ever: its log's thread hangs in the kernel, where no signal reaches it.
pub fn a_disk_that_hangs_holds_up_no_call(backend: Backend) {
    let (lab, disk) = lab_on(SMALL_SEGMENTS, backend, |point| Disk::ext4(point, 64 << 20));
    let writer = Writer::detached(&lab, "c", &[]);
    for _ in 0..soak::rounds(1, 20) {
        disk.freeze();
        assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the log");
        assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
        disk.thaw();
        assert!(poll(lab.limit(), || !writer.is_stuck()), "the writer does not go on");
    }
    disk.freeze();
    assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the log");
    delete_in_time(&lab, "hung disk");
    disk.thaw();
    lab.nothing_is_left();
    writer.compare_prefix();
    disk.unmount();
    lab.nothing_is_left();
}

/// What ext4 does after an I/O error: everything is read-only from then on.
pub fn a_disk_that_breaks_makes_the_writer_wait_and_delete_succeed(backend: Backend) {
    let (lab, disk) = lab_on(SMALL_SEGMENTS, backend, |point| Disk::ext4(point, 64 << 20));
    let writer = Writer::detached(&lab, "c", &[]);
    disk.break_down();
    assert!(poll(lab.limit(), || log_waits(&lab)), "nothing is said of the broken disk");
    assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the log");
    assert_eq!(writer.state().as_deref(), Some("RUNNING"));
    delete_in_time(&lab, "broken disk");
    disk.unmount();
    lab.nothing_is_left();
}

/// RLIMIT_FSIZE, which ends a process that does not expect it.
pub fn a_file_size_limit_makes_the_writer_wait_and_costs_no_byte(backend: Backend) {
    let lab = Lab::with(Setup { log: SMALL_SEGMENTS.to_owned(), ..backend.into() });
    let writer = Writer::detached(&lab, "c", &[]);
    let shim = lab.shim_pid("c").to_string();
    // The soft limit: not everybody may raise the hard one again.
    let limit = |bytes: &str| {
        let mut prlimit = Command::new("prlimit");
        start(prlimit.args(["--pid", &shim, &format!("--fsize={bytes}:")])).wait(lab.limit()).succeeds();
    };
    limit("100000");
    assert!(poll(lab.limit(), || log_waits(&lab)), "nothing is said of the limit");
    assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the log");
    assert_eq!(writer.state().as_deref(), Some("RUNNING"));
    limit("unlimited");
    assert!(poll(lab.limit(), || !log_waits(&lab)), "the log does not go on");
    writer.tell_to_stop();
    lab.wait_for_state("c", Some("STOPPED"));
    lab.remove("c");
    logs::compare_segments(&lab.log_dir("c"), "stdout", writer.seed, writer.total());
    lab.nothing_is_left();
}

/// `file://` without a log: the file is the only sink, and gets every byte once there is room.
pub fn a_full_disk_under_a_file_uri_costs_no_byte(backend: Backend) {
    let lab = Lab::new(backend);
    let disk = Disk::tmpfs(&lab.dir().join("files"), 64 << 20);
    lab.disown_what_exists();
    let (file, bytes) = (lab.dir().join("files/out"), 32 << 20);
    let uri = format!("file://{}", file.display());
    let flags = ["--detach", "--log-uri", &uri, "--annotation", "cube.container.log_forwarding=false"];
    for _ in 0..soak::rounds(1, 20) {
        disk.fill();
        let writer = Writer::new(&lab, "c", Some(bytes));
        start(&mut writer.command(&flags)).wait(lab.limit()).succeeds();
        assert!(poll(lab.limit(), || writer.is_stuck()), "the writer does not wait for the file");
        assert_eq!(writer.state().as_deref(), Some("RUNNING"));
        disk.empty();
        lab.wait_for_state("c", Some("STOPPED"));
        lab.remove("c");
        assert_eq!(compare(fs::File::open(&file).unwrap(), writer.seed, 0).unwrap(), bytes);
        fs::remove_file(&file).unwrap();
    }
    soak::record("full disk, file://", "bytes compared", bytes * u64::from(soak::rounds(1, 20)));
    disk.unmount();
    lab.nothing_is_left();
}
