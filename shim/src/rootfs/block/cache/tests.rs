use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use super::{super::Cancel, *};

const SIZE: u64 = 1 << 20;

struct Scratch {
    dir: tempfile::TempDir,
    cache: Cache,
}

fn scratch() -> Scratch {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(&dir.path().join("cache")).unwrap();
    Scratch { dir, cache }
}

fn limits() -> Limits {
    Limits { deadline: Instant::now() + Duration::from_secs(60), cancel: Cancel::default() }
}

fn identity(name: &str) -> Identity {
    Identity::of_file(Path::new(name))
}

fn pack(to: &Path) -> Result<(), RootfsError> {
    fs::write(to, vec![1; SIZE as usize]).unwrap();
    Ok(())
}

impl Scratch {
    /// Lets a sandbox use the image `name`; tells whether it had to be packed.
    fn sandbox(&self, name: &str, sandbox: &str) -> bool {
        let link = self.dir.path().join(sandbox);
        self.cache.link(&identity(name), &link, &limits(), pack).unwrap()
    }

    fn end(&self, sandbox: &str) {
        fs::remove_file(self.dir.path().join(sandbox)).unwrap();
        // The order of ctimes within one tick of the kernel's clock is not told.
        thread::sleep(Duration::from_millis(20));
    }

    fn has(&self, name: &str) -> bool {
        self.cache.images().join(identity(name).as_str()).exists()
    }
}

#[test]
fn of_many_at_once_one_packs_and_all_get_the_same_file() {
    let scratch = scratch();
    let packed = AtomicU32::new(0);
    thread::scope(|scope| {
        for number in 0..8 {
            let (scratch, packed) = (&scratch, &packed);
            scope.spawn(move || {
                let link = scratch.dir.path().join(number.to_string());
                let made = scratch.cache.link(&identity("a"), &link, &limits(), |to| {
                    packed.fetch_add(1, Ordering::Relaxed);
                    pack(to)
                });
                made.unwrap();
            });
        }
    });
    assert_eq!(packed.load(Ordering::Relaxed), 1);
    assert_eq!(fs::metadata(scratch.dir.path().join("7")).unwrap().nlink(), 9);
}

#[test]
fn only_what_no_sandbox_uses_is_evicted_the_oldest_first() {
    let scratch = scratch();
    for name in ["a", "b", "c", "d"] {
        assert!(scratch.sandbox(name, name));
    }
    for name in ["b", "c", "d"] {
        scratch.end(name);
    }
    assert!(!scratch.sandbox("b", "again"));
    scratch.end("again");
    let two = 2 * SIZE + SIZE / 2;
    assert_eq!(scratch.cache.evict(two, true).unwrap().len(), 2);
    let removed = scratch.cache.evict(two, false).unwrap();
    assert_eq!(removed.iter().map(|one| one.bytes >= SIZE).collect::<Vec<_>>(), [true, true]);
    // "a" is the oldest, but in use; "b" was used last.
    assert_eq!(["a", "b", "c", "d"].map(|name| scratch.has(name)), [true, true, false, false]);
    scratch.cache.evict(1, false).unwrap();
    assert_eq!(["a", "b"].map(|name| scratch.has(name)), [true, false]);
    assert!(scratch.sandbox("b", "b"), "an evicted image is packed again");
}

#[test]
fn an_image_can_be_evicted_while_it_is_asked_for() {
    let scratch = scratch();
    let begun = Instant::now();
    thread::scope(|scope| {
        let evicting = scope.spawn(|| {
            while begun.elapsed() < Duration::from_millis(500) {
                scratch.cache.evict(1, false).unwrap();
            }
        });
        while !evicting.is_finished() {
            scratch.sandbox("a", "a");
            assert_eq!(fs::metadata(scratch.dir.path().join("a")).unwrap().len(), SIZE);
            fs::remove_file(scratch.dir.path().join("a")).unwrap();
        }
    });
}

#[test]
fn a_failed_packing_leaves_nothing_and_half_a_file_of_a_dead_one_is_removed() {
    let scratch = scratch();
    let link = scratch.dir.path().join("a");
    let failed = scratch.cache.link(&identity("a"), &link, &limits(), |to| {
        pack(to)?;
        Err(RootfsError::Cancelled)
    });
    assert!(matches!(failed, Err(RootfsError::Cancelled)) && !scratch.has("a") && !link.exists());
    let dir = scratch.cache.images().join(identity("a").as_str());
    for name in ["a", "b"] {
        let dir = scratch.cache.images().join(identity(name).as_str());
        fs::create_dir(&dir).unwrap();
        pack(&dir.join("1.new")).unwrap();
    }
    assert!(scratch.sandbox("a", "a"));
    assert_eq!(list(&dir).unwrap(), [dir.join(IMAGE)]);
    assert_eq!(scratch.cache.evict(u64::MAX, false).unwrap().len(), 1);
    assert!(scratch.has("a") && !scratch.has("b"));
}

