//! Thousands of rotations, as a log sees them in days.

use std::{
    fs,
    io::{PipeReader, pipe},
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    command::{poll, wait_child},
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    soak,
    verify::{compare_around_losses, compare_slowly},
};

/// The smallest segments that can be configured: 256 KiB of log.
const TINY: &str = "segment_bytes = 65536\nsegments = 4";

/// Bytes of data in such a segment, at least; the rest is its index.
const SEGMENT_DATA: u64 = 60_000;

/// Growth of memory that is no growth: what allocator and page tables may do.
const SLACK_KIB: u64 = 3 << 10;

/// What a process has of what a leak would take.
#[derive(Debug, Clone, Copy)]
struct Usage {
    rss_kib: u64,
    descriptors: u64,
    threads: u64,
}

impl Usage {
    fn of(pid: u32) -> Usage {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
        Usage { rss_kib: field("VmRSS:"), descriptors, threads: field("Threads:") }
    }

    /// The most of each of some looks.
    fn most(pid: u32, looks: u32) -> Usage {
        let mut most = Usage::of(pid);
        for _ in 1..looks {
            thread::sleep(Duration::from_millis(20));
            let Usage { rss_kib, descriptors, threads } = Usage::of(pid);
            most.rss_kib = most.rss_kib.max(rss_kib);
            most.descriptors = most.descriptors.max(descriptors);
            most.threads = most.threads.max(threads);
        }
        most
    }

    fn record(self, experiment: &str, of: &str) {
        soak::record(experiment, &format!("{of}: RSS, KiB"), self.rss_kib);
        soak::record(experiment, &format!("{of}: descriptors"), self.descriptors);
    }
}

/// A program whose output is compared while it runs.
struct Compared<T> {
    child: Child,
    seen: Arc<AtomicU64>,
    result: JoinHandle<T>,
}

impl<T: Send + 'static> Compared<T> {
    fn new(
        child: Child,
        output: PipeReader,
        compare: impl FnOnce(PipeReader, &AtomicU64) -> T + Send + 'static,
    ) -> Compared<T> {
        let seen = Arc::new(AtomicU64::new(0));
        let counter = seen.clone();
        Compared { child, seen, result: thread::spawn(move || compare(output, &counter)) }
    }

    fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    fn finish(mut self, limit: Duration) -> T {
        let status = wait_child(&mut self.child, limit).expect("it does not end");
        assert!(status.success(), "{status}");
        self.result.join().unwrap()
    }
}

/// `ctr run`, which reads all of the FIFO.
fn attached(lab: &Lab, argv: &[&str], seed: u64) -> Compared<u64> {
    let (output, end) = pipe().unwrap();
    let mut command = lab.run_command(&["--rm"], "c", argv);
    let child = command.stdout(end).stderr(Stdio::null()).spawn().unwrap();
    drop(command);
    Compared::new(child, output, move |output, seen| {
        compare_slowly(output, seed, 0, |bytes| seen.store(bytes, Ordering::Relaxed)).unwrap()
    })
}

/// `cubecli logs --follow` from the beginning of what is retained; what it says is among what it prints.
fn follower(lab: &Lab, seed: u64) -> Compared<(u64, u64)> {
    let (output, end) = pipe().unwrap();
    let mut command = lab.cubecli_command(&["logs", "--all", "--follow", "c"]);
    let child = command.stderr(end.try_clone().unwrap()).stdout(end).spawn().unwrap();
    drop(command);
    Compared::new(child, output, move |output, seen| {
        compare_around_losses(output, seed, |bytes| seen.store(bytes, Ordering::Relaxed)).unwrap()
    })
}

