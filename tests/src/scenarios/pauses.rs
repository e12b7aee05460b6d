//! Pauses at awkward moments: without end, with execs that come and go, with readers that read nothing,
//! and for a long time.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use containerd_shim_protos::api::{PauseRequest, ResumeRequest};
use ttrpc::context::{self, Context};

use crate::{
    command::poll,
    direct::{Direct, bind_mount, exec::Exec},
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    soak,
    verify::compare_both,
};

/// A stream that cannot come to rest by itself is left alone after 2 s; a pause that took this long has
/// met one.
const STUCK: Duration = Duration::from_secs(2);

fn started<'a>(lab: &'a Lab, argv: &[&str]) -> (Direct<'a>, [File; 2]) {
    let mut direct = Direct::new(lab, "c", argv);
    let rootfs = direct.unpack_image();
    let readers = direct.read_fifos();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    (direct, readers)
}

fn ended(direct: Direct<'_>, lab: &Lab, status: u32) {
    assert_eq!(direct.wait().unwrap(), status);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

fn lab_that_keeps_all(backend: Backend) -> Lab {
    let log = "segment_bytes = 67108864\nsegments = 40".to_owned();
    Lab::with(Setup { log, ..backend.into() })
}

/// Each begins as soon as the one before is over: streams are asked to rest while they are being opened.
pub fn pause_upon_pause_costs_no_byte(backend: Backend) {
    let lab = lab_that_keeps_all(backend);
    let bytes: u64 = if backend.is_vm() { 8 << 20 } else { 64 << 20 };
    let bytes_arg = bytes.to_string();
    let argv = ["cube-test-writer", "stream", "1", &bytes_arg, "2", &bytes_arg];
    let script = format!("{}; sleep 100000", argv.join(" "));
    let (direct, [out, err]) = started(&lab, &["sh", "-c", &script]);
    let rounds = if backend.is_vm() { soak::rounds(20, 500) } else { soak::rounds(200, 5000) };
    let readers = thread::spawn(move || compare_both(out, err, |_| ()));
    for _ in 0..rounds {
        direct.pause().unwrap();
        direct.resume().unwrap();
    }
    let end = |stream| {
        let segments = logs::try_segments(&lab.log_dir("c"), stream).unwrap_or_default();
        segments.last().map_or(0, |last| last.header.first_offset + last.len)
    };
    let ends = || (end("stdout"), end("stderr"));
    assert!(poll(lab.limit(), || ends() == (bytes, bytes)), "of {bytes} bytes {:?} are logged", ends());
    direct.kill(9).unwrap();
    assert_eq!(readers.join().unwrap(), (bytes, bytes), "bytes at the readers");
    for (stream, seed) in [("stdout", 1), ("stderr", 2)] {
        assert_eq!(logs::compare_segments(&lab.log_dir("c"), stream, seed, bytes), 0);
    }
    ended(direct, &lab, 137);
    soak::record(&format!("pause upon pause, {}", backend.name()), "pauses", rounds);
}

/// What a pause refuses can be repeated, and what has begun before it is not disturbed.
pub fn execs_come_and_go_between_pauses(backend: Backend) {
    let lab = Lab::new(backend);
    let (direct, _readers) = started(&lab, &["sleep", "100000"]);
    let execs = if backend.is_vm() { soak::rounds(5, 50) } else { soak::rounds(30, 500) };
    let (task, id, limit) = (direct.task().clone(), direct.id.clone(), lab.limit());
    let enough = AtomicBool::new(false);
    let pauses = thread::scope(|scope| {
        let pauser = scope.spawn(|| {
            let context = || -> Context { context::with_timeout(limit.as_nanos() as i64) };
            let mut pauses = 0;
            while !enough.load(Ordering::Relaxed) {
                task.pause(context(), &PauseRequest { id: id.clone(), ..Default::default() }).unwrap();
                task.resume(context(), &ResumeRequest { id: id.clone(), ..Default::default() }).unwrap();
                pauses += 1;
                // An exec has to get a word in.
                thread::sleep(Duration::from_millis(5));
            }
            pauses
        });
        for n in 0..execs {
            let script = format!("echo out {n}; echo err {n} >&2; exit {}", n % 100);
            let (mut exec, mut ends) = Exec::new(&direct, &format!("e{n}"), &["sh", "-c", &script]);
            until_taken(limit, || exec.create());
            until_taken(limit, || exec.start());
            assert_eq!(exec.wait().unwrap(), n % 100);
            let (mut out, mut err) = (String::new(), String::new());
            ends.stdout.read_to_string(&mut out).unwrap();
            ends.stderr.read_to_string(&mut err).unwrap();
            assert_eq!((out, err), (format!("out {n}\n"), format!("err {n}\n")));
            assert_eq!(exec.delete().unwrap(), n % 100);
        }
        enough.store(true, Ordering::Relaxed);
        pauser.join().unwrap()
    });
    direct.kill(9).unwrap();
    ended(direct, &lab, 137);
    let name = format!("execs between pauses, {}", backend.name());
    soak::record(&name, "execs", execs);
    soak::record(&name, "pauses", pauses);
}

/// Repeats a call that a paused sandbox refuses.
fn until_taken(limit: Duration, mut call: impl FnMut() -> ttrpc::Result<()>) {
    let taken = poll(limit, || match call() {
        Ok(()) => true,
        Err(ttrpc::Error::RpcStatus(status)) if status.message().contains("paus") => false,
        Err(ttrpc::Error::RpcStatus(status)) if status.message().contains("resum") => false,
        Err(error) => panic!("{error}"),
    });
    assert!(taken, "there is a pause whenever it is tried");
}

/// Neither the log, which has run ahead of its reader as far as it does, nor a stream without a log, whose
/// pipe is full, waits for a reader in order to rest.
pub fn readers_that_read_nothing_do_not_hold_a_pause_up(backend: Backend) {
    let lab = lab_that_keeps_all(backend);
    let bytes: u64 = if backend.is_vm() { 4 << 20 } else { 16 << 20 };
    let bytes_arg = bytes.to_string();
    let argv = ["cube-test-writer", "stream", "1", &bytes_arg, "2", &bytes_arg];
    // The exec would end with the container.
    let script = format!("{}; sleep 100000", argv.join(" "));
    let (direct, [out, err]) = started(&lab, &["sh", "-c", &script]);
    let (mut exec, ends) = Exec::new(&direct, "e", &argv);
    exec.create().unwrap();
    exec.start().unwrap();
    for round in 0..soak::rounds(5, 50) {
        let begun = Instant::now();
        direct.pause().unwrap();
        let took = begun.elapsed();
        assert!(took < STUCK, "pause {round} took {took:?}");
        direct.resume().unwrap();
    }
    let init = thread::spawn(move || compare_both(out, err, |_| ()));
    assert_eq!(compare_both(ends.stdout, ends.stderr, |_| ()), (bytes, bytes), "bytes of the exec");
    assert_eq!(exec.wait().unwrap(), 0);
    exec.delete().unwrap();
    drop(exec);
    let dir = lab.log_dir("c");
    let logged = |stream: &str| logs::read(&dir, stream).len() as u64;
    assert!(
        poll(lab.limit(), || logged("stdout") == bytes && logged("stderr") == bytes),
        "the log ends early"
    );
    direct.kill(9).unwrap();
    assert_eq!(init.join().unwrap(), (bytes, bytes), "bytes of the container");
    ended(direct, &lab, 137);
}

/// Longer than a kernel waits before it takes a virtual CPU for hung (20 s) or stalled (21 s), which must
/// cost nothing; and the guest's clock is set when it goes on.
pub fn after_a_long_pause_the_guest_goes_on_with_the_time_of_day(backend: Backend) {
    let pause = Duration::from_secs(if soak::rounds(0, 1) == 0 { 25 } else { 90 });
    let lab = Lab::new(backend);
    let count = "i=0; while :; do echo $i $(date +%s); i=$((i+1)); done";
    let (direct, [out, _err]) = started(&lab, &["sh", "-c", count]);
    let lines = Arc::new(Mutex::new(Vec::new()));
    let drain = thread::spawn({
        let lines = lines.clone();
        move || BufReader::new(out).lines().for_each(|line| lines.lock().unwrap().push(line.unwrap()))
    });
    let (mut copier, mut ends) = Exec::new(&direct, "copier", &["cat"]);
    copier.create().unwrap();
    copier.start().unwrap();
    let mut echo = |text: &[u8]| {
        use std::io::Write;
        ends.stdin.write_all(text).unwrap();
        let mut copied = vec![0; text.len()];
        ends.stdout.read_exact(&mut copied).unwrap();
        assert_eq!(copied, text);
    };
    echo(b"before");
    direct.pause().unwrap();
    thread::sleep(pause);
    let resumed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    direct.resume().unwrap();
    echo(b"after");
    let (mut exec, mut ends) = Exec::new(&direct, "date", &["date", "+%s"]);
    exec.create().unwrap();
    exec.start().unwrap();
    let mut date = String::new();
    ends.stdout.read_to_string(&mut date).unwrap();
    let (date, now) = (
        date.trim().parse::<u64>().unwrap(),
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs(),
    );
    assert!((resumed..=now + 1).contains(&date), "it is {date} in the guest, and {now} here");
    assert_eq!(exec.wait().unwrap(), 0);
    exec.delete().unwrap();
    let before = lines.lock().unwrap().len();
    assert!(poll(lab.limit(), || lines.lock().unwrap().len() > before + 10), "nothing is written any more");
    direct.kill(9).unwrap();
    drain.join().unwrap();
    let mut lines = std::mem::take(&mut *lines.lock().unwrap());
    // It may have been killed in the middle of it.
    lines.pop();
    let mut times = Vec::new();
    for (n, line) in lines.iter().enumerate() {
        let time = line.strip_prefix(&format!("{n} ")).unwrap_or_else(|| panic!("line {n} is {line:?}"));
        times.push(time.parse::<u64>().unwrap());
    }
    let late = times.iter().filter(|time| **time >= resumed).count();
    assert!(late >= 10 && times.is_sorted(), "only {late} lines came after the pause");
    let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(longest + 1 >= pause.as_secs(), "it ran during the pause: {longest} s");
    drop((exec, copier));
    ended(direct, &lab, 137);
}
