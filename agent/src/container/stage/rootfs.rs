//! The rootfs becomes `/`.

use std::{
    fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{chdir, chroot, fchdir, pivot_root},
};
use oci_spec::runtime::Spec;

use super::{Failure, Result, Step, mounts::set_attributes, root::Root};
use crate::container::{mount_options::Attributes, spec};

const NONE: Option<&str> = None;
const MOUNTS: &str = "/proc/self/mountinfo";

/// Detaches the mounts of this namespace from the guest's, and makes the rootfs a mount of its own.
pub(super) fn prepare(rootfs: &Path, spec: &Spec) -> Result<Root> {
    let shared = propagation(spec)?.is_some_and(|flags| flags.contains(MsFlags::MS_SHARED));
    // Slaves still see what the guest mounts later, as `rslave` volumes expect; peers are also seen by
    // the guest, which only a container with `rootfsPropagation: shared` may ask for.
    let kind = if shared { MsFlags::MS_SHARED } else { MsFlags::MS_SLAVE };
    mount(NONE, "/", NONE, kind | MsFlags::MS_REC, NONE)
        .step(|| format!("set the propagation of / to {kind:?}"))?;

    leave_initramfs()?;

    let action = || format!("use {} as the rootfs", rootfs.display());
    let rootfs = fs::canonicalize(rootfs).step(action)?;
    // pivot_root(2) refuses shared parents, and the bind mount below must not propagate to the guest.
    let parent = mount_point_of(&rootfs)?;
    mount(NONE, &parent, NONE, MsFlags::MS_PRIVATE, NONE)
        .step(|| format!("make {} private", parent.display()))?;
    mount(Some(&rootfs), &rootfs, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).step(action)?;
    Root::open(&rootfs).step(action)
}

/// pivot_root(2) refuses to replace the initial ramfs, which is what a guest without a root disk runs in.
/// A copy of all its mounts, mounted on top, is a root like any other.
fn leave_initramfs() -> Result<()> {
    if root_type()? != "rootfs" {
        return Ok(());
    }
    let action = || "mount a copy of the initial ramfs over it".to_owned();
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: the path is a living C string.
    let copy = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, c"/".as_ptr(), flags) };
    let copy = Errno::result(copy).step(action)?;
    // SAFETY: open_tree has just made this descriptor.
    let copy = unsafe { OwnedFd::from_raw_fd(copy as RawFd) };
    // SAFETY: the paths are living C strings, and the descriptor is open.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            copy.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    Errno::result(moved).step(action)?;
    fchdir(&copy).and_then(|()| chroot(".")).step(action)
}

/// The file system type of `/`.
fn root_type() -> Result<String> {
    let table = fs::read_to_string(MOUNTS).step(|| format!("read {MOUNTS}"))?;
    // Fields: id, parent, device, root, mount point, options, tags …, "-", type, source, options.
    let mut roots = table.lines().filter(|line| line.split(' ').nth(4) == Some("/"));
    let fs_type = roots.next_back().and_then(|line| line.split_once(" - ")?.1.split(' ').next());
    Ok(fs_type.unwrap_or_default().to_owned())
}

fn propagation(spec: &Spec) -> Result<Option<MsFlags>> {
    let Some(linux) = spec.linux() else { return Ok(None) };
    // The agent has checked it.
    spec::propagation(linux).map_err(|error| Failure { action: error.to_string(), errno: Errno::EINVAL })
}

/// The mount point that a canonical path lies on.
fn mount_point_of(path: &Path) -> Result<PathBuf> {
    let table = fs::read_to_string(MOUNTS).step(|| format!("read {MOUNTS}"))?;
    let mount_points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let longest =
        mount_points.filter(|point| path.starts_with(point)).max_by_key(|point| point.as_os_str().len());
    Ok(longest.unwrap_or_else(|| PathBuf::from("/")))
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let plain =
        field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    PathBuf::from(plain)
}

/// Makes the rootfs `/`, and the guest's tree unreachable.
pub(super) fn pivot(root: &Root, spec: &Spec) -> Result<()> {
    fchdir(root.fd()).step(|| "enter the rootfs".into())?;
    // With both arguments the same directory, the old root ends up mounted over the new one, and no
    // directory is needed for it in a rootfs that may be read-only.
    pivot_root(".", ".").step(|| "pivot_root into the rootfs".into())?;
    // Slave first: the unmounts must not propagate to the guest.
    mount(NONE, ".", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)
        .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
        .step(|| "detach the guest's root".into())?;
    chdir("/").step(|| "enter the new root".into())?;

    if let Some(flags) = propagation(spec)? {
        mount(NONE, "/", NONE, flags, NONE).step(|| "set linux.rootfsPropagation".into())?;
    }
    if spec.root().as_ref().is_some_and(|root| root.readonly().unwrap_or(false)) {
        let root = Root::open("/".as_ref()).step(|| "open the new root".into())?;
        let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        set_attributes(root.fd(), read_only, false).step(|| "make the rootfs read-only".into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_mount_points_are_understood() {
        assert_eq!(unescape("/a\\040b\\134c"), Path::new("/a b\\c"));
    }

    #[test]
    fn the_root_is_on_a_mount_point() {
        assert_eq!(mount_point_of(Path::new("/nowhere-at-all")).unwrap(), Path::new("/"));
    }
}
