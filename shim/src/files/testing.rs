//! Traps for whatever removes something: the ways in which a directory can be reached, and what can be in it that
//! is somebody else's. None of them may cost anybody a file.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use super::{remove, unmount};

/// How a configured directory is named.
pub(crate) const WAYS: [Way; 11] = [
    ("plainly", |temp| temp.join("real")),
    ("below a link", |temp| temp.join("link/real")),
    ("below a relative link", |temp| temp.join("relative/real")),
    ("by a link", |temp| {
        symlink("real", temp.join("last")).unwrap();
        temp.join("last")
    }),
    ("with ..", |temp| temp.join("real/../real")),
    ("with .. behind a link", |temp| temp.join("elsewhere/../real")),
    ("with more slashes", |temp| temp.join(".//real///./")),
    ("as a bind mount", |temp| {
        fs::create_dir(temp.join("original")).unwrap();
        bind(&temp.join("original"), &temp.join("real"));
        temp.join("real")
    }),
    ("as a file system", |temp| {
        tmpfs(&temp.join("real"));
        temp.join("real")
    }),
    ("below a mount of the whole", |temp| {
        fs::create_dir(temp.join("view")).unwrap();
        bind(temp, &temp.join("view"));
        temp.join("view/real")
    }),
    ("with what mountinfo escapes", |temp| {
        let name = temp.join(OsStr::from_bytes(b"a b\tc\nd\\e\\040f#\xff"));
        fs::create_dir(&name).unwrap();
        name
    }),
];

type Way = (&'static str, fn(&Path) -> PathBuf);

/// What is in a tree, or in its place, when it is removed. `tree`, and what must stay.
pub(crate) const TRAPS: [Trap; 10] = [
    ("a link to a directory", |tree, precious| symlink(precious, tree.join("trap")).unwrap()),
    ("a link to a file", |tree, precious| symlink(precious.join("file"), tree.join("trap")).unwrap()),
    ("a link in its place", |tree, precious| {
        fs::rename(tree, tree.with_extension("aside")).unwrap();
        symlink(precious, tree).unwrap();
    }),
    ("a mount in its place", |tree, precious| bind(precious, tree)),
    ("two mounts in its place", |tree, precious| {
        bind(precious, tree);
        bind(precious, tree);
    }),
    ("a bind mount", |tree, precious| {
        fs::create_dir(tree.join("trap")).unwrap();
        bind(precious, &tree.join("trap"));
    }),
    ("a bind mount deep down", |tree, precious| {
        fs::create_dir_all(tree.join("trap/b/c\n\\040")).unwrap();
        bind(precious, &tree.join("trap/b/c\n\\040"));
    }),
    ("a file on a file", |tree, precious| {
        fs::write(tree.join("trap"), "").unwrap();
        bind(&precious.join("file"), &tree.join("trap"));
    }),
    ("a file system", |tree, precious| {
        fs::create_dir(tree.join("trap")).unwrap();
        tmpfs(&tree.join("trap"));
        fs::create_dir(tree.join("trap/inner")).unwrap();
        bind(precious, &tree.join("trap/inner"));
    }),
    ("a mount of what the tree is in", |tree, _| {
        fs::create_dir(tree.join("trap")).unwrap();
        bind(tree.parent().unwrap(), &tree.join("trap"));
    }),
];

type Trap = (&'static str, fn(&Path, &Path));

/// A directory, and beside it what must never change.
pub(crate) struct Ground {
    temp: tempfile::TempDir,
}

impl Drop for Ground {
    fn drop(&mut self) {
        unmount(self.temp.path()).unwrap();
    }
}

impl Ground {
    pub(crate) fn new() -> Ground {
        let ground = Ground { temp: tempfile::tempdir().unwrap() };
        let temp = ground.temp.path();
        fs::create_dir(temp.join("real")).unwrap();
        symlink(temp, temp.join("link")).unwrap();
        symlink(".", temp.join("relative")).unwrap();
        symlink("real", temp.join("elsewhere")).unwrap();
        fs::create_dir_all(ground.precious().join("sub/deep")).unwrap();
        fs::write(ground.precious().join("file"), "kept").unwrap();
        fs::write(ground.precious().join("sub/deep/file"), "kept").unwrap();
        fs::write(ground.precious().join("sub/empty"), "").unwrap();
        ground
    }

    pub(crate) fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Files of somebody else.
    pub(crate) fn precious(&self) -> PathBuf {
        self.temp.path().join("precious")
    }

    #[track_caller]
    pub(crate) fn nothing_is_lost(&self, when: &str) {
        for (path, content) in [("file", "kept"), ("sub/deep/file", "kept"), ("sub/empty", "")] {
            let found = fs::read_to_string(self.precious().join(path));
            assert_eq!(found.ok().as_deref(), Some(content), "{path} is lost: {when}");
        }
    }
}

pub(crate) fn bind(from: &Path, to: &Path) {
    let none = None::<&str>;
    mount(Some(from), to, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, to, none, MsFlags::MS_PRIVATE, none).unwrap();
}

pub(crate) fn tmpfs(at: &Path) {
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("mode=0700")).unwrap();
    mount(None::<&str>, at, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// Tries a removal on every way and with every trap. `make` makes in a configured directory what can be removed,
/// and gives the directory that shall be gone; `remove_it` removes it, given the configured directory.
pub(crate) fn costs_nobody_a_file<E: std::fmt::Debug>(
    make: impl Fn(&Path) -> PathBuf,
    remove_it: impl Fn(&Path) -> Result<(), E>,
) {
    for (way, root) in WAYS {
        let ground = Ground::new();
        let root = root(ground.path());
        let tree = make(&root);
        assert!(tree.is_dir(), "{}", tree.display());
        fs::write(root.join("beside"), "").unwrap();
        remove_it(&root).unwrap_or_else(|e| panic!("named {way}: {e:?}"));
        assert!(!tree.exists(), "still there, named {way}");
        assert!(root.join("beside").exists(), "named {way}");
        ground.nothing_is_lost(way);
    }
    for (name, set) in TRAPS {
        let ground = Ground::new();
        let root = ground.path().join("real");
        let tree = make(&root);
        set(&tree, &ground.precious());
        let result = remove_it(&root);
        ground.nothing_is_lost(name);
        assert!(root.exists(), "{name}");
        // Without the trap, what has stayed can go.
        unmount(&tree).unwrap();
        remove(&tree.join("trap")).unwrap();
        if tree.is_symlink() {
            fs::remove_file(&tree).unwrap();
        }
        let aside = tree.with_extension("aside");
        if aside.exists() {
            fs::rename(aside, &tree).unwrap();
        }
        if tree.exists() {
            remove_it(&root).unwrap_or_else(|e| panic!("{name}: {result:?}, then {e:?}"));
        }
        assert!(!tree.exists(), "{name}: {result:?}");
        ground.nothing_is_lost(name);
    }
}

/// Whether an error says that something is mounted.
pub(crate) fn is_about_a_mount(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ResourceBusy && error.to_string().contains("is a mount point")
}
