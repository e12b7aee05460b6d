//! Writing out the guest's disks.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
};

use nix::unistd::syncfs;

use super::{
    paths,
    storage::{StorageError, failed},
};

/// Writes out every file system on a disk that is mounted for containers, syncfs(2). Blocks.
///
/// Not sync(2): it reports no error, and it reaches through virtiofs to the host's disks, which are
/// none of the guest's business and may take any time.
pub(super) fn sync() -> Result<(), StorageError> {
    const MOUNTS: &str = "/proc/self/mountinfo";
    let mounts = fs::read_to_string(MOUNTS).map_err(failed("cannot read", Path::new(MOUNTS)))?;
    for mount_point in on_disks(&mounts) {
        let directory = match File::open(&mount_point) {
            // Unmounted since.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            opened => opened.map_err(failed("cannot open", &mount_point))?,
        };
        syncfs(&directory).map_err(|errno| failed("cannot write out", &mount_point)(errno.into()))?;
    }
    Ok(())
}

/// A mount point of each file system below [`paths::CUBE`] that has a device of its own. File systems
/// without one have major number 0, proc_pid_mountinfo(5).
fn on_disks(mountinfo: &str) -> Vec<PathBuf> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let (Some(device), Some(mount_point)) = (fields.nth(2), fields.nth(1)) else { continue };
        let below = Path::new(mount_point).starts_with(paths::CUBE);
        if below && !device.starts_with("0:") && seen.insert(device) {
            found.push(PathBuf::from(mount_point));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_below_run_cube_is_written_out_once() {
        let mounts = "\
22 1 0:2 / / rw - rootfs rootfs rw
30 22 0:25 / /run/cube/shared rw - virtiofs cube rw
31 22 254:0 / /run/cube/containers/c1/rootfs rw shared:9 - ext4 /dev/vda rw
32 22 254:16 /a /run/cube/containers/c2/rootfs ro - erofs /dev/vdb ro
33 22 254:0 /b /run/cube/containers/c3/rootfs rw - ext4 /dev/vda rw
34 22 254:32 / /mnt rw - ext4 /dev/vdc rw
bad";
        let expected = ["/run/cube/containers/c1/rootfs", "/run/cube/containers/c2/rootfs"];
        assert_eq!(on_disks(mounts), expected.map(PathBuf::from));
    }
}
