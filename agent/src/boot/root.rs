//! From the initial ramfs to a root that containers can pivot away from.
//!
//! The kernel unpacks the initramfs into *rootfs*, which cannot be moved or unmounted: pivot_root(2)
//! answers EINVAL while the root of the mount namespace is rootfs, and so in every container's
//! namespace, which is a copy. So the agent does once what switch_root(8) does: it puts a tmpfs over
//! rootfs, chroots into it, and empties rootfs, whose contents would take guest memory for ever.
//! It copies itself there and executes the copy, so that /proc/1/exe has a path. What remains is one
//! copy of the binary.

use std::{
    convert::Infallible,
    ffi::CString,
    fs,
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::Path,
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{AtFlags, OFlag},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{FileStat, Mode, fstat, fstatat},
    unistd::{UnlinkatFlags, chdir, chroot, execv, unlinkat},
};

use super::{BootError, mounts};

const NEW_ROOT: &str = "/newroot";
const AGENT: &str = "/sbin/cube-agent";

/// Whether `/` is rootfs. Needs /proc.
pub(super) fn is_rootfs() -> Result<bool, BootError> {
    const PATH: &str = "/proc/self/mountinfo";
    let table = fs::read_to_string(PATH).map_err(BootError::io("cannot read", PATH))?;
    Ok(root_type(&table) == Some("rootfs"))
}

/// Type of the topmost mount on `/` in a mountinfo table, see proc_pid_mountinfo(5).
fn root_type(table: &str) -> Option<&str> {
    let on_root = |line: &&str| line.split(' ').nth(4) == Some("/");
    let last = table.lines().filter(on_root).next_back()?;
    last.split_once(" - ")?.1.split(' ').next()
}

/// Moves to a tmpfs and executes the agent anew. Undoes [`mounts::early`].
pub(super) fn switch() -> Result<Infallible, BootError> {
    let new_root = Path::new(NEW_ROOT);
    fs::create_dir_all(new_root).map_err(BootError::io("cannot create", NEW_ROOT))?;
    mount(Some("tmpfs"), new_root, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .map_err(BootError::sys("cannot mount a file system on", NEW_ROOT))?;

    let copy = new_root.join(AGENT.trim_start_matches('/'));
    fs::create_dir_all(new_root.join("sbin")).map_err(BootError::io("cannot create", "/sbin"))?;
    fs::copy("/proc/self/exe", &copy).map_err(BootError::io("cannot copy the agent to", &copy))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))
        .map_err(BootError::io("cannot change the mode of", &copy))?;

    for target in mounts::EARLY.iter().rev() {
        umount2(*target, MntFlags::MNT_DETACH).map_err(BootError::sys("cannot unmount", target))?;
    }
    let old_root = Dir::open("/", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(BootError::sys("cannot open", "/"))?;
    empty(old_root).map_err(BootError::sys("cannot empty", "/"))?;

    chdir(new_root).map_err(BootError::sys("cannot enter", NEW_ROOT))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(BootError::sys("cannot move the new root to", "/"))?;
    chroot(".").map_err(BootError::sys("cannot chroot to", NEW_ROOT))?;
    chdir("/").map_err(BootError::sys("cannot enter", "/"))?;

    let agent = CString::from_vec_with_nul(format!("{AGENT}\0").into_bytes()).unwrap_or_default();
    execv(&agent, &[&agent]).map_err(BootError::sys("cannot execute", AGENT))
}

/// Removes everything below `dir` that is on the same file system.
fn empty(mut dir: Dir) -> nix::Result<()> {
    let device = fstat(dir.as_fd())?.st_dev;
    let entries = dir.iter().collect::<nix::Result<Vec<_>>>()?;
    for entry in entries {
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat: FileStat = fstatat(dir.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if stat.st_dev != device {
            continue;
        }
        let is_directory = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => stat.st_mode & libc::S_IFMT == libc::S_IFDIR,
        };
        let flag = if is_directory {
            let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            empty(Dir::openat(dir.as_fd(), name, flags, Mode::empty())?)?;
            UnlinkatFlags::RemoveDir
        } else {
            UnlinkatFlags::NoRemoveDir
        };
        match unlinkat(dir.as_fd(), name, flag) {
            // The directory that a file system is mounted on.
            Ok(()) | Err(Errno::EBUSY | Errno::ENOTEMPTY) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rootfs_is_told_from_a_file_system_mounted_over_it() {
        let rootfs =
            "1 1 0:2 / / rw shared:1 - rootfs rootfs rw,size=1k\n22 1 0:20 / /proc rw - proc proc rw\n";
        assert_eq!(root_type(rootfs), Some("rootfs"));
        let switched = format!("{rootfs}30 1 0:30 / / rw - tmpfs tmpfs rw\n");
        assert_eq!(root_type(&switched), Some("tmpfs"));
        assert_eq!(root_type(""), None);
    }

    #[test]
    fn emptying_removes_nested_directories_and_links_but_not_what_they_point_to() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).unwrap();
        empty(Dir::open(dir.path(), OFlag::O_DIRECTORY, Mode::empty()).unwrap()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(outside.path().join("kept").exists());
    }
}
