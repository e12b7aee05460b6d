//! From the call of the shim's `start` to the container that runs, step by step. The steps are the
//! shim's own debug lines.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    process::Command,
    thread::{self, JoinHandle},
};

use cube_tests::{
    direct::{Direct, bind_mount},
    lab::Lab,
    needs::Backend,
};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    pipeline::timed,
    table::{Samples, Table},
};

const ROUNDS: usize = 11;

/// The shim says when a step is done, and how long it took, in a line with this field.
const FIELD: &str = " took_us=";

pub(crate) fn measure(table: &mut Table) {
    table.group("create to started, process backend");
    let lab = Lab::new(Backend::Process);
    let [mut start_shim, mut create, mut start, mut all] = [const { Samples::new() }; 4];
    let mut steps: BTreeMap<(usize, String), Samples> = BTreeMap::new();
    let mut rootfs = None;
    for _ in 0..ROUNDS {
        let mut direct = Direct::new(&lab, "c", &["sleep", "600"]);
        let rootfs = rootfs.get_or_insert_with(|| keep_image(&direct, lab.dir()));
        let log = read_log(&direct.bundle.join("log"));
        let times = [
            timed(|| direct.start_shim()).0,
            timed(|| direct.create(bind_mount(rootfs.as_ref())).unwrap()).0,
            timed(|| direct.start().unwrap()).0,
        ];
        for (samples, time) in [&mut start_shim, &mut create, &mut start].into_iter().zip(times) {
            samples.push(time * 1e3);
        }
        all.push(times.iter().sum::<f64>() * 1e3);
        direct.kill(9).unwrap();
        direct.wait().unwrap();
        direct.delete().unwrap();
        direct.finish();
        for (place, (step, ms)) in log.join().unwrap().into_iter().enumerate() {
            steps.entry((place, step)).or_default().push(ms);
        }
    }
    table.add("shim start, Create and Start", "ms", all).at_most(50.0);
    table.add("shim start", "ms", start_shim);
    table.add("Create", "ms", create);
    for ((_, step), samples) in steps {
        table.add(format!("  {step}"), "ms", samples);
    }
    table.add("Start", "ms", start);
}

/// The image as a directory that outlives the bundle.
fn keep_image(direct: &Direct<'_>, dir: &Path) -> String {
    let kept = dir.join("image");
    let mut moved = Command::new("mv");
    assert!(moved.arg(direct.unpack_image()).arg(&kept).status().unwrap().success());
    kept.display().to_string()
}

/// Reads what the shim logs until it ends, and keeps the steps.
fn read_log(fifo: &Path) -> JoinHandle<Vec<(String, f64)>> {
    mkfifo(fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    // So that opening it does not wait, and there is no end before the shim's.
    let keep = File::options().read(true).write(true).open(fifo).unwrap();
    let log = BufReader::new(File::open(fifo).unwrap());
    thread::spawn(move || {
        let mut steps = Vec::new();
        for line in log.lines().map(Result::unwrap) {
            if let Some((_, us)) = line.split_once(FIELD) {
                let message = line.split_once("msg=\"").unwrap().1.split_once('"').unwrap().0;
                let us: f64 = us.split(' ').next().unwrap().parse().unwrap();
                steps.push((message.to_owned(), us / 1e3));
            }
            if line.contains("shim ends") {
                break;
            }
        }
        drop(keep);
        steps
    })
}
