//! Bind mounts that are finished before anybody sees them.
//!
//! What is mounted in the share propagates to virtiofsd at once, but a change of attributes does
//! not: with mount(2), which needs a second call for `ro`, virtiofsd would keep a writable mount.
//! So the mount is made detached, changed, and only then attached: open_tree(2), mount_setattr(2),
//! move_mount(2); Linux 5.12 or later.

use std::{
    ffi::{CStr, CString},
    io, mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

// From linux/mount.h.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

/// What a bind mount is like.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Bind {
    /// With what is mounted below the source.
    pub(super) recursive: bool,
    /// `MOUNT_ATTR_*` of the mount.
    pub(super) attributes: u64,
    /// `MOUNT_ATTR_*` of the mount and of all below it.
    pub(super) recursive_attributes: u64,
    /// Whether what the host mounts below the source later appears, too.
    pub(super) follow_host: bool,
}

impl Bind {
    /// Makes `source` visible at `target`, a mount point that exists.
    ///
    /// Never a peer of the source: unmounting what is below a peer would unmount it at the source.
    pub(super) fn attach(self, source: &Path, target: &Path) -> io::Result<()> {
        let recursive = if self.recursive { libc::AT_RECURSIVE } else { 0 };
        let tree = open_tree(source, recursive)?;
        let propagation = if self.follow_host { libc::MS_SLAVE } else { libc::MS_PRIVATE };
        set(&tree, self.attributes, 0, 0)?;
        set(&tree, self.recursive_attributes, propagation, recursive)?;
        let target = path(target)?;
        // SAFETY: both paths end with a zero and outlive the call; the descriptor is open.
        check(unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        })?;
        Ok(())
    }
}

fn open_tree(source: &Path, recursive: libc::c_int) -> io::Result<OwnedFd> {
    let source = path(source)?;
    let flags = OPEN_TREE_CLONE | (libc::O_CLOEXEC | recursive) as libc::c_uint;
    // SAFETY: the path ends with a zero and outlives the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn set(
    tree: &OwnedFd,
    attributes: u64,
    propagation: libc::c_ulong,
    recursive: libc::c_int,
) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
    const NO_PATH: &CStr = c"";
    // SAFETY: the path ends with a zero, `attr` has the size that is given, and both outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            NO_PATH.as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attr,
            mem::size_of_val(&attr),
        )
    })?;
    Ok(())
}

fn path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
