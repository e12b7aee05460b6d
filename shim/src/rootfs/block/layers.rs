//! What is packed for a container: the layers below what containerd would mount.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    super::{HostMount, RootfsError, failed},
    Identity,
};

/// A read-only view of the rootfs that containerd asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// The view.
    pub source: Source,
    /// Names the layers if they never change, so that they need not be packed again. The lower
    /// directories of an overlay are committed snapshots, which is containerd's promise; of a bind
    /// mount's source nobody promises anything.
    pub identity: Option<Identity>,
    /// Whether the container may write to its rootfs.
    pub writable: bool,
}

/// What the packer mounts to see the layers as one tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Directories, the uppermost first.
    Overlay {
        /// As in `lowerdir`.
        dirs: Vec<PathBuf>,
        /// Further options of overlayfs.
        options: Vec<String>,
    },
    /// One directory.
    Bind {
        /// The directory.
        dir: PathBuf,
        /// Whether what is mounted below it belongs to it.
        recursive: bool,
    },
}

/// Options of overlayfs that say how layers are read; the others concern the upper directory.
const READING: [&str; 4] = ["userxattr", "redirect_dir", "metacopy", "xino"];

impl Layers {
    /// The layers of `mounts`, which make a rootfs. Looks at the directories, changes nothing.
    pub(in crate::rootfs) fn of(mounts: &[HostMount]) -> Result<Layers, RootfsError> {
        let [mount] = mounts else {
            return Err(RootfsError::Unsupported {
                what: format!("packing a rootfs of {} mounts into a disk", mounts.len()),
                hint: "use a snapshotter that gives one mount, overlayfs for example, or cube.rootfs.mode=share",
            });
        };
        let read_only = mount.options.iter().any(|option| option == "ro" || option == "rro");
        if mount.is_bind() {
            let recursive = mount.fs_type == "rbind" || mount.options.iter().any(|option| option == "rbind");
            let source = Source::Bind { dir: mount.source.clone().into(), recursive };
            return Ok(Layers { source, identity: None, writable: !read_only });
        }
        if mount.fs_type != "overlay" {
            return Err(RootfsError::Unsupported {
                what: format!("packing a rootfs of type {:?} into a disk", mount.fs_type),
                hint: "use a snapshotter that gives overlay or bind mounts, or cube.rootfs.mode=share",
            });
        }
        overlay(mount, read_only)
    }
}

fn overlay(mount: &HostMount, read_only: bool) -> Result<Layers, RootfsError> {
    let value = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let refused = |option: &str, reason| RootfsError::Option {
        option: option.into(),
        source_path: mount.source.clone(),
        reason,
    };
    let lower = value("lowerdir=").ok_or_else(|| refused("", "an overlay needs lowerdir="))?;
    if lower.contains('\\') || lower.split(':').any(str::is_empty) {
        return Err(refused(lower, "directories with a colon or backslash in their names cannot be packed"));
    }
    let mut dirs: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
    let reads = |option: &&String| READING.contains(&option.split('=').next().unwrap_or_default());
    let options: Vec<String> = mount.options.iter().filter(reads).cloned().collect();
    let Some(upper) = value("upperdir=").map(Path::new) else {
        let identity = Some(Identity::of(&dirs, &options)?);
        return Ok(Layers { source: Source::Overlay { dirs, options }, identity, writable: false });
    };
    // What ran in this snapshot before, without a disk of its own, has left something there.
    let used = fs::read_dir(upper).map_err(failed("cannot read", upper))?.next().is_some();
    let identity = if used { None } else { Some(Identity::of(&dirs, &options)?) };
    if used {
        dirs.insert(0, upper.into());
    }
    Ok(Layers { source: Source::Overlay { dirs, options }, identity, writable: !read_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fs_type: &str, source: &str, options: &[String]) -> HostMount {
        HostMount { fs_type: fs_type.into(), source: source.into(), options: options.to_vec() }
    }

    fn overlay_in(dir: &Path) -> HostMount {
        for name in ["1", "2", "upper", "work"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        let dir = dir.display();
        let options = [
            "index=off".into(),
            format!("lowerdir={dir}/2:{dir}/1"),
            format!("upperdir={dir}/upper"),
            format!("workdir={dir}/work"),
        ];
        mount("overlay", "overlay", &options)
    }

    #[test]
    fn containers_of_an_image_have_the_same_layers() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::of(&[overlay_in(dir.path())]).unwrap();
        assert!(layers.writable && layers.identity.is_some());
        let dirs = vec![dir.path().join("2"), dir.path().join("1")];
        assert_eq!(layers.source, Source::Overlay { dirs, options: vec![] });
        let mut other = overlay_in(dir.path());
        fs::create_dir(dir.path().join("upper-2")).unwrap();
        other.options[2] = format!("upperdir={}/upper-2", dir.path().display());
        assert_eq!(Layers::of(&[other]).unwrap(), layers);
    }

    #[test]
    fn what_was_written_before_is_packed_for_this_sandbox_only() {
        let dir = tempfile::tempdir().unwrap();
        let mount = overlay_in(dir.path());
        fs::write(dir.path().join("upper/written"), "").unwrap();
        let layers = Layers::of(&[mount]).unwrap();
        assert_eq!(layers.identity, None);
        assert!(matches!(layers.source, Source::Overlay { dirs, .. } if dirs[0] == dir.path().join("upper")));
    }

    #[test]
    fn a_bind_mount_is_packed_for_this_sandbox_only() {
        for (option, writable) in [("rw", true), ("ro", false)] {
            let layers = Layers::of(&[mount("bind", "/dir", &["rbind".into(), option.into()])]).unwrap();
            assert_eq!(layers.source, Source::Bind { dir: "/dir".into(), recursive: true });
            assert_eq!((layers.identity, layers.writable), (None, writable));
        }
    }

    #[test]
    fn an_overlay_without_an_upper_directory_is_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = overlay_in(dir.path());
        mount.options.retain(|option| option.starts_with("lowerdir="));
        let layers = Layers::of(&[mount]).unwrap();
        assert!(!layers.writable && layers.identity.is_some());
    }

    #[test]
    fn what_cannot_be_packed_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let good = || overlay_in(dir.path());
        let escaped = mount("overlay", "overlay", &["lowerdir=/a\\:b".into()]);
        for (mounts, named) in [
            (vec![good(), good()], "2 mounts"),
            (vec![mount("tmpfs", "tmpfs", &[])], "tmpfs"),
            (vec![mount("overlay", "overlay", &[])], "lowerdir"),
            (vec![escaped], "a\\\\:b"),
        ] {
            let error = Layers::of(&mounts).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