#[test]
fn who_waits_for_another_gives_up_when_told_and_in_time() {
    let scratch = scratch();
    let dir = scratch.cache.images().join(identity("a").as_str());
    let _held = lock(&dir, &limits()).unwrap();
    assert!(scratch.cache.evict(1, false).unwrap().is_empty(), "somebody is at work there");
    let link = scratch.dir.path().join("a");
    let soon = Limits { deadline: Instant::now() + Duration::from_millis(50), ..limits() };
    let slow = scratch.cache.link(&identity("a"), &link, &soon, pack);
    assert!(matches!(slow, Err(RootfsError::Slow { .. })), "{slow:?}");
    let told = limits();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| scratch.cache.link(&identity("a"), &link, &told, pack));
        told.cancel.cancel();
        assert!(matches!(waiting.join().unwrap(), Err(RootfsError::Cancelled)));
    });
}

#[test]
fn disks_without_a_run_directory_are_orphans_and_others_are_not() {
    let scratch = scratch();
    let run_dirs = ["a", "b"].map(|key| scratch.dir.path().join("run").join(key.repeat(20)));
    for run_dir in &run_dirs {
        fs::create_dir_all(run_dir).unwrap();
        let disks = SandboxDisks::create(run_dir, &scratch.cache).unwrap();
        pack(&disks.writable("c")).unwrap();
        assert_eq!(SandboxDisks::of(run_dir).unwrap(), Some(disks));
    }
    fs::create_dir(scratch.cache.sandboxes().join("c".repeat(20))).unwrap();
    fs::create_dir(scratch.cache.sandboxes().join("somebodys-data")).unwrap();
    fs::remove_dir_all(&run_dirs[0]).unwrap();
    assert_eq!(scratch.cache.remove_orphans(true).unwrap().len(), 2);
    let removed = scratch.cache.remove_orphans(false).unwrap();
    assert!(removed[0].path.ends_with("a".repeat(20)) && removed[0].bytes >= SIZE, "{removed:?}");
    assert!(scratch.cache.remove_orphans(false).unwrap().is_empty());
    assert!(scratch.cache.sandboxes().join("somebodys-data").exists());
    let kept = SandboxDisks::of(&run_dirs[1]).unwrap().unwrap();
    assert!(kept.writable("c").exists());
    kept.remove_container("c").unwrap();
    kept.remove().unwrap();
    kept.remove().unwrap();
}

#[test]
fn a_sandbox_of_a_name_that_was_used_before_a_reboot_begins_anew() {
    let scratch = scratch();
    let run_dir = scratch.dir.path().join("run/a");
    for _ in 0..2 {
        fs::create_dir_all(&run_dir).unwrap();
        let disks = SandboxDisks::create(&run_dir, &scratch.cache).unwrap();
        assert!(!disks.writable("c").exists());
        pack(&disks.writable("c")).unwrap();
        fs::remove_dir_all(&run_dir).unwrap();
    }
}

const KEY: &str = "0123456789abcdef0123";

#[test]
fn removing_disks_costs_nobody_a_file() {
    use crate::files::testing::costs_nobody_a_file;
    let make = |root: &Path| {
        let run_dir = root.join("run").join(KEY);
        fs::create_dir_all(&run_dir).unwrap();
        let disks = SandboxDisks::create(&run_dir, &Cache::open(root).unwrap()).unwrap();
        pack(&disks.writable("c")).unwrap();
        root.join("sandboxes").join(KEY)
    };
    costs_nobody_a_file(make, |root| {
        SandboxDisks::of(&root.join("run").join(KEY)).unwrap().unwrap().remove()
    });
    costs_nobody_a_file(make, |root| {
        files::remove(&root.join("run").join(KEY)).unwrap();
        Cache::open(root)?.remove_orphans(false).map(drop)
    });
}

#[test]
fn evicting_an_image_costs_nobody_a_file() {
    crate::files::testing::costs_nobody_a_file(
        |root| {
            let cache = Cache::open(root).unwrap();
            cache.link(&identity("a"), &root.join("link"), &limits(), pack).unwrap();
            fs::remove_file(root.join("link")).unwrap();
            root.join("images").join(identity("a").as_str())
        },
        |root| Cache::open(root)?.evict(1, false).map(drop),
    );
}
