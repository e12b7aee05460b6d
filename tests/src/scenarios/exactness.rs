//! Not one byte lost, doubled or reordered.

use std::{process::Stdio, sync::OnceLock, thread::sleep, time::Duration};

use crate::{
    command::start,
    direct::{Direct, bind_mount},
    guest,
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    proxy::{
        Proxy,
        plan::{Plan, Target},
    },
    verify::compare_both,
};

/// Bytes per stream: a gigabyte where nothing is emulated.
fn amount(backend: Backend) -> u64 {
    if backend.is_vm() { 64 << 20 } else { 1 << 30 }
}

fn write_both(lab: &Lab, bytes: u64, slow: fn(u64)) {
    let bytes_arg = bytes.to_string();
    let argv = ["cube-test-writer", "stream", "1", &bytes_arg, "2", &bytes_arg];
    let mut direct = Direct::new(lab, "c", &argv);
    let rootfs = direct.unpack_image();
    let [out, err] = direct.read_fifos();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    assert_eq!(compare_both(out, err, slow), (bytes, bytes), "bytes at the readers");
    assert_eq!(direct.wait().unwrap(), 0);
    direct.delete().unwrap();
    direct.finish();
}

/// As fast as the process can, to both streams, in odd sizes, with room for all of it.
pub fn logs_and_readers_get_every_byte(backend: Backend) {
    let log = "segment_bytes = 67108864\nsegments = 40".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    let bytes = amount(backend);
    write_both(&lab, bytes, |_| ());
    let dir = lab.log_dir("c");
    assert_eq!(logs::compare_segments(&dir, "stdout", 1, bytes), 0);
    assert_eq!(logs::compare_segments(&dir, "stderr", 2, bytes), 0);
    lab.nothing_is_left();
}

/// What is kept under default rotation is a range of the stream up to its end, and no more than asked.
pub fn a_rotated_log_is_the_end_of_the_stream(backend: Backend) {
    let (segment_bytes, segments, bytes): (u64, usize, u64) =
        if backend.is_vm() { (1 << 20, 4, 16 << 20) } else { (16 << 20, 4, 160 << 20) };
    let log = if backend.is_vm() {
        format!("segment_bytes = {segment_bytes}\nsegments = {segments}")
    } else {
        String::new()
    };
    let lab = Lab::with(Setup { log, ..backend.into() });
    write_both(&lab, bytes, |_| ());
    for (stream, seed) in [("stdout", 1), ("stderr", 2)] {
        let dir = lab.log_dir("c");
        let first = logs::compare_segments(&dir, stream, seed, bytes);
        let kept = logs::segments(&dir, stream);
        assert_eq!(kept.len(), segments, "{kept:?}");
        assert!(kept.iter().all(|segment| segment.len <= segment_bytes), "{kept:?}");
        let least = segment_bytes * (segments as u64 - 1) * 9 / 10;
        assert!(bytes - first >= least, "only {} bytes of {stream} are kept", bytes - first);
    }
    lab.nothing_is_left();
}

/// A reader that is attached but slow loses nothing, although the log rotates meanwhile.
pub fn a_slow_reader_gets_every_byte(backend: Backend) {
    static PAUSED: OnceLock<()> = OnceLock::new();
    let log = "segment_bytes = 1048576\nsegments = 2".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    write_both(&lab, 24 << 20, |bytes| {
        if bytes > 3 << 20 {
            PAUSED.get_or_init(|| sleep(Duration::from_secs(4)));
        }
        if bytes % 7 == 0 {
            sleep(Duration::from_millis(2));
        }
    });
    lab.nothing_is_left();
}

/// containerd's own client, at a pace of its own: it closes its ends of the FIFOs as soon as it hears of
/// the exit, whatever is still on its way to it.
pub fn a_client_that_leaves_at_the_exit_has_every_byte(backend: Backend) {
    let lab = Lab::with(Setup { log: "segment_bytes = 268435456".to_owned(), ..backend.into() });
    let bytes: u64 = if backend.is_vm() { 4 << 20 } else { 32 << 20 };
    let bytes_arg = bytes.to_string();
    let argv = ["cube-test-writer", "stream", "1", &bytes_arg, "2", &bytes_arg];
    let mut command = lab.run_command(&["--rm"], "c", &argv);
    let mut client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (out, err) = (client.stdout.take().unwrap(), client.stderr.take().unwrap());
    let read = compare_both(out, err, |_| sleep(Duration::from_micros(500)));
    assert_eq!(read, (bytes, bytes), "bytes at the client");
    assert!(client.wait().unwrap().success());
    lab.nothing_is_left();
}

