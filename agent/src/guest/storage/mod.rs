//! File systems that the host asks for: root file systems of containers, and shared directories.

mod device;
mod layered;

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use self::layered::Layered;
use super::paths;

/// A mount as containerd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// "bind", or a file system that the guest's kernel knows.
    pub fs_type: String,
    /// A path or tag, or `serial:<virtio-blk serial>`.
    pub source: String,
    /// As mount(8) has them.
    pub options: Vec<String>,
}

/// Why a file system cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A container without a root.
    #[error("the request names no rootfs mount: at least one is needed")]
    NoMount,
    /// No disk has the serial.
    #[error("no disk with serial {serial:?} appeared within {:?}", device::LIMIT)]
    NoDevice {
        /// What the host named.
        serial: String,
    },
    /// A bind mount with an option that is none of mount(2)'s flags.
    #[error("option {option:?} is not supported on a bind mount")]
    Option {
        /// The option.
        option: String,
    },
    /// A shared mount outside of the directory for them.
    #[error("a shared mount must be below {}, not on {target:?}", paths::CUBE)]
    Target {
        /// What the host named.
        target: PathBuf,
    },
    /// mount(2) failed.
    #[error("cannot mount {fs_type} {source_path:?} on {target}")]
    Mount {
        /// File system type.
        fs_type: String,
        /// Its source.
        source_path: String,
        /// Mount point.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another operation on the file system failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a file operation fails with.
pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError::Io { action, path, source }
}

impl Mount {
    /// Mounts it on the existing directory `target`. Blocks for as long as the file system does.
    pub fn apply(&self, target: &Path) -> Result<(), StorageError> {
        self.apply_from(&device::resolve(&self.source)?, target)
    }

    /// [`Mount::apply`] with another source than its own.
    pub fn apply_from(&self, source: &Path, target: &Path) -> Result<(), StorageError> {
        let (flags, data) = flags_and_data(&self.options);
        let failed = |errno: Errno| StorageError::Mount {
            fs_type: self.fs_type.clone(),
            source_path: self.source.clone(),
            target: target.to_owned(),
            source: errno.into(),
        };
        if self.fs_type != "bind" && !flags.contains(MsFlags::MS_BIND) {
            let fs_type = Some(self.fs_type.as_str());
            return mount(Some(source), target, fs_type, flags, Some(data.join(",").as_str()))
                .map_err(failed);
        }
        if let Some(option) = data.first() {
            return Err(StorageError::Option { option: (*option).to_owned() });
        }
        let bind = MsFlags::MS_BIND | (flags & MsFlags::MS_REC);
        let none = None::<&str>;
        mount(Some(source), target, none, bind, none).map_err(failed)?;
        // mount(2): the flags of a new bind mount are those of its source; a remount changes them.
        let wanted = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
        if wanted.is_empty() {
            return Ok(());
        }
        mount(none, target, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | wanted, none).map_err(|errno| {
            // Best effort: the error that matters is reported.
            let _ = umount2(target, MntFlags::MNT_DETACH);
            failed(errno)
        })
    }
}

