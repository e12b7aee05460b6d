//! How long a snapshot makes a sandbox stand still, and how long a restore takes, and how much of both is
//! ours: all but what the VMM needs itself.

use std::{fs, path::Path};

use containerd_shim_protos::api::Mount;
use cube_tests::{
    direct::{Direct, spec},
    lab::Lab,
    needs::Backend,
};
use serde_json::json;

use crate::{
    pipeline::timed,
    steps::{self, Step},
    table::{Samples, Table},
};

const ROUNDS: usize = 5;

/// Writes as fast as it can, and does not come to its end.
const BUSY: [&str; 4] = ["cube-test-writer", "stream", "1", "1099511627776"];

/// The steps of a snapshot, of which the sandbox sees none but the time that they take.
const SNAPSHOT: [&str; 7] = [
    "all at rest",
    "disks of the guest and logs written out",
    "VM paused",
    "memory and devices written",
    "disks copied",
    "VM resumed",
    "guest thawed",
];

/// Those of a restore, before the call that lets it run.
const RESTORE: [&str; 5] =
    ["VMM chosen", "VMM started", "agent reached", "guest asked where it is", "stdio prepared"];

/// Those that are the VMM's own.
const VMM: [&str; 4] = ["VM paused", "memory and devices written", "VM resumed", "VMM started"];

pub(crate) fn measure(table: &mut Table, backends: &[Backend]) {
    let backend = Backend::CloudHypervisor;
    if !backends.contains(&backend) {
        return table.note("no snapshot is measured: they need Cloud Hypervisor".to_owned());
    }
    let lab = Lab::new(backend);
    let image = keep_image(&lab);
    table.group("snapshot of a busy container that runs on, 256 MiB, Cloud Hypervisor");
    let mut original = begun(&lab, "c", &json!({ "cube.rootfs.mode": "block" }));
    let log = steps::read(&original.bundle);
    original.start_shim();
    original.create(overlay(&image, &original)).unwrap();
    original.start().unwrap();
    let mut whole = Samples::new();
    for round in 0..ROUNDS {
        let name = format!("s{round}");
        whole.push(timed(|| lab.cubecli(&["cubebox", "snapshot", "c", &name]).succeeds()).0 * 1e3);
    }
    end(original);
    table.add("until it has its name", "ms", whole);
    report(table, &SNAPSHOT, "stands still", &log.join().unwrap());

    table.group("restore, 256 MiB, Cloud Hypervisor");
    let [mut create, mut start, mut each] = [Samples::new(), Samples::new(), Samples::new()];
    let mut all = Vec::new();
    for round in 0..ROUNDS {
        let mut clone = begun(&lab, "d", &json!({ "cube.snapshot.restore": format!("s{round}") }));
        let log = steps::read(&clone.bundle);
        clone.start_shim();
        let rootfs = overlay(&image, &clone);
        let created = timed(|| clone.create(rootfs).unwrap()).0 * 1e3;
        let started = timed(|| clone.start().unwrap()).0 * 1e3;
        create.push(created);
        start.push(started);
        each.push(created + started);
        end(clone);
        all.extend(log.join().unwrap());
    }
    table.add("Create and Start", "ms", each);
    let vmm = all.iter().filter(|step| step.0 == "VMM started").map(|step| step.1).collect();
    table.add("Create", "ms", create.clone());
    table.add("  all but \"VMM started\"", "ms", create.without(&vmm));
    report(table, &RESTORE, "steps of it, but the check and the copies of disks", &all);
    table.add("Start", "ms", start);
}

/// The steps, and the sum of those that are not the VMM's.
fn report(table: &mut Table, names: &[&str], what: &str, steps: &[Step]) {
    let of =
        |name: &str| -> Vec<f64> { steps.iter().filter(|step| step.0 == name).map(|step| step.1).collect() };
    let [mut all, mut ours] = [vec![0.0; ROUNDS], vec![0.0; ROUNDS]];
    for name in names {
        let times = of(name);
        assert!(times.len() >= ROUNDS, "{name} was seen {} times", times.len());
        for (round, time) in times.iter().take(ROUNDS).enumerate() {
            all[round] += time;
            if !VMM.contains(name) {
                ours[round] += time;
            }
        }
    }
    table.add(what, "ms", all.into_iter().collect::<Samples>());
    for name in names {
        table.add(format!("  {name}"), "ms", of(name).into_iter().collect::<Samples>());
    }
    table.add("  all but the VMM's", "ms", ours.into_iter().collect::<Samples>());
}

fn begun<'a>(lab: &'a Lab, id: &str, annotations: &serde_json::Value) -> Direct<'a> {
    let direct = Direct::new(lab, id, &BUSY);
    let mut spec = spec(&BUSY);
    spec["annotations"] = annotations.clone();
    direct.write_spec(&spec);
    direct
}

fn end(direct: Direct<'_>) {
    direct.kill(9).unwrap();
    direct.wait().unwrap();
    direct.delete().unwrap();
    direct.finish();
}

/// The image's one layer, as a snapshotter would keep it.
fn keep_image(lab: &Lab) -> std::path::PathBuf {
    let direct = Direct::new(lab, "c", &BUSY);
    let kept = lab.dir().join("image");
    fs::rename(direct.unpack_image(), &kept).unwrap();
    direct.finish();
    kept
}

fn overlay(image: &Path, direct: &Direct<'_>) -> Vec<Mount> {
    let base = direct.bundle.with_file_name("snapshot");
    let [upper, work] = ["fs", "work"].map(|name| base.join(name));
    for dir in [&upper, &work] {
        fs::create_dir_all(dir).unwrap();
    }
    let options = vec![
        format!("lowerdir={}", image.display()),
        format!("upperdir={}", upper.display()),
        format!("workdir={}", work.display()),
    ];
    vec![Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() }]
}