/// A line of 256 MiB, a million empty ones, zeros and invalid UTF-8.
pub fn bytes_that_are_no_lines_of_text_arrive_as_they_are(backend: Backend) {
    let log = "segment_bytes = 268435456\nsegments = 4".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    let long = if backend.is_vm() { 8_388_608 } else { 268_435_456 };
    for (id, hex, bytes) in [
        ("long", "61", long),
        ("empty", "0a", 1_000_000),
        ("zeros", "00", 1_000_000),
        ("invalid", "ff80c00a", 1_000_000),
    ] {
        let bytes_arg = bytes.to_string();
        lab.detached(id, &["cube-test-writer", "repeat", hex, &bytes_arg]);
        lab.wait_for_state(id, Some("STOPPED"));
        lab.remove(id);
        let pattern: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let log = logs::read(&lab.log_dir(id), "stdout");
        assert_eq!(log.len(), bytes, "{id}");
        assert!(log.chunks(pattern.len()).all(|chunk| *chunk == pattern[..chunk.len()]), "{id}");
        check_tail_and_head(&lab, id, &log);
    }
    lab.nothing_is_left();
}

fn check_tail_and_head(lab: &Lab, id: &str, log: &[u8]) {
    let tail = lab.cubecli(&["cubebox", "logs", "--tail", "3", id]).succeeds();
    let head = lab.cubecli(&["cubebox", "logs", "--head", "3", id]).succeeds();
    let lines: Vec<&[u8]> = log.split_inclusive(|byte| *byte == b'\n').collect();
    let (first, last) =
        (lines[..lines.len().min(3)].concat(), lines[lines.len().saturating_sub(3)..].concat());
    assert!(head.stdout == first, "--head 3 of {id}: {} bytes, expected {}", head.stdout.len(), first.len());
    assert!(tail.stdout == last, "--tail 3 of {id}: {} bytes, expected {}", tail.stdout.len(), last.len());
}

/// Connections between shim and guest are cut again and again, mostly inside of frames, while an
/// exec writes and another reads.
pub fn reconnects_change_nothing(backend: Backend) {
    let lab = super::lab_with_waiting_container(backend);
    let proxy = Proxy::at(&guest::socket(&lab, "c"));
    proxy.follow(Target::Streams, Plan::random(1, 700_001));
    let bytes: u64 = if backend.is_vm() { 8 << 20 } else { 64 << 20 };
    let bytes_arg = bytes.to_string();
    let argv = ["cube-test-writer", "stream", "1", &bytes_arg, "2", &bytes_arg];
    let mut exec = lab.exec_command(&[], "c", &argv);
    let mut exec = exec.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let counts = compare_both(exec.stdout.take().unwrap(), exec.stderr.take().unwrap(), |_| ());
    assert_eq!(counts, (bytes, bytes), "bytes at the readers");
    assert!(exec.wait().unwrap().success());
    let cuts = proxy.cuts();
    assert!(cuts > 10, "only {cuts} cuts of output");

    let mut input = vec![0; 4 << 20];
    cube_test_writer::fill(3, 0, &mut input);
    let argv = ["sh", "-c", "echo ready; sha256sum"];
    let mut digest = start(lab.exec_command(&[], "c", &argv).stdin(Stdio::piped()));
    digest.stdout.wait_for("ready\n", lab.limit());
    digest.feed(input);
    let found = digest.wait(lab.limit()).succeeds().out();
    let expected = lab.exec("c", &["cube-test-writer", "sha256", "3", "0", "4194304"]).succeeds().out();
    assert!(found.contains(expected.trim()), "{found} is not {expected}");
    assert!(proxy.cuts() > cuts + 3, "only {} cuts of input", proxy.cuts() - cuts);
    lab.remove("c");
    lab.nothing_is_left();
}