/// Under a writer at full speed, with a reader attached and a follower that may fall behind: both get all
/// that there is, the follower is told of the rest, and neither shim nor follower grows.
pub fn thousands_of_rotations_leave_no_trace(backend: Backend) {
    let experiment = "rotation";
    let lab = Lab::with(Setup { log: TINY.to_owned(), ..backend.into() });
    let script = "until [ -e /go ]; do sleep 0.1; done; exec cube-test-writer until /stop 11";
    let reader = attached(&lab, &["sh", "-c", script], 11);
    lab.wait_for_state("c", Some("RUNNING"));
    let follower = follower(&lab, 11);
    let fds = format!("/proc/{}/fd", follower.child.id());
    let log = lab.log_dir("c").join("stdout");
    let follows = || {
        fs::read_dir(&fds).unwrap().flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file == log))
    };
    assert!(poll(lab.limit(), follows), "the follower does not open the log");
    super::make_file(&lab, "c", "/go");
    let rotations = |n: u32| move |bytes: u64| bytes > u64::from(n) * (SEGMENT_DATA + 5536);
    let reached = |n| poll(soak::limit(Duration::from_secs(120)), || rotations(n)(reader.seen()));
    assert!(reached(200), "{} bytes read", reader.seen());
    let (shim, cubecli) = (lab.shim_pid("c").as_raw().cast_unsigned(), follower.child.id());
    let warm = [shim, cubecli].map(|pid| Usage::most(pid, 20));
    let wanted = soak::rounds(2_000, 50_000);
    assert!(reached(wanted), "{} bytes read", reader.seen());
    let hot = [shim, cubecli].map(|pid| Usage::most(pid, 20));
    for (name, warm, hot) in [("shim", warm[0], hot[0]), ("follower", warm[1], hot[1])] {
        warm.record(experiment, &format!("{name} after 200 rotations"));
        hot.record(experiment, &format!("{name} after {wanted} rotations"));
        assert!(hot.rss_kib <= warm.rss_kib + SLACK_KIB, "memory of {name}: {warm:?}, then {hot:?}");
        // A follower has what was retained at its last looks open; a leak would be thousands.
        assert!(hot.descriptors <= warm.descriptors + 16, "descriptors of {name}: {warm:?}, then {hot:?}");
        assert!(hot.threads <= warm.threads + 4, "threads of {name}: {warm:?}, then {hot:?}");
    }
    let files = || fs::read_dir(lab.log_dir("c")).unwrap().count();
    assert!(files() <= 4 * 2 + 2 + 2, "{} files in the log directory", files());

    super::make_file(&lab, "c", "/stop");
    let total = reader.finish(lab.limit());
    let (printed, lost) = follower.finish(lab.limit());
    assert_eq!(printed + lost, total, "{printed} bytes printed, {lost} said to be lost");
    logs::compare_segments(&lab.log_dir("c"), "stdout", 11, total);
    let kept = logs::segments(&lab.log_dir("c"), "stdout");
    assert!(kept.len() == 4 && kept[3].header.number > u64::from(wanted), "{kept:?}");
    soak::record(experiment, "rotations", kept[3].header.number - 1);
    soak::record(experiment, "bytes compared at the reader", total);
    soak::record(experiment, "bytes compared at the follower", printed);
    soak::record(experiment, "bytes that the follower was told it lost", lost);
    lab.nothing_is_left();
}

/// With room for all of it nothing is rotated away, and a follower gets everything, once.
pub fn a_follower_gets_each_byte_once_across_rotations(backend: Backend) {
    let log = "segment_bytes = 65536\nsegments = 100000".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    let (bytes, rounds) = (24 << 20, soak::rounds(2, 100));
    for _ in 0..rounds {
        // The first look comes before, between and after the first rotations.
        lab.detached("c", &["cube-test-writer", "stream", "12", &bytes.to_string()]);
        let follower = follower(&lab, 12);
        lab.wait_for_state("c", Some("STOPPED"));
        lab.remove("c");
        assert_eq!(follower.finish(lab.limit()), (bytes, 0), "bytes printed, and said to be lost");
        logs::compare_segments(&lab.log_dir("c"), "stdout", 12, bytes);
        fs::remove_dir_all(lab.log_dir("c")).unwrap();
    }
    soak::record("follow", "rotations followed", u64::from(rounds) * (bytes / SEGMENT_DATA));
    soak::record("follow", "bytes compared", u64::from(rounds) * bytes);
    lab.nothing_is_left();
}
