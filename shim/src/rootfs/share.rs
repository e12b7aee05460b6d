//! The directory of a sandbox that the guest sees over virtiofs.
//!
//! The guest may do there whatever root may, so the directory itself is a read-only view: only what
//! is mounted below it can be written to, as far as its own mount allows. Mount points are made
//! through the directory behind the view.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use cube_protocol::guest::SharedMount;
use nix::mount::{MsFlags, mount};

use super::{HostMount, RootfsError, bind::Bind, failed};
use crate::{
    files,
    vmm::{Backend, SHARE_TAG},
};

/// Mount point of the share in the guest, with every backend.
pub const GUEST_SHARE: &str = "/run/cube/shared";

/// `<run_dir>/shared`, with a subdirectory for each container.
#[derive(Debug, Clone)]
pub struct Share {
    view: PathBuf,
    behind: PathBuf,
}

impl Share {
    /// The share of the sandbox with this run directory. Touches nothing.
    pub fn of(run_dir: &Path) -> Share {
        Share { view: run_dir.join("shared"), behind: run_dir.join("mountpoints") }
    }

    /// The directory to export.
    pub fn dir(&self) -> &Path {
        &self.view
    }

    /// Makes the directory, before the VM boots. What is mounted below it later is seen by virtiofsd
    /// and by the agent of the `process` backend, which live in other mount namespaces: it is a
    /// mount of its own, for a directory cannot propagate, in a peer group of its own, so that
    /// nothing appears anywhere else. Can be repeated.
    pub fn prepare(&self) -> Result<(), RootfsError> {
        for dir in [&self.behind, &self.view] {
            fs::create_dir_all(dir).map_err(failed("cannot create", dir))?;
        }
        if !files::is_mount_point(&self.view).map_err(failed("cannot look at", &self.view))? {
            let read_only = Bind { attributes: libc::MOUNT_ATTR_RDONLY, ..Bind::default() };
            read_only.attach(&self.behind, &self.view).map_err(failed("cannot mount", &self.view))?;
            let none = None::<&str>;
            // Private first: attached to a shared mount, it has become a peer of copies elsewhere.
            [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED]
                .into_iter()
                .try_for_each(|propagation| mount(none, &self.view, none, propagation, none))
                .map_err(|errno| failed("cannot change the propagation of", &self.view)(errno.into()))?;
        }
        Ok(())
    }

    /// How the guest mounts the share, for `PrepareSandbox`. On the `process` backend the agent binds
    /// the host's directory, with what is mounted below it, to the path that it has in a VM.
    pub fn guest_mount(&self, backend: Backend) -> SharedMount {
        let (fs_type, source, options) = match backend {
            Backend::CloudHypervisor | Backend::Qemu(_) => ("virtiofs", SHARE_TAG.to_owned(), Vec::new()),
            Backend::Process => ("bind", self.view.to_string_lossy().into_owned(), vec!["rbind".to_owned()]),
        };
        let (fs_type, target) = (fs_type.to_owned(), GUEST_SHARE.to_owned());
        SharedMount { fs_type, source, target, options, ..SharedMount::default() }
    }

    /// Mounts `mounts` on top of each other at `<container>/<name>`. A source that is a file gets a
    /// file as its mount point.
    pub(super) fn mount(&self, relative: &Path, mounts: &[HostMount]) -> Result<(), RootfsError> {
        let target = self.view.join(relative);
        let behind = self.behind.join(relative);
        let is_file = mounts.first().is_some_and(|m| m.is_bind() && !Path::new(&m.source).is_dir());
        let parent = behind.parent().unwrap_or(&behind);
        fs::create_dir_all(parent).map_err(failed("cannot create", parent))?;
        match is_file {
            true => make_file(&behind).map_err(failed("cannot create", &behind))?,
            false => fs::create_dir_all(&behind).map_err(failed("cannot create", &behind))?,
        }
        mounts.iter().try_for_each(|mount| mount.mount_on(&target))
    }

    /// Unmounts and removes what a container had. Can be repeated.
    pub fn remove_container(&self, id: &str) -> Result<(), RootfsError> {
        super::plan::check_id(id)?;
        unmount_all(&self.view.join(id))?;
        remove_unmounted(&self.behind.join(id))
    }

    /// Unmounts and removes everything, the directory included. Can be repeated, and needs nothing
    /// but the run directory's path.
    pub fn remove(&self) -> Result<(), RootfsError> {
        unmount_all(&self.view)?;
        remove_unmounted(&self.view)?;
        remove_unmounted(&self.behind)
    }
}

