//! The same commands under the same containerd, with containerd's own runtime and with ours.

use std::{
    io::Read,
    process::{Command, Stdio},
};

use cube_tests::{
    lab::{IMAGE, Lab},
    needs::{Backend, on_path},
    scenarios::WAIT,
};

use crate::{
    cost::{MIB, proportional, resident},
    pipeline::timed,
    table::{Samples, Table},
};

/// containerd's own runtime, and ours.
const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.cube.v2"];

const RUNS: usize = 11;
const EXECS: usize = 25;
const TRANSFERS: usize = 3;
const BYTES: u64 = 512 << 20;

pub(crate) fn measure(table: &mut Table) {
    table.group("beside runc under the same containerd, process backend");
    if on_path("runc").is_none() {
        return table.note("not compared with runc, which is not on PATH".into());
    }
    let lab = Lab::new(Backend::Process);
    let mut numbers = 0..;
    let mut id = || format!("c{}", numbers.next().unwrap());
    let [runc, ours] = rounds(RUNS, |runtime| {
        let mut command = run(&lab, runtime, &["--rm"], &id(), &["true"]);
        timed(|| succeeds(&mut command)).0 * 1e3
    });
    pair(table, "ctr run --rm true", "ms", runc, ours);

    for (runtime, name) in RUNTIMES.iter().zip(["runc", "cube"]) {
        succeeds(&mut run(&lab, runtime, &["--detach", "--null-io"], name, &WAIT));
    }
    let of = |runtime: &str| if runtime == RUNTIMES[0] { "runc" } else { "cube" };
    let [runc, ours] = rounds(EXECS, |runtime| {
        let mut command = lab.exec_command(&[], of(runtime), &["true"]);
        timed(|| succeeds(&mut command)).0 * 1e3
    });
    pair(table, "ctr task exec true", "ms", runc, ours);
    let [runc, ours] = RUNTIMES.map(|runtime| lab.shim_pid(of(runtime)));
    let mib = |bytes: u64| Samples::from(bytes as f64 / MIB);
    pair(table, "memory of the idle shim, RSS", "MiB", mib(resident(runc)), mib(resident(ours)));
    pair(table, "memory of the idle shim, PSS", "MiB", mib(proportional(runc)), mib(proportional(ours)));
    lab.remove("runc");
    lab.remove("cube");

    let [runc, ours] = rounds(TRANSFERS, |runtime| {
        let argv = ["cube-test-writer", "blocks", "65536", &BYTES.to_string()];
        transfer(run(&lab, runtime, &["--rm"], &id(), &argv))
    });
    pair(table, "ctr run of a writer, through FIFOs", "MiB/s", runc, ours);
}

fn pair(table: &mut Table, what: &str, unit: &'static str, runc: Samples, ours: Samples) {
    let ratio = ours.over(&runc);
    table.add(format!("{what}: runc"), unit, runc);
    table.add(format!("{what}: cubebox"), unit, ours);
    table.add(format!("{what}: cubebox over runc"), "x", ratio);
}

/// Measures each runtime `count` times, in turns.
fn rounds(count: usize, mut measure: impl FnMut(&'static str) -> f64) -> [Samples; 2] {
    let mut samples = [const { Samples::new() }; 2];
    for _ in 0..count {
        for (samples, runtime) in samples.iter_mut().zip(RUNTIMES) {
            samples.push(measure(runtime));
        }
    }
    samples
}

fn run(lab: &Lab, runtime: &str, flags: &[&str], id: &str, argv: &[&str]) -> Command {
    lab.uses_sandbox(lab.key(id));
    let mut command = lab.ctr_command(&["run", "--runtime", runtime, "--snapshotter", lab.snapshotter()]);
    command.arg("--fifo-dir").arg(lab.dir().join("fifo")).args(flags).args([IMAGE, id]).args(argv);
    command
}

/// The time that matters is the program's, so it is waited for without a poll.
fn succeeds(command: &mut Command) {
    let ended = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    assert!(ended.status.success(), "{command:?}: {ended:?}");
}

/// Reads what `command` prints, and gives the rate from the first byte on, in MiB per second.
fn transfer(mut command: Command) -> f64 {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut buffer = vec![0; 64 << 10];
    let first = output.read(&mut buffer).unwrap();
    let (seconds, rest) = timed(|| {
        let mut bytes = 0;
        loop {
            match output.read(&mut buffer).unwrap() {
                0 => return bytes,
                n => bytes += n,
            }
        }
    });
    assert!(child.wait().unwrap().success());
    // containerd 1.6 closes its ends when it hears of the exit, and may lose the last bytes.
    assert!((first + rest) as u64 > BYTES / 2, "{} of {BYTES} bytes", first + rest);
    rest as f64 / MIB / seconds
}
