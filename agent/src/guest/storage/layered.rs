//! A root file system of two disks: packed layers, read-only, below one that takes what is written.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

use super::{Mount, StorageError, device::SERIAL, failed};

/// The disks of an overlay, as the host names them: `serial:<virtio-blk serial>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disks<'a> {
    lower: &'a str,
    upper: &'a str,
}

/// The disks that `mount` overlays, if that is what it is.
pub(super) fn disks(mount: &Mount) -> Option<Disks<'_>> {
    let value = |name| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let (lower, upper) = (value("lowerdir=")?, value("upperdir=")?);
    let named = mount.fs_type == "overlay" && lower.starts_with(SERIAL) && upper.starts_with(SERIAL);
    named.then_some(Disks { lower, upper })
}

/// The two disks mounted beside a container's root. Dropping it detaches them.
#[derive(Debug)]
pub(super) struct Layered {
    lower: PathBuf,
    disk: PathBuf,
    /// Mount points, in the order of mounting.
    mounted: Vec<PathBuf>,
}

impl Layered {
    /// In the container's `directory`; mounts nothing.
    pub(super) fn new(directory: &Path) -> Layered {
        Layered { lower: directory.join("lower"), disk: directory.join("disk"), mounted: Vec::new() }
    }

    /// Mounts the disks. Gives the overlay of both, which is for the caller to mount.
    pub(super) fn mount(&mut self, disks: Disks<'_>) -> Result<Mount, StorageError> {
        self.mount_disk("erofs", disks.lower, &["ro"], self.lower.clone())?;
        // The host made the file system a moment ago in a sparse file; the thread that would zero its
        // inode tables would only fill the holes.
        self.mount_disk("ext4", disks.upper, &["noinit_itable"], self.disk.clone())?;
        let (upper, work) = (self.disk.join("upper"), self.disk.join("work"));
        for directory in [&upper, &work] {
            fs::create_dir_all(directory).map_err(failed("cannot create", directory))?;
        }
        // The root directory of an overlay has the owner and mode of the upper one.
        let copied = fs::metadata(&self.lower).and_then(|meta| {
            chown(&upper, Some(meta.uid()), Some(meta.gid()))?;
            fs::set_permissions(&upper, fs::Permissions::from_mode(meta.mode() & 0o7777))
        });
        copied.map_err(failed("cannot change the owner and mode of", &upper))?;
        let option = |name, path: &Path| format!("{name}={}", path.display());
        Ok(Mount {
            fs_type: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                option("lowerdir", &self.lower),
                option("upperdir", &upper),
                option("workdir", &work),
            ],
        })
    }

    fn mount_disk(
        &mut self,
        fs_type: &str,
        source: &str,
        options: &[&str],
        target: PathBuf,
    ) -> Result<(), StorageError> {
        fs::create_dir_all(&target).map_err(failed("cannot create", &target))?;
        let options = options.iter().map(ToString::to_string).collect();
        Mount { fs_type: fs_type.into(), source: source.into(), options }.apply(&target)?;
        self.mounted.push(target);
        Ok(())
    }

    /// Unmounts the disks and removes their mount points. The overlay must be unmounted. Can be
    /// repeated after an error.
    pub(super) fn unmount(&mut self) -> Result<(), StorageError> {
        while let Some(target) = self.mounted.last() {
            match umount2(target, MntFlags::empty()) {
                // EINVAL: not a mount point any more.
                Ok(()) | Err(Errno::EINVAL) => drop(self.mounted.pop()),
                Err(errno) => return Err(failed("cannot unmount", target)(errno.into())),
            }
        }
        for directory in [&self.disk, &self.lower] {
            match fs::remove_dir(directory) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("cannot remove", directory)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Layered {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            if let Err(errno) = umount2(target, MntFlags::MNT_DETACH) {
                tracing::warn!(path = %target.display(), "cannot unmount: {}", errno.desc());
            }
        }
        // Gone already after unmount(); never recursive, for what is inside is not ours.
        let _ = fs::remove_dir(&self.disk);
        let _ = fs::remove_dir(&self.lower);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_of_disks_is_told_from_one_of_directories() {
        let overlay = |fs_type: &str, lower: &str, upper: &str| Mount {
            fs_type: fs_type.into(),
            source: "overlay".into(),
            options: vec![format!("lowerdir={lower}"), format!("upperdir={upper}")],
        };
        let found = overlay("overlay", "serial:a", "serial:b");
        assert_eq!(disks(&found), Some(Disks { lower: "serial:a", upper: "serial:b" }));
        for other in [overlay("overlay", "/a", "/b"), overlay("ext4", "serial:a", "serial:b")] {
            assert_eq!(disks(&other), None);
        }
    }
}