fn flags_and_data(options: &[String]) -> (MsFlags, Vec<&str>) {
    let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
    for option in options {
        match option.as_str() {
            "" | "defaults" | "rw" | "suid" | "dev" | "exec" | "async" => {}
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, data)
}

/// A directory of its own for a container, with the root file system mounted in it. Dropping it
/// detaches the mounts and removes the directory.
#[derive(Debug)]
pub struct Rootfs {
    directory: PathBuf,
    /// Mounts on the root itself.
    mounted: usize,
    /// What an overlay of disks is made of.
    layers: Vec<Layered>,
}

impl Rootfs {
    /// Makes `directory` and does `mounts`, in order, on `directory/rootfs`. An overlay whose
    /// `lowerdir` and `upperdir` are `serial:<virtio-blk serial>` is one of an erofs and an ext4 disk.
    /// Blocks.
    pub fn mount(directory: PathBuf, mounts: &[Mount]) -> Result<Rootfs, StorageError> {
        if mounts.is_empty() {
            return Err(StorageError::NoMount);
        }
        let mut rootfs = Rootfs { directory, mounted: 0, layers: Vec::new() };
        let path = rootfs.path();
        fs::create_dir_all(&path).map_err(failed("cannot create", &path))?;
        for mount in mounts {
            match layered::disks(mount) {
                Some(disks) => {
                    // Kept before it is used, for the clean-up after an error.
                    rootfs.layers.push(Layered::new(&rootfs.directory));
                    if let Some(layers) = rootfs.layers.last_mut() {
                        layers.mount(disks)?.apply(&path)?;
                    }
                }
                None => mount.apply(&path)?,
            }
            rootfs.mounted += 1;
        }
        Ok(rootfs)
    }

    /// Where the container's root is.
    pub fn path(&self) -> PathBuf {
        self.directory.join(paths::ROOTFS)
    }

    /// Unmounts, which writes out what a disk has not got yet, and removes the directory. Blocks.
    /// No process of the container may be left. Can be repeated after an error.
    pub fn unmount(&mut self) -> Result<(), StorageError> {
        let path = self.path();
        while self.mounted > 0 {
            match umount2(&path, MntFlags::empty()) {
                // EINVAL: not a mount point any more.
                Ok(()) | Err(Errno::EINVAL) => self.mounted -= 1,
                Err(errno) => {
                    return Err(StorageError::Io { action: "cannot unmount", path, source: errno.into() });
                }
            }
        }
        for layers in &mut self.layers {
            layers.unmount()?;
        }
        for directory in [&path, &self.directory] {
            match fs::remove_dir(directory) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    let path = directory.clone();
                    return Err(StorageError::Io { action: "cannot remove", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        let path = self.path();
        for _ in 0..self.mounted {
            if let Err(errno) = umount2(&path, MntFlags::MNT_DETACH) {
                tracing::warn!(path = %path.display(), "cannot unmount: {}", errno.desc());
            }
        }
        self.layers.clear();
        // Gone already after unmount(); never recursive, for what is inside is not ours.
        let _ = fs::remove_dir(&path);
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Whether the host may mount something on `target`: a plain path below /run/cube, but not on what
/// the agent keeps there.
pub fn check_shared_target(target: &Path) -> Result<(), StorageError> {
    let plain = target.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let inside = target.strip_prefix(paths::CUBE).is_ok_and(|below| !below.as_os_str().is_empty());
    if plain && inside && !target.starts_with(paths::CONTAINERS) {
        Ok(())
    } else {
        Err(StorageError::Target { target: target.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| word.to_string()).collect()
    }

    #[test]
    fn options_that_are_no_flags_go_to_the_file_system() {
        let options = strings(&["rbind", "ro", "nosuid", "lowerdir=/a:/b", "rw"]);
        let (flags, data) = flags_and_data(&options);
        assert_eq!(flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(data, ["lowerdir=/a:/b"]);
    }

    #[test]
    fn shared_mounts_stay_in_their_directory() {
        for good in ["/run/cube/shared", "/run/cube/a/b"] {
            check_shared_target(Path::new(good)).unwrap();
        }
        for bad in [
            "/run/cube",
            "/run/cube/",
            "/etc",
            "run/cube/shared",
            "/run/cube/../etc",
            "/run/cube/containers",
            "/run/cube/containers/a/rootfs",
            "",
        ] {
            check_shared_target(Path::new(bad)).unwrap_err();
        }
    }

    #[test]
    fn a_rootfs_that_cannot_be_mounted_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("c1");
        let missing = Mount { fs_type: "bind".into(), source: "/nonexistent".into(), options: vec![] };
        let error = Rootfs::mount(directory.clone(), &[missing]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
        assert!(!directory.exists());
        assert!(matches!(Rootfs::mount(directory, &[]), Err(StorageError::NoMount)));
    }
}
