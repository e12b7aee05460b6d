//! `tmpcopyup`: a tmpfs that begins with what it covers.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat, mkdirat, mknodat},
    unistd::{Gid, Uid, fchown, fchownat, symlinkat},
};

use super::root::proc_path;

/// The file systems are the container's, where names may be anything: nothing is followed.
const READ: OFlag = OFlag::O_RDONLY.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);

/// Copies what is in the directory `from` into the directory `to`, with modes and owners.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    for entry in fs::read_dir(proc_path(&from))? {
        let name = entry?.file_name();
        let found = fstatat(from, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        copy_one(from, to, &name, &found)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", name.display())))?;
    }
    Ok(())
}

fn copy_one(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &OsStr, found: &FileStat) -> io::Result<()> {
    let kind = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits());
    let (uid, gid) = (Some(Uid::from_raw(found.st_uid)), Some(Gid::from_raw(found.st_gid)));
    let private = Mode::S_IRWXU;
    let copied: OwnedFd = match kind {
        SFlag::S_IFDIR => {
            mkdirat(to, name, private)?;
            let below = openat(from, name, READ | OFlag::O_DIRECTORY, Mode::empty())?;
            let copied = openat(to, name, READ | OFlag::O_DIRECTORY, Mode::empty())?;
            copy(below.as_fd(), copied.as_fd())?;
            copied
        }
        SFlag::S_IFREG => {
            let mut source = File::from(openat(from, name, READ, Mode::empty())?);
            if !source.metadata()?.is_file() {
                // It was another thing a moment ago.
                return Err(Errno::ESTALE.into());
            }
            let write = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let mut target = File::from(openat(to, name, write, private)?);
            io::copy(&mut source, &mut target)?;
            target.into()
        }
        SFlag::S_IFLNK => {
            let target = readlinkat(from, name)?;
            symlinkat(target.as_os_str(), to, name)?;
            return Ok(fchownat(to, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?);
        }
        // Nobody else sees the file system yet: what was made is still there under its name.
        _ => {
            let mode = Mode::from_bits_truncate(found.st_mode & 0o7777);
            mknodat(to, name, kind, mode, found.st_rdev)?;
            return Ok(fchownat(to, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?);
        }
    };
    // In this order: a change of the owner takes the set-id bits away.
    fchown(&copied, uid, gid)?;
    Ok(fchmod(&copied, Mode::from_bits_truncate(found.st_mode & 0o7777))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    fn directory(path: &std::path::Path) -> File {
        File::open(path).unwrap()
    }

    #[test]
    fn a_tree_is_copied_with_modes_owners_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = from.path();
        fs::create_dir_all(source.join("a/b")).unwrap();
        fs::write(source.join("a/b/file"), "text").unwrap();
        fs::set_permissions(source.join("a/b/file"), fs::Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::chown(source.join("a/b/file"), Some(7), Some(8)).unwrap();
        fs::set_permissions(source.join("a/b/file"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(source.join("a"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/etc/shadow", source.join("link")).unwrap();
        nix::unistd::mkfifo(&source.join("fifo"), Mode::S_IRUSR).unwrap();

        copy(directory(source).as_fd(), directory(to.path()).as_fd()).unwrap();
        let copied = fs::metadata(to.path().join("a/b/file")).unwrap();
        assert_eq!((copied.mode() & 0o7777, copied.uid(), copied.gid()), (0o4755, 7, 8));
        assert_eq!(fs::read(to.path().join("a/b/file")).unwrap(), b"text");
        assert_eq!(fs::metadata(to.path().join("a")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(fs::read_link(to.path().join("link")).unwrap().as_os_str().as_bytes(), b"/etc/shadow");
        let fifo = fs::symlink_metadata(to.path().join("fifo")).unwrap();
        assert_eq!(fifo.mode() & libc::S_IFMT, libc::S_IFIFO);
    }
}
