//! `cubecli cubebox pause`, with and without `--to-disk`, and `cubecli cubebox resume`.

use std::{
    fs,
    time::{Duration, Instant},
};

use super::{WAIT, block::BLOCK, full_flow};
use crate::{disk::Disk, lab::Lab, leftovers, needs::Backend, soak};

fn cubebox(lab: &Lab, words: &[&str]) {
    lab.cubecli(&[&["cubebox"], words].concat()).succeeds();
}

fn state(lab: &Lab) -> String {
    lab.task("c").expect("there is no task").0
}

/// The word that `cubecli` has for it.
fn listed(lab: &Lab) -> String {
    let list = lab.cubecli(&["cubebox", "ls"]).succeeds().out();
    let line = list.lines().find(|line| line.starts_with(lab.namespace())).expect("it is not listed");
    line.split_whitespace().nth(3).unwrap().to_owned()
}

fn vm_processes(lab: &Lab) -> usize {
    let pids = fs::read_to_string(leftovers::cgroup(&lab.key("c")).join("vm/helpers/cgroup.procs"));
    pids.unwrap().lines().count()
}

/// What is in the store, the hidden things included.
fn stored(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(lab.dir().join("snapshots")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn lab_with_block_container(backend: Backend) -> Lab {
    let lab = Lab::new(backend);
    lab.detached_with(&BLOCK, "c", &WAIT);
    lab
}

/// containerd's view is the same as after its own pause, and either resumes what the other has paused.
pub fn cubecli_pauses_and_resumes_like_containerd(backend: Backend) {
    let lab = super::lab_with_waiting_container(backend);
    cubebox(&lab, &["pause", "c"]);
    assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("PAUSED", "paused"));
    lab.exec("c", &["true"]).fails_with(&["paused"]);
    lab.cubecli(&["cubebox", "pause", "c"]).fails_with(&["paused"]);
    lab.ctr(&["task", "resume", "c"]).succeeds();
    lab.exec("c", &["true"]).succeeds();
    lab.ctr(&["task", "pause", "c"]).succeeds();
    cubebox(&lab, &["resume", "c"]);
    assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("RUNNING", "running"));
    lab.exec("c", &["true"]).succeeds();
    lab.cubecli(&["cubebox", "resume", "c"]).fails_with(&["running"]);
    lab.remove("c");
    lab.nothing_is_left();
}

/// It says which backend can, or which annotation it takes; and the sandbox goes on.
pub fn what_cannot_be_paused_to_disk_says_why_and_runs_on(backend: Backend) {
    let lab = super::lab_with_waiting_container(backend);
    let word =
        if backend == Backend::CloudHypervisor { "cube.rootfs.mode=block" } else { "cloud-hypervisor" };
    lab.cubecli(&["cubebox", "pause", "--to-disk", "c"]).fails_with(&[word]);
    assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("RUNNING", "running"));
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
    cubebox(&lab, &["pause", "c"]);
    lab.cubecli(&["cubebox", "pause", "--to-disk", "c"]).fails_with(&[word]);
    assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("PAUSED", "paused"));
    cubebox(&lab, &["resume", "c"]);
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
    assert!(stored(&lab).is_empty());
    lab.remove("c");
    lab.nothing_is_left();
}

/// From running and from paused, by cubecli and by containerd; the VM is gone meanwhile.
pub fn a_sandbox_on_disk_in_full_flow_loses_and_doubles_no_byte(backend: Backend) {
    let lab = Lab::new(backend);
    let rounds = soak::rounds(2, 20);
    let compared = full_flow::run(&lab, &BLOCK, rounds, |round| {
        let by_containerd = round % 2 == 1;
        if by_containerd {
            lab.ctr(&["task", "pause", "c"]).succeeds();
        }
        let pid = lab.task("c").unwrap().1;
        let begun = Instant::now();
        cubebox(&lab, &["pause", "--to-disk", "c"]);
        let to_disk = begun.elapsed();
        assert_eq!(vm_processes(&lab), 0, "a VM lives");
        assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("PAUSED", "suspended"));
        assert_eq!(lab.task("c").unwrap().1, pid, "the pid stays");
        lab.cubecli(&["cubebox", "snapshot", "c", "one"]).fails_with(&["paused to disk", "resumed"]);
        assert_eq!(stored(&lab), [format!(".suspended-{}", lab.key("c"))]);
        let begun = Instant::now();
        if by_containerd {
            lab.ctr(&["task", "resume", "c"]).succeeds();
        } else {
            cubebox(&lab, &["resume", "c"]);
        }
        let from_disk = begun.elapsed();
        assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("RUNNING", "running"));
        assert!(stored(&lab).is_empty(), "{:?}", stored(&lab));
        println!("round {round}: to disk in {to_disk:?}, from disk in {from_disk:?}");
        let experiment = format!("to disk and back, {}", backend.name());
        soak::record(&experiment, "to disk, ms", to_disk.as_millis());
        soak::record(&experiment, "from disk, ms", from_disk.as_millis());
    });
    lab.nothing_is_left();
    let experiment = format!("to disk and back, {}", backend.name());
    soak::record(&experiment, "rounds", rounds);
    soak::record(&experiment, "bytes compared", compared);
}

/// SIGKILL does not wait for a resume; nor does it take one to delete.
pub fn a_sandbox_on_disk_can_be_killed_and_deleted(backend: Backend) {
    let lab = lab_with_block_container(backend);
    cubebox(&lab, &["pause", "--to-disk", "c"]);
    let begun = Instant::now();
    lab.ctr(&["task", "kill", "--signal", "SIGKILL", "c"]).succeeds();
    lab.wait_for_state("c", Some("STOPPED"));
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
    lab.delete_stopped("c", 137);
    lab.nothing_is_left();
}

/// containerd runs `shim delete` then, which knows of the memory on disk from the state file.
pub fn a_shim_that_is_killed_while_its_sandbox_is_on_disk_leaves_nothing(backend: Backend) {
    let lab = lab_with_block_container(backend);
    cubebox(&lab, &["pause", "--to-disk", "c"]);
    assert_eq!(stored(&lab).len(), 1);
    super::a_killed_shim_leaves_nothing(&lab);
}

/// With the disk full while memory is written, and with the memory's file gone when it is read.
pub fn a_pause_to_disk_or_a_resume_that_fails_leaves_what_was(backend: Backend) {
    let lab = lab_with_block_container(backend);
    let store = lab.dir().join("snapshots");
    let small = Disk::tmpfs(&store, 8 << 20);
    lab.cubecli(&["cubebox", "pause", "--to-disk", "c"]).fails_with(&["No space left on device"]);
    assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("RUNNING", "running"));
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
    assert!(stored(&lab).is_empty(), "{:?}", stored(&lab));
    small.unmount();

    cubebox(&lab, &["pause", "--to-disk", "c"]);
    let memory = store.join(&stored(&lab)[0]).join("vm/memory-ranges");
    let aside = memory.with_extension("aside");
    fs::rename(&memory, &aside).unwrap();
    lab.cubecli(&["cubebox", "resume", "c"]).fails_with(&["memory-ranges"]);
    assert_eq!((state(&lab).as_str(), listed(&lab).as_str()), ("PAUSED", "suspended"));
    fs::rename(&aside, &memory).unwrap();
    cubebox(&lab, &["resume", "c"]);
    assert_eq!(lab.exec("c", &["echo", "alive"]).succeeds().out(), "alive\n");
    lab.remove("c");
    lab.nothing_is_left();
}
