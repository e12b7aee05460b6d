//! VMs that are snapshotted and made from a snapshot, by the VMM layer alone.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cube_protocol::guest::ThawRequest;
use cube_shim::vmm::{Disk, VmmError};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    disk::Disk as SmallDisk,
    machine::{Bench, LIMIT, chain, content, grows},
    needs::Backend,
};

/// Counts, and draws a random number for each count: what a clone must not share.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); \
    echo $n $(head -c 8 /dev/urandom | od -An -tx1 | tr -d ' ') $(date +%s) >> /file; sync; sleep 0.1; done";

/// A disk that was added while the VM ran is part of the snapshot like the others.
pub fn clones_of_one_snapshot_go_on_from_it_and_the_original_is_untouched(backend: Backend) {
    let bench = Bench::new(backend);
    let (data, rootfs) = (bench.empty("data-0"), bench.rootfs("rootfs-1"));
    let mut original = bench.machine("original", vec![data.clone()], None);
    let hello = original.boot();
    original.add_disk(&rootfs);
    original.run("c", &rootfs, &["sh", "-c", COUNTER]);
    grows(&rootfs, "/file", 3);

    let snapshot = bench.snapshot_dir("snapshot");
    original.quiesce();
    original.pause();
    original.snapshot(&snapshot).unwrap();
    let until_then = content(&rootfs, "/file");
    let disks = ["a", "b"]
        .map(|clone| [&data, &rootfs].map(|disk| bench.copy(disk, &format!("{clone}-{}", disk.serial))));
    original.resume();
    original.thaw(ThawRequest { realtime_ns: now(), ..Default::default() });
    let files = versions(&snapshot);
    grows(&rootfs, "/file", until_then.lines().count() + 3);

    let clone = |name, disks: &[Disk]| bench.machine(name, disks.to_vec(), Some(snapshot.clone()));
    let (mut a, mut b) = (clone("clone-a", &disks[0]), clone("clone-b", &disks[1]));
    let woken = std::thread::scope(|both| {
        let first = both.spawn(|| a.boot());
        [b.boot(), first.join().unwrap()]
    });
    for woken in woken {
        assert!(woken.quiesced, "a snapshot is of a guest at rest: {woken:?}");
        assert_eq!((woken.boot_id, woken.timeline), (hello.boot_id, hello.timeline));
    }
    for (number, clone) in [(1_u8, &a), (2, &b)] {
        clone.thaw(ThawRequest {
            realtime_ns: now(),
            entropy: vec![number; 64],
            timeline: u64::from(number),
            ..Default::default()
        });
    }
    let lines = until_then.lines().count();
    let grown = disks.each_ref().map(|[_, rootfs]| grows(rootfs, "/file", lines + 3));
    for (number, (clone, grown)) in (1_u64..).zip([&a, &b].into_iter().zip(&grown)) {
        assert_eq!(clone.hello().timeline, number);
        assert!(grown.starts_with(&until_then), "{until_then} became {grown}");
        let counts = grown.lines().map(|line| line.split(' ').next().unwrap().parse::<usize>().unwrap());
        assert!(counts.eq(1..=grown.lines().count()), "{grown}");
        let time: u64 = grown.lines().last().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
        assert!(time.abs_diff(now() / 1_000_000_000) < LIMIT.as_secs(), "{grown}");
    }
    let drawn = grown.each_ref().map(|text| text.lines().nth(lines + 2).unwrap().split(' ').nth(1).unwrap());
    assert_ne!(drawn[0], drawn[1], "both clones draw the same");

    assert_eq!(original.hello().timeline, hello.timeline);
    let lines = content(&rootfs, "/file").lines().count();
    grows(&rootfs, "/file", lines + 3);
    assert_eq!(versions(&snapshot), files, "the snapshot was written to");
}

/// When each file of the snapshot was changed last, its data or its inode, and its size. The files are
/// for root and the group of VMMs.
fn versions(dir: &Path) -> BTreeMap<String, (i64, i64, u64)> {
    let mut versions = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        let meta = entry.metadata().unwrap();
        let name = entry.file_name().into_string().unwrap();
        println!("{name}: {} bytes, {} on disk", meta.len(), meta.blocks() * 512);
        assert_eq!(meta.mode() & 0o777, if name == "vmm.json" { 0o600 } else { 0o640 }, "{name}");
        versions.insert(name, (meta.ctime(), meta.ctime_nsec(), meta.len()));
    }
    assert!(
        versions.keys().eq(["config.json", "memory-ranges", "state.json", "vmm.json"]),
        "{:?}",
        versions.keys()
    );
    versions
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

/// The full disk is told by its name; and so is a VM that was not paused.
pub fn a_snapshot_that_fails_leaves_a_vm_that_goes_on(backend: Backend) {
    let bench = Bench::new(backend);
    let mut machine = bench.machine("failing", Vec::new(), None);
    machine.boot();
    let small = bench.path("small");
    let _tmpfs = SmallDisk::tmpfs(&small, 8 << 20);
    machine.pause();
    let error = chain(&machine.snapshot(&small).unwrap_err());
    for part in [small.to_str().unwrap(), "No space left on device"] {
        assert!(error.contains(part), "{error}");
    }
    machine.resume();
    assert!(!machine.hello().quiesced);

    let error = chain(&machine.snapshot(&bench.snapshot_dir("running")).unwrap_err());
    assert!(error.contains("refused vm.snapshot"), "a VM that runs is no state to keep: {error}");
    machine.hello();
}

/// Whoever waits for the snapshot learns of the death, not of a time limit.
pub fn a_vmm_that_dies_during_a_snapshot_is_told_at_once(backend: Backend) {
    let bench = Bench::new(backend);
    let mut machine = bench.machine("dying", Vec::new(), None);
    machine.boot();
    machine.pause();
    let vmm = Pid::from_raw(machine.vmm_pid());
    // Stopped, so that it cannot be done before it dies.
    kill(vmm, Signal::SIGSTOP).unwrap();
    let begin = Instant::now();
    let result = machine.snapshot_while(&bench.snapshot_dir("snapshot"), move || {
        std::thread::sleep(Duration::from_millis(200));
        kill(vmm, Signal::SIGKILL).unwrap();
    });
    let error = result.unwrap_err();
    assert!(matches!(&error, VmmError::Ended { .. }), "{}", chain(&error));
    assert!(error.to_string().contains("signal 9"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10), "only after {:?}", begin.elapsed());
    assert!(!machine.wait().expected);
}
