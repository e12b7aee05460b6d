use std::{
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::{
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use super::*;
use crate::files::testing::{Ground, TRAPS, WAYS, costs_nobody_a_file, is_about_a_mount};

fn tree(root: &Path) -> PathBuf {
    let tree = root.join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::create_dir_all(tree.join("c")).unwrap();
    fs::write(tree.join("a/b/file"), "").unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    tree
}

#[test]
fn a_tree_is_removed_however_it_is_named_and_nothing_that_is_mounted_or_linked_in_it() {
    costs_nobody_a_file(
        |root| {
            let tree = tree(root);
            fs::write(tree.join("a/text"), "text").unwrap();
            tree
        },
        |root| remove(&root.join("tree")),
    );
}

#[test]
fn mount_points_are_removed_however_they_are_named_and_nothing_that_is_mounted_or_linked_there() {
    costs_nobody_a_file(tree, |root| {
        let removed = remove_mount_points(&root.join("tree"));
        // A link is no mount point, so it stays.
        removed.or_else(|e| if e.to_string().contains("mount point") { Ok(()) } else { Err(e) })
    });
}

#[test]
fn a_mount_is_refused_by_name_and_all_beside_it_may_go() {
    for (name, set) in TRAPS.iter().filter(|(name, _)| !name.contains("link")) {
        for remove in [remove, remove_mount_points] {
            let ground = Ground::new();
            let tree = tree(&ground.path().join("real"));
            set(&tree, &ground.precious());
            let error = remove(&tree).unwrap_err();
            assert!(is_about_a_mount(&error), "{name}: {error}");
            assert!(error.to_string().contains(tree.to_str().unwrap()), "{name}: {error}");
        }
    }
}

#[test]
fn what_has_contents_is_no_mount_point() {
    let ground = Ground::new();
    let dir = ground.path().join("real/tree");
    for content in ["file", "link", "fifo"] {
        fs::create_dir_all(&dir).unwrap();
        match content {
            "file" => fs::write(dir.join(content), "x").unwrap(),
            "link" => symlink("nowhere", dir.join(content)).unwrap(),
            _ => nix::unistd::mkfifo(&dir.join(content), nix::sys::stat::Mode::S_IRWXU).unwrap(),
        }
        let error = remove_mount_points(&dir).unwrap_err();
        assert!(
            error.to_string().contains(content) && dir.join(content).is_symlink()
                || dir.join(content).exists()
        );
        remove(&dir).unwrap();
        assert!(!dir.exists());
    }
}

#[test]
fn everything_is_unmounted_however_it_is_named_and_wherever_it_is() {
    for (way, root) in WAYS {
        for (trap, set) in TRAPS {
            let ground = Ground::new();
            let root = root(ground.path());
            let tree = tree(&root);
            set(&tree, &ground.precious());
            let at = root.join("tree");
            unmount(&at).unwrap_or_else(|e| panic!("{way}, {trap}: {e}"));
            assert!(
                !is_mount_point(&at).unwrap() && !is_mount_point(&at.join("trap")).unwrap(),
                "{way}, {trap}"
            );
            remove(&at).unwrap_or_else(|e| panic!("{way}, {trap}: {e}"));
            assert!(fs::symlink_metadata(&at).is_err());
            ground.nothing_is_lost(&format!("{way}, {trap}"));
            unmount(&at).unwrap();
        }
    }
}

#[test]
fn a_place_that_is_no_place_of_ours_is_refused() {
    for path in ["", "/", "relative/tree", "/tmp/..", "tree"] {
        for remove in [remove, remove_mount_points, unmount] {
            assert_eq!(remove(Path::new(path)).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{path}");
        }
    }
    let ground = Ground::new();
    for remove in [remove, remove_mount_points, unmount] {
        remove(&ground.path().join("no/such")).unwrap();
        remove(&ground.path().join("no")).unwrap();
    }
}

/// Lets `disturb` run again and again beside `act`, which is repeated until it has met with it often.
fn while_disturbed(disturb: impl Fn() + Sync, mut act: impl FnMut(usize)) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                disturb();
            }
        });
        (0..400).for_each(&mut act);
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_link_that_is_swapped_in_meanwhile_is_not_followed() {
    let ground = Ground::new();
    let root = ground.path().join("real");
    let (at, link) = (root.join("tree/a"), root.join("link"));
    symlink(ground.precious(), &link).unwrap();
    let swap = || {
        let _ = renameat2(AT_FDCWD, &at, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE);
    };
    for remove in [remove, remove_mount_points] {
        while_disturbed(swap, |_| {
            fs::create_dir_all(root.join("tree")).unwrap();
            fs::create_dir_all(at.join("b/c")).ok();
            // What it meets with decides whether it succeeds.
            let _ = remove(&root.join("tree"));
        });
        ground.nothing_is_lost("a link was swapped in");
        super::remove(&link).unwrap();
        super::remove(&root.join("tree")).unwrap();
        symlink(ground.precious(), &link).unwrap();
    }
}

#[test]
fn a_mount_that_appears_meanwhile_keeps_its_files() {
    let ground = Ground::new();
    let (tree, precious) = (ground.path().join("real/tree"), ground.precious());
    let at = tree.join("a/b");
    let none = None::<&str>;
    let disturb = || {
        if mount(Some(&precious), &at, none, MsFlags::MS_BIND, none).is_ok() {
            thread::yield_now();
            umount2(&at, MntFlags::MNT_DETACH).ok();
        }
    };
    for act in [remove, remove_mount_points, unmount] {
        while_disturbed(disturb, |_| {
            fs::create_dir_all(&at).ok();
            let _ = act(&tree);
        });
        ground.nothing_is_lost("a mount appeared");
        unmount(&tree).unwrap();
    }
}

#[test]
fn a_server_that_does_not_answer_holds_up_neither_unmounting_nor_removing() {
    // A FUSE file system that nobody serves: whatever touches it waits for ever.
    let ground = Ground::new();
    let tree = tree(&ground.path().join("real"));
    let Ok(device) = fs::File::options().read(true).write(true).open("/dev/fuse") else {
        return eprintln!("skipped: this host has no FUSE");
    };
    let number = std::os::fd::AsRawFd::as_raw_fd(&device);
    let data = format!("fd={number},rootmode=40000,user_id=0,group_id=0");
    mount(Some("test"), &tree.join("c"), Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let at = tree.clone();
    thread::spawn(move || {
        let refused = remove(&at).unwrap_err();
        unmount(&at).unwrap();
        remove(&at).unwrap();
        sender.send(is_about_a_mount(&refused)).unwrap();
    });
    let answer = receiver.recv_timeout(std::time::Duration::from_secs(60));
    // Ends whatever waits for the server.
    drop(device);
    assert_eq!(answer, Ok(true));
    assert!(!tree.exists());
}