/// An empty file, unless there is one: nothing is truncated, and no link followed.
fn make_file(path: &Path) -> std::io::Result<()> {
    let mut options = fs::File::options();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(path).map(drop)
}

/// Unmounts whatever is mounted at and below `dir`, by descriptors. Lazily, for virtiofsd or a reader of the host
/// may hold files open, and the mounts must be gone from containerd's eyes all the same.
fn unmount_all(dir: &Path) -> Result<(), RootfsError> {
    files::unmount(dir).map_err(failed("cannot unmount what is below", dir))
}

/// Removes mount points, and only those: directories that are empty, and the files on which files were mounted.
/// Should something be mounted in spite of all, its contents are safe.
fn remove_unmounted(dir: &Path) -> Result<(), RootfsError> {
    files::remove_mount_points(dir).map_err(failed("cannot remove the mount points in", dir))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        process::{Command, Stdio},
    };

    use super::*;
    use crate::rootfs::mountinfo;

    fn bind(source: &Path, options: &[&str]) -> HostMount {
        HostMount {
            fs_type: "bind".into(),
            source: source.to_str().unwrap().into(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    /// A run directory whose mounts are gone after the test.
    struct Scratch(tempfile::TempDir);

    impl Drop for Scratch {
        fn drop(&mut self) {
            unmount_all(self.0.path()).unwrap();
        }
    }

    fn scratch() -> (Scratch, Share, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let share = Share::of(dir.path());
        share.prepare().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("sub")).unwrap();
        fs::write(source.join("file"), "content").unwrap();
        (Scratch(dir), share, source)
    }

    #[test]
    fn only_what_is_mounted_in_the_share_can_be_written_to() {
        let (_scratch, share, source) = scratch();
        share.mount(Path::new("c/rootfs"), &[bind(&source, &["rbind", "rw"])]).unwrap();
        share.mount(Path::new("c/mounts/0"), &[bind(&source, &["rbind", "ro"])]).unwrap();
        let read_only = |path: &str| {
            fs::write(share.dir().join(path), "x").is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem)
        };
        assert!(read_only("new") && read_only("c/new") && read_only("c/mounts/0/new"));
        fs::write(share.dir().join("c/rootfs/new"), "x").unwrap();
        assert!(source.join("new").exists());
    }

    #[test]
    fn a_read_only_volume_is_read_only_in_other_mount_namespaces_too() {
        let (_scratch, share, source) = scratch();
        let target = share.dir().join("c/mounts/0");
        let script = format!("echo ready; read go; cat '{0}/file'; touch '{0}/new'", target.display());
        let mut other = Command::new("unshare")
            .args(["--mount", "--propagation=slave", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        other.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        share.mount(Path::new("c/mounts/0"), &[bind(&source, &["rbind", "ro"])]).unwrap();
        other.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let output = other.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "content");
        assert!(String::from_utf8_lossy(&output.stderr).contains("Read-only"), "{output:?}");
    }

    #[test]
    fn unmounting_a_volume_leaves_what_the_host_has_mounted_below_its_source() {
        let (_scratch, share, source) = scratch();
        let none = None::<&str>;
        mount(Some(&source), &source, none, MsFlags::MS_BIND, none).unwrap();
        mount(none, &source, none, MsFlags::MS_SHARED, none).unwrap();
        let sub = source.join("sub");
        mount(Some("tmpfs"), &sub, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        fs::write(sub.join("inner"), "").unwrap();
        for options in [["rbind", "rprivate"], ["rbind", "rslave"]] {
            share.mount(Path::new("c/mounts/0"), &[bind(&source, &options)]).unwrap();
            assert!(share.dir().join("c/mounts/0/sub/inner").exists());
            share.remove_container("c").unwrap();
            assert!(sub.join("inner").exists(), "{options:?}");
        }
    }

    #[test]
    fn the_share_propagates_to_other_mount_namespaces() {
        let (_scratch, share, _) = scratch();
        let entry = mountinfo::read().unwrap().into_iter().find(|m| m.mount_point == share.dir());
        assert!(entry.unwrap().shared);
    }

    #[test]
    fn a_file_is_mounted_on_a_file() {
        let (_scratch, share, source) = scratch();
        share.mount(Path::new("c/mounts/0"), &[bind(&source.join("file"), &["rbind"])]).unwrap();
        assert_eq!(fs::read(share.dir().join("c/mounts/0")).unwrap(), b"content");
        share.remove_container("c").unwrap();
    }

    #[test]
    fn removal_takes_mounts_on_top_of_each_other_and_spares_their_contents() {
        let (_scratch, share, source) = scratch();
        share.mount(Path::new("c/rootfs"), &[bind(&source, &[]), bind(&source, &[])]).unwrap();
        share.mount(Path::new("d/rootfs"), &[bind(&source, &[])]).unwrap();
        share.remove_container("c").unwrap();
        assert!(!share.dir().join("c").exists() && share.dir().join("d/rootfs/file").exists());
        share.remove_container("c").unwrap();
        share.remove().unwrap();
        share.remove().unwrap();
        assert!(!share.dir().exists());
        assert_eq!(fs::read(source.join("file")).unwrap(), b"content");
    }

    #[test]
    fn removal_costs_nobody_a_file_however_the_run_directory_is_named() {
        use crate::files::testing::{Ground, WAYS, tmpfs};
        for (way, root) in WAYS {
            let ground = Ground::new();
            let run_dir = root(ground.path()).join("key");
            let precious = ground.precious();
            let (source, nested) = (precious.join("sub"), precious.join("sub/deep"));
            for whole in [false, true] {
                let share = Share::of(&run_dir);
                share.prepare().unwrap();
                share.prepare().unwrap();
                share.mount(Path::new("c/rootfs"), &[bind(&source, &[]), bind(&source, &["rbind"])]).unwrap();
                share.mount(Path::new("c/mounts/0"), &[bind(&precious, &["rbind", "rw"])]).unwrap();
                share
                    .mount(Path::new("c/mounts/1"), &[bind(&precious.join("file"), &["rbind", "rw"])])
                    .unwrap();
                share.mount(Path::new("d/mounts/0"), &[bind(&nested, &["rbind", "rslave"])]).unwrap();
                // Somebody mounts something over a mount point's parent.
                tmpfs(&share.dir().join("c/mounts"));
                if !whole {
                    share.remove_container("c").unwrap();
                    assert!(!share.dir().join("c").exists(), "{way}");
                    assert!(share.dir().join("d/mounts/0/file").exists(), "{way}");
                    ground.nothing_is_lost(way);
                }
                share.remove().unwrap();
                share.remove().unwrap();
                assert!(!share.dir().exists() && !share.behind.exists(), "{way}");
                ground.nothing_is_lost(way);
            }
            let left = mountinfo::read().unwrap();
            let here = fs::canonicalize(&run_dir).unwrap();
            assert!(!left.iter().any(|entry| entry.mount_point.starts_with(&here)), "{way}");
        }
    }

    #[test]
    fn what_is_not_a_mount_point_of_ours_stays() {
        let (_scratch, share, source) = scratch();
        share.mount(Path::new("c/rootfs"), &[bind(&source, &[])]).unwrap();
        fs::write(share.behind.join("c/mine"), "x").unwrap();
        let error = crate::errors::chain(&share.remove_container("c").unwrap_err());
        assert!(error.contains("c/mine") && share.behind.join("c/mine").exists(), "{error}");
        assert!(source.join("file").exists());
    }

    #[test]
    fn a_failed_mount_names_source_and_target() {
        let (_scratch, share, _) = scratch();
        let error = share.mount(Path::new("c/rootfs"), &[bind(Path::new("/nonexistent"), &[])]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }

    #[test]
    fn an_overlay_of_more_layers_than_a_page_names_is_mounted() {
        let (scratch, share, _) = scratch();
        let layers = scratch.0.path().join("l".repeat(100));
        let lower: Vec<String> = (0..120)
            .map(|n| {
                let dir = layers.join(format!("{n}"));
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join(format!("from-{n}")), "").unwrap();
                dir.to_str().unwrap().to_owned()
            })
            .collect();
        let option = format!("lowerdir={}", lower.join(":"));
        assert!(option.len() > 8192);
        let overlay =
            HostMount { fs_type: "overlay".into(), source: "overlay".into(), options: vec![option] };
        let before = std::env::current_dir().unwrap();
        share.mount(Path::new("c/rootfs"), &[overlay]).unwrap();
        assert!(
            share.dir().join("c/rootfs/from-0").exists() && share.dir().join("c/rootfs/from-119").exists()
        );
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
