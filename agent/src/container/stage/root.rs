//! Files of the container, resolved as the container would resolve them.
//!
//! A root file system is hostile: any of its components may be a symbolic link to the guest's own files.
//! Every path is therefore resolved by openat2(2) with the rootfs as root, and used through the
//! descriptor that this gives.

use std::{
    ffi::OsStr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat},
};

/// Symbolic links that are followed to make a path, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// What a path is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
}

/// The root directory of a container.
#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Opens the root at a path of the guest.
    pub(super) fn open(path: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { fd: nix::fcntl::open(path, flags, Mode::empty())? })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens a path of the container.
    pub(super) fn open_at(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlag::empty())
    }

    /// A descriptor (`O_PATH`) of what is at `path`.
    pub(super) fn locate(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open_at(path, OFlag::O_PATH)
    }

    /// The same, failing with `ELOOP` if there is a symbolic link on the way.
    pub(super) fn locate_without_links(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.resolve(path, OFlag::O_PATH, ResolveFlag::RESOLVE_NO_SYMLINKS)
    }

    fn resolve(&self, path: &Path, flags: OFlag, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
        let resolve = resolve | ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        // An empty path would be ENOENT.
        let path = if path.as_os_str().is_empty() { Path::new("/") } else { path };
        loop {
            // EAGAIN: something was renamed meanwhile and the kernel could not tell that it stayed inside.
            match openat2(&self.fd, path, how) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// Makes the directory and those above it that are missing, and gives an `O_PATH` descriptor of it.
    pub(super) fn ensure_directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.ensure(path, Kind::Directory)
    }

    /// Makes a directory or an empty file, unless something is there, and the directories above it.
    pub(super) fn ensure(&self, path: &Path, kind: Kind) -> nix::Result<OwnedFd> {
        let fd = self.ensure_through(path, kind, MAX_LINKS)?;
        let is_directory = file_type(&fd)? == SFlag::S_IFDIR;
        match kind {
            Kind::Directory if !is_directory => Err(Errno::ENOTDIR),
            Kind::File if is_directory => Err(Errno::EISDIR),
            _ => Ok(fd),
        }
    }

    fn ensure_through(&self, path: &Path, kind: Kind, links: usize) -> nix::Result<OwnedFd> {
        match self.locate(path) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::ENOENT);
        };
        let parent = self.ensure_through(above, Kind::Directory, links)?;
        match make(parent.as_fd(), name, kind) {
            Ok(()) => self.locate(path),
            // It exists, and yet it was not found: a symbolic link to what does not exist.
            Err(Errno::EEXIST) if links > 0 => {
                let target = PathBuf::from(readlinkat(&parent, name)?);
                self.ensure_through(&above.join(target), kind, links - 1)
            }
            Err(Errno::EEXIST) => Err(Errno::ELOOP),
            Err(errno) => Err(errno),
        }
    }
}

fn make(parent: BorrowedFd<'_>, name: &OsStr, kind: Kind) -> nix::Result<()> {
    match kind {
        Kind::Directory => mkdirat(parent, name, Mode::from_bits_truncate(0o755)),
        Kind::File => mknodat(parent, name, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0),
    }
}

/// The type bits of a file's mode.
pub(super) fn file_type(fd: &OwnedFd) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode & SFlag::S_IFMT.bits()))
}

/// A name for what a descriptor refers to, for calls that take a path. It needs the guest's /proc, so it
/// works only before pivot_root.
pub(super) fn proc_path(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Splits a path of the container into its directory and its last component.
pub(super) fn split(path: &Path) -> nix::Result<(&Path, &OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !name.as_bytes().is_empty() => Ok((parent, name)),
        _ => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        (directory, root)
    }

    #[test]
    fn missing_directories_are_made() {
        let (directory, root) = root();
        root.ensure("/a/b/file".as_ref(), Kind::File).unwrap();
        assert!(directory.path().join("a/b/file").is_file());
        assert_eq!(root.ensure("/a/b/file".as_ref(), Kind::Directory).unwrap_err(), Errno::ENOTDIR);
    }

    #[test]
    fn an_absolute_link_stays_inside() {
        let (directory, root) = root();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), directory.path().join("link")).unwrap();
        root.ensure_directory("/link/made".as_ref()).unwrap();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(directory.path().join(outside.path().strip_prefix("/").unwrap()).join("made").is_dir());
    }

    #[test]
    fn a_link_that_climbs_stays_inside() {
        let (directory, root) = root();
        fs::create_dir(directory.path().join("a")).unwrap();
        symlink("../../../../../../../../up", directory.path().join("a/link")).unwrap();
        root.ensure_directory("/a/link/made".as_ref()).unwrap();
        assert!(directory.path().join("up/made").is_dir());
    }

    #[test]
    fn links_that_go_in_circles_end_in_an_error() {
        let (directory, root) = root();
        symlink("/two", directory.path().join("one")).unwrap();
        symlink("/one", directory.path().join("two")).unwrap();
        assert_eq!(root.ensure_directory("/one".as_ref()).unwrap_err(), Errno::ELOOP);
    }
}
