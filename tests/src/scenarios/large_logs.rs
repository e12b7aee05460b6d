//! Logs of gigabytes and of a million index records, read by `cubecli`.

use std::{
    fs::{self, File},
    io::{BufWriter, IoSlice, Write},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use cube_shim::log::{
    dir::LogDir,
    format::{Record, RecordKind, SegmentHeader},
    writer::{Limits, LogWriter},
};

use crate::{
    command::{Finished, start},
    needs::Backend,
    paths, soak,
};

/// A line is its number in so many bytes, newline included.
const LINE: u64 = 256;

/// What a program may take longer, on a busy machine, than the same one with a small log: the factor, and
/// beyond that the time.
const FACTOR: u32 = 4;
const SLACK: Duration = Duration::from_millis(100);

/// What it may take more of memory: the kernel counts a resident set in batches per CPU, and maps files
/// around what is touched of them.
const SLACK_KIB: u64 = 1 << 10;

/// A log directory, and `cubecli` to read what is in it.
struct Logs {
    temp: tempfile::TempDir,
}

/// A run of `cubecli`.
struct Run {
    stdout: Vec<u8>,
    took: Duration,
    /// Its largest resident set.
    rss_kib: u64,
}

impl Logs {
    fn new() -> Logs {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().display();
        fs::write(
            temp.path().join("config.toml"),
            format!("run_dir = '{dir}/run'\n[log]\ndir = '{dir}/log'\ntemplate_dir = '{dir}/templates'\n"),
        )
        .unwrap();
        Logs { temp }
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.temp.path().join("log/default").join(id)
    }

    /// A log of `bytes` bytes in four segments.
    fn write(&self, id: &str, bytes: u64) {
        let dir = Arc::new(LogDir::create(&self.dir(id)).unwrap());
        let limits = Limits { segment_bytes: bytes * 9 / 32, segments: 4 };
        let mut writer = LogWriter::create(dir, "stdout", limits, 0).unwrap();
        let mut at = 0;
        while at < bytes / LINE {
            let lines: Vec<u8> = (at..at + 1024).flat_map(line).collect();
            writer.append(&mut &mut [IoSlice::new(&lines)][..]).unwrap();
            at += 1024;
        }
        assert_eq!(writer.next_offset(), bytes);
    }

    /// A log with a line per index record, the records a second apart.
    fn write_records(&self, id: &str, records: u64) {
        LogDir::create(&self.dir(id)).unwrap();
        let header = SegmentHeader { number: 1, first_offset: 0, timeline: 1, epoch: 1, created_ns: 0 };
        let file = |name| BufWriter::new(File::create(self.dir(id).join(name)).unwrap());
        let (mut data, mut index) = (file("stdout"), file("stdout.idx"));
        index.write_all(&header.encode()).unwrap();
        for n in 0..records {
            data.write_all(&line(n)).unwrap();
            let (at, time_ns) = (n * LINE, n * 1_000_000_000);
            let record = Record { kind: RecordKind::Write, stream_offset: at, file_offset: at, time_ns };
            index.write_all(&record.encode()).unwrap();
        }
    }

    /// The median of five runs.
    fn median(&self, args: &[&str]) -> Run {
        let mut runs: Vec<Run> = (0..5).map(|_| self.run(args)).collect();
        runs.sort_by_key(|run| run.took);
        runs.swap_remove(2)
    }

    fn run(&self, args: &[&str]) -> Run {
        // It tells the largest resident set of its child alone: of our own children, the kernel counts
        // what this process had before their execve(2).
        let mut command = Command::new("busybox");
        command.args(["time", "-f", "%M"]).arg(paths::cubecli()).args(["cubebox", "logs"]).args(args);
        command.env("CUBE_CONFIG", self.temp.path().join("config.toml"));
        let finished = start(&mut command).wait(Duration::from_secs(120)).succeeds();
        let said: u64 = finished.err().trim().parse().unwrap_or_else(|_| panic!("{finished}"));
        let Finished { stdout, took, .. } = finished;
        // It takes ru_maxrss, which is in KiB, for pages of 4 KiB.
        Run { stdout, took, rss_kib: said / 4 }
    }
}

fn line(number: u64) -> Vec<u8> {
    format!("{number:0>width$}\n", width = LINE as usize - 1).into_bytes()
}

fn lines(numbers: std::ops::Range<u64>) -> Vec<u8> {
    numbers.flat_map(line).collect()
}

#[track_caller]
fn costs_no_more(what: &str, small: &Run, large: &Run) {
    soak::record("large logs", &format!("{what}: ms"), large.took.as_millis());
    soak::record("large logs", &format!("{what}: ms, small log"), small.took.as_millis());
    soak::record("large logs", &format!("{what}: RSS, KiB"), large.rss_kib);
    soak::record("large logs", &format!("{what}: RSS, KiB, small log"), small.rss_kib);
    let limit = small.took * FACTOR + SLACK;
    assert!(large.took <= limit, "{what}: {:?}, of a small log {:?}", large.took, small.took);
    let limit = small.rss_kib + SLACK_KIB;
    assert!(large.rss_kib <= limit, "{what}: {} KiB, of a small log {} KiB", large.rss_kib, small.rss_kib);
}

/// 4 GiB in `make soak`.
pub fn the_ends_of_a_large_log_cost_what_those_of_a_small_one_do(_: Backend) {
    let logs = Logs::new();
    let (small, large) = (4 << 20, if soak::rounds(0, 1) == 1 { 4 << 30 } else { 256 << 20 });
    logs.write("small", small);
    logs.write("large", large);
    let name = format!("of {} MiB", large >> 20);
    for flags in [
        &["--tail", "10"][..],
        &["--tail", "10", "--timestamps"],
        &["--head", "10"],
        &["--head", "10", "--timestamps"],
    ] {
        let what = format!("{} {name}", flags.join(" "));
        let run = |id| logs.median(&[flags, &[id]].concat());
        let (first, second) = (run("small"), run("large"));
        costs_no_more(&what, &first, &second);
        for (bytes, run) in [(small, first), (large, second)] {
            let count = bytes / LINE;
            let wanted = if flags[0] == "--head" { 0..10 } else { count - 10..count };
            assert!(
                run.stdout.ends_with(b"\n") && without_times(&run.stdout, flags) == lines(wanted),
                "{what}"
            );
        }
    }
    let all = logs.run(&["--all", "--timestamps", "small"]);
    assert!(without_times(&all.stdout, &["--timestamps"]) == lines(0..small / LINE), "all lines with times");
}

/// Cuts the times off, if `flags` asked for them.
fn without_times(printed: &[u8], flags: &[&str]) -> Vec<u8> {
    if !flags.contains(&"--timestamps") {
        return printed.to_vec();
    }
    let text = std::str::from_utf8(printed).unwrap();
    let cut = |line: &str| {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z') && time.len() == 30, "{line:?}");
        rest.to_owned()
    };
    text.split_inclusive('\n').map(cut).collect::<String>().into_bytes()
}

/// Nothing but its bytes tells how long a line is, so they are read; but they are not held in memory.
pub fn a_last_line_of_any_length_takes_constant_memory(_: Backend) {
    let logs = Logs::new();
    let longest = if soak::rounds(0, 1) == 1 { 256 << 20 } else { 64 << 20 };
    let mut runs = Vec::new();
    for (id, bytes) in [("short", 1_usize << 20), ("long", longest)] {
        let dir = Arc::new(LogDir::create(&logs.dir(id)).unwrap());
        let limits = Limits { segment_bytes: 16 << 20, segments: u32::MAX };
        let mut writer = LogWriter::create(dir, "stdout", limits, 0).unwrap();
        writer.append(&mut &mut [IoSlice::new(b"first\n")][..]).unwrap();
        let part = vec![b'x'; 1 << 20];
        for _ in 0..bytes >> 20 {
            writer.append(&mut &mut [IoSlice::new(&part)][..]).unwrap();
        }
        let run = logs.run(&["--tail", "1", id]);
        assert!(run.stdout.len() == bytes && run.stdout.iter().all(|byte| *byte == b'x'), "{id}");
        runs.push(run);
    }
    let (short, long) = (&runs[0], &runs[1]);
    soak::record(
        "large logs",
        &format!("--tail 1, a line of {} MiB: ms", longest >> 20),
        long.took.as_millis(),
    );
    soak::record("large logs", &format!("--tail 1, a line of {} MiB: RSS, KiB", longest >> 20), long.rss_kib);
    assert!(long.rss_kib <= short.rss_kib + SLACK_KIB, "{} KiB, {} KiB", short.rss_kib, long.rss_kib);
}

/// Found by search, not by reading all of them.
pub fn since_finds_its_line_among_a_million_index_records(_: Backend) {
    const RECORDS: u64 = 1_000_000;
    let logs = Logs::new();
    logs.write_records("small", 1_000);
    logs.write_records("large", RECORDS);
    let since = |id: &str, time: u64, flags: &[&str]| {
        logs.median(&[&["--since", &time.to_string()], flags, &[id]].concat())
    };
    let small = since("small", 990, &[]);
    assert!(small.stdout == lines(990..1_000));
    let large = since("large", RECORDS - 10, &[]);
    assert!(large.stdout == lines(RECORDS - 10..RECORDS));
    costs_no_more("--since, of a million records", &small, &large);
    for time in [0, 1, 77_777, RECORDS / 2, RECORDS - 1] {
        let found = since("large", time, &["--head", "1"]);
        assert!(found.stdout == line(time), "--since {time}: {}", String::from_utf8_lossy(&found.stdout));
        let found = since("large", time, &["--tail", "1"]);
        assert!(found.stdout == line(RECORDS - 1), "--since {time} --tail 1");
    }
    let all = logs.run(&["--since", "0", "large"]);
    assert!(all.stdout == lines(0..RECORDS));
    soak::record("large logs", "--since 0 of a million records, all printed: ms", all.took.as_millis());
    soak::record("large logs", "--since 0 of a million records, all printed: RSS, KiB", all.rss_kib);
}
