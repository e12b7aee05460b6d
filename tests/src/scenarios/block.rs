//! `cube.rootfs.mode=block`: an image packed into disks of the VM.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::WAIT;
use crate::{
    command::{poll, start},
    disk::Disk,
    kills::{KillLab, Programs},
    lab::{Lab, Setup},
    leftovers,
    needs::Backend,
};

/// Flag of `ctr run`, in two parts.
pub(super) const BLOCK: [&str; 2] = ["--annotation", "cube.rootfs.mode=block"];

/// A lab whose packer notes each of its runs, with the number of its process, and runs `before` first.
fn lab_that_counts(backend: Backend, before: &str, rootfs: &str) -> (tempfile::TempDir, Lab) {
    let dir = tempfile::Builder::new().prefix("cp.").tempdir().unwrap();
    let packer = dir.path().join("mkfs.erofs");
    let (path, runs) = (packer.display(), dir.path().join("runs"));
    let runs = runs.display();
    let script = format!("#!/bin/sh\necho $$ >> '{runs}'\n{before}\nexec mkfs.erofs \"$@\"\n");
    fs::write(&packer, script.replace("HERE", &dir.path().display().to_string())).unwrap();
    fs::set_permissions(&packer, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let lab = Lab::with(Setup { packer: packer.clone(), rootfs: rootfs.to_owned(), ..backend.into() });
    (dir, lab)
}

/// Processes that packed, in the order of their starts.
fn packers(dir: &tempfile::TempDir) -> Vec<Pid> {
    let text = fs::read_to_string(dir.path().join("runs")).unwrap_or_default();
    text.lines().map(|line| Pid::from_raw(line.parse().unwrap())).collect()
}

/// Directories of the packed images.
fn images(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(lab.cache_dir().join("images")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The disks of container `id`, a sandbox of its own, that end with `extension`.
fn disks(lab: &Lab, id: &str, extension: &str) -> Vec<PathBuf> {
    let dir = lab.cache_dir().join("sandboxes").join(lab.key(id));
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

fn detached(lab: &Lab, flags: &[&str], id: &str) {
    lab.detached_with(&[&BLOCK, flags].concat(), id, &WAIT);
}

/// Run, write, exec, exit code, delete; a disk of the size that was asked for, and no virtiofsd.
pub fn an_image_becomes_disks_and_needs_no_share(backend: Backend) {
    let lab = Lab::new(backend);
    let script =
        "grep ' / ' /proc/mounts; echo mine > /written; rm /bin/vi; cat /written; ls /bin/vi; exit 7";
    let ended = lab.run_with(&BLOCK, "a", &["sh", "-c", script]).exits_with(7);
    assert!(ended.out().starts_with("overlay / overlay ") && ended.out().ends_with("\nmine\n"), "{ended}");
    assert!(ended.err().contains("/bin/vi: No such file"), "{ended}");
    lab.nothing_is_left();

    detached(&lab, &["--annotation", "cube.rootfs.size=64Mi"], "b");
    let lines: Vec<_> = lab.leftovers().into_iter().filter(|line| line.contains("virtiofsd")).collect();
    assert_eq!(lines, Vec::<String>::new(), "block disks need no virtiofsd");
    let seen = lab.exec("b", &["sh", "-c", "ls /bin/vi; ls /written; df -m / | tail -n 1"]);
    assert!(seen.out().starts_with("/bin/vi\n") && seen.err().contains("/written: No such file"), "{seen}");
    let size: u64 = seen.out().split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!((48..=64).contains(&size), "{seen}");
    let full = lab.exec("b", &["sh", "-c", "dd if=/dev/zero of=/large bs=65536 count=1200"]);
    assert!(full.code() != 0 && full.err().contains("No space left"), "{full}");
    lab.exec("b", &["sh", "-c", "rm /large && echo still > /alive && cat /alive"]).succeeds();
    lab.remove("b");
    lab.nothing_is_left_but_fifos();
    assert_eq!(images(&lab).len(), 1);
}

/// Created at the same moment, with a packer that takes its time.
pub fn sandboxes_of_an_image_share_one_file_that_was_packed_once(backend: Backend) {
    let (dir, lab) = lab_that_counts(backend, "sleep 1", "");
    std::thread::scope(|scope| {
        for id in ["a", "b"] {
            let mut command = lab.run_command(&[&BLOCK[..], &["--detach", "--null-io"]].concat(), id, &WAIT);
            let limit = lab.limit();
            scope.spawn(move || start(&mut command).wait(limit).succeeds());
        }
    });
    assert_eq!(packers(&dir).len(), 1);
    let inode = |id| fs::metadata(&disks(&lab, id, "erofs")[0]).unwrap().ino();
    assert_eq!(inode("a"), inode("b"));
    lab.exec("a", &["sh", "-c", "echo a > /only"]).succeeds();
    lab.exec("b", &["cat", "/only"]).fails_with(&["No such file"]);
    for id in ["a", "b"] {
        let written = fs::metadata(&disks(&lab, id, "ext4")[0]).unwrap();
        assert_eq!(written.len(), 10 << 30);
        assert!(written.blocks() * 512 < 64 << 20, "{} bytes on disk", written.blocks() * 512);
        lab.remove(id);
    }
    lab.nothing_is_left_but_fifos();
    let left = images(&lab);
    assert_eq!(fs::metadata(left[0].join("rootfs.erofs")).unwrap().nlink(), 1);
}

/// A shim that dies while its packer runs takes that along, and nobody waits for it for ever.
pub fn a_packer_that_is_killed_leaves_nothing_that_hurts(backend: Backend) {
    // The first run hangs until somebody ends it.
    let before = "mkdir HERE/first 2> /dev/null && { echo half > \"$4\"; while :; do sleep 1; done; }";
    let (dir, lab) = lab_that_counts(backend, before, "");
    let run = start(&mut lab.run_command(&[&BLOCK[..], &["--detach", "--null-io"]].concat(), "a", &WAIT));
    assert!(poll(lab.limit(), || packers(&dir).len() == 1), "no packer");
    kill(lab.shim_pid("a"), Signal::SIGKILL).unwrap();
    let failed = run.wait(lab.limit());
    assert_ne!(failed.code(), 0, "{failed}");
    let packer = packers(&dir)[0];
    assert!(poll(lab.limit(), || kill(packer, None).is_err()), "the packer lives on");
    lab.ctr(&["container", "delete", "a"]);
    lab.nothing_is_left_but_fifos();
    let half = images(&lab);
    assert!(half.len() == 1 && !half[0].join("rootfs.erofs").exists(), "{half:?}");

    assert_eq!(lab.run_with(&BLOCK, "a", &["echo", "again"]).succeeds().out(), "again\n");
    let names: Vec<_> = fs::read_dir(&half[0]).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["rootfs.erofs"]);
    lab.nothing_is_left_but_fifos();
}

/// SIGKILL of a container that is being created ends the packer at once.
pub fn a_create_that_is_killed_ends_its_packer(backend: Backend) {
    let (dir, lab) = lab_that_counts(backend, "while :; do sleep 1; done", "");
    let mut run = start(&mut lab.run_command(&[&BLOCK[..], &["--detach", "--null-io"]].concat(), "a", &WAIT));
    assert!(poll(lab.limit(), || packers(&dir).len() == 1), "no packer: {}", run.is_running());
    // containerd knows no task yet that `ctr task kill` could name.
    let socket = lab.run_dir().join(lab.key("a")).join("shim.sock");
    let client = containerd_shim_protos::Client::connect(&format!("unix://{}", socket.display())).unwrap();
    let client = containerd_shim_protos::TaskClient::new(client);
    let request =
        containerd_shim_protos::api::KillRequest { id: "a".into(), signal: 9, ..Default::default() };
    let context = ttrpc::context::with_timeout(lab.limit().as_nanos() as i64);
    client.kill(context, &request).unwrap();
    run.wait(lab.limit()).fails_with(&["killed while it was being created"]);
    assert!(kill(packers(&dir)[0], None).is_err(), "the packer lives on");
    lab.ctr(&["container", "delete", "a"]);
    lab.nothing_is_left_but_fifos();
    assert_eq!(images(&lab), Vec::<PathBuf>::new());
}

/// A shim that dies at any step of making disks leaves none, and nothing that the next create trips over.
pub fn disks_whose_making_is_killed_at_any_step_are_removed(backend: Backend) {
    let kills = KillLab::new(backend, Programs::WithFaultPoints, "");
    let flags = [&BLOCK[..], &["--detach", "--null-io"]].concat();
    for point in ["create.disks_begun", "create.image_packed", "create.image_linked", "create.disk_made"] {
        kills.arm(point, 1);
        start(&mut kills.lab.run_command(&flags, "c", &["true"])).wait(kills.lab.limit());
        kills.fires(point);
        kills.give_up("c");
        kills.lab.nothing_is_left();
    }
    assert_eq!(kills.lab.run_with(&BLOCK, "c", &["echo", "again"]).succeeds().out(), "again\n");
    kills.lab.nothing_is_left();
    kills.record_cleanups("kill -9 at each step of making disks");
}

/// A writable directory that belongs to the container alone, as the native snapshotter gives it.
pub fn a_snapshot_that_may_change_is_packed_for_its_sandbox_only(backend: Backend) {
    let (dir, lab) = lab_that_counts(backend, "", "");
    for id in ["a", "b"] {
        let flags = [&BLOCK[..], &["--snapshotter", "native"]].concat();
        let ended = lab.run_with(&flags, id, &["sh", "-c", "ls /written; echo x > /written; exit 3"]);
        assert!(ended.exits_with(3).err().contains("/written: No such file"));
    }
    assert_eq!((packers(&dir).len(), images(&lab)), (2, vec![]));
    lab.nothing_is_left();
}

/// An image that a sandbox uses stays, whatever the limit says; it goes when another one is packed and
/// nobody uses it.
pub fn the_cache_limit_evicts_only_what_no_sandbox_uses(backend: Backend) {
    let lab = Lab::with(Setup { rootfs: "cache_limit = 1".into(), ..backend.into() });
    detached(&lab, &[], "a");
    let used = images(&lab);
    assert_eq!(used.len(), 1);
    lab.cubecli(&["cubebox", "gc"]).succeeds();
    assert_eq!(images(&lab), used);
    lab.exec("a", &["ls", "/bin"]).succeeds();
    lab.remove("a");
    let said = lab.cubecli(&["cubebox", "gc", "--dry-run"]).succeeds().out();
    assert!(said.contains("would remove") && said.contains(used[0].to_str().unwrap()), "{said}");
    assert_eq!(images(&lab), used);
    lab.cubecli(&["cubebox", "gc"]).succeeds();
    assert_eq!(images(&lab), Vec::<PathBuf>::new());
    lab.nothing_is_left_but_fifos();
}

/// What the container writes may be more than the host has room for: it gets an error, and lives on.
pub fn a_full_disk_of_the_host_is_an_error_in_the_guest_and_no_standstill(backend: Backend) {
    let lab = Lab::new(backend);
    let disk = Disk::tmpfs(&lab.cache_dir(), 24 << 20);
    lab.disown_what_exists();
    detached(&lab, &[], "a");
    let failed = lab.exec("a", &["dd", "if=/dev/zero", "of=/large", "bs=65536", "count=600", "conv=fsync"]);
    assert!(failed.code() != 0 && failed.err().contains("error"), "{failed}");
    lab.exec("a", &["true"]).succeeds();
    lab.remove("a");
    lab.nothing_is_left_but_fifos();
    disk.unmount();
}

/// After a crash of the host the run directory, on a tmpfs, is gone, and the disks are not.
pub fn disks_that_outlived_a_reboot_are_removed(backend: Backend) {
    let lab = Lab::new(backend);
    detached(&lab, &[], "a");
    let disks = disks(&lab, "a", "ext4");
    assert_eq!(disks.len(), 1);
    lab.stop_containerd();
    for process in leftovers::processes(lab.dir()) {
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).ok();
    }
    for mount in leftovers::mounts(lab.dir()) {
        nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH).ok();
    }
    fs::remove_dir_all(lab.run_dir()).unwrap();
    let said = lab.cubecli(&["cubebox", "gc"]).succeeds().out();
    assert!(said.contains("disks of a sandbox that is gone"), "{said}");
    assert!(!exists(&disks[0].parent().unwrap().join("run")) && !disks[0].exists());
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Without a VM there is no disk, and it says so before it packs anything.
pub fn without_a_vm_it_is_refused_by_name(backend: Backend) {
    let lab = Lab::new(backend);
    let refused = lab.run_with(&BLOCK, "a", &["true"]);
    refused.fails_with(&["cube.rootfs.mode=block", "no VM"]);
    lab.ctr(&["container", "delete", "a"]);
    lab.nothing_is_left();
    assert_eq!(images(&lab), Vec::<PathBuf>::new());
}
