//! From the call of the shim's `start` to the container that runs, step by step.

use std::{collections::BTreeMap, path::Path, process::Command};

use cube_tests::{
    direct::{Direct, bind_mount},
    lab::Lab,
    needs::Backend,
};

use crate::{
    pipeline::timed,
    steps,
    table::{Samples, Table},
};

const ROUNDS: usize = 11;

pub(crate) fn measure(table: &mut Table) {
    table.group("create to started, process backend");
    let lab = Lab::new(Backend::Process);
    let [mut start_shim, mut create, mut start, mut all] = [const { Samples::new() }; 4];
    let mut each: BTreeMap<(usize, String), Samples> = BTreeMap::new();
    let mut rootfs = None;
    for _ in 0..ROUNDS {
        let mut direct = Direct::new(&lab, "c", &["sleep", "600"]);
        let rootfs = rootfs.get_or_insert_with(|| keep_image(&direct, lab.dir()));
        let log = steps::read(&direct.bundle);
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
            each.entry((place, step)).or_default().push(ms);
        }
    }
    table.add("shim start, Create and Start", "ms", all).at_most(50.0);
    table.add("shim start", "ms", start_shim);
    table.add("Create", "ms", create);
    for ((_, step), samples) in each {
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
