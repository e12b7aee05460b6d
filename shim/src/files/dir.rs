//! A directory that is open, so that what is done below it happens there and nowhere else.
//!
//! Paths are text: what they lead to changes with every link, mount and rename on the way, and
//! /proc/self/mountinfo has other text for the same place. So whoever removes or unmounts something opens the
//! directory that it is in, once, and goes on from there by single names: never through a link, a mount or `..`.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    dir,
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    mount::{MntFlags, umount2},
    sys::stat::{FileStat, Mode, SFlag, fstat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// A directory, and the path that it was reached by, for messages.
#[derive(Debug)]
pub(super) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

/// What a name in a directory leads to.
#[derive(Debug)]
pub(super) enum Entry {
    /// Nothing.
    Nothing,
    /// Something that is mounted there.
    Mount,
    /// A directory of the same mount.
    Directory(Dir),
    /// Something else of the same mount; a link is itself.
    File(FileStat),
}

impl Dir {
    /// The directory that `path` is in, and the name there; `None` if there is no such directory. Links on the
    /// way are followed, for an administrator chose the place; one at the end is not.
    pub(super) fn of(path: &Path) -> io::Result<Option<(Dir, &OsStr)>> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let (Some(parent), Some(name), true) = (path.parent(), path.file_name(), path.is_absolute()) else {
            return Err(invalid("not an absolute path that ends in a name"));
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match open(parent, flags, Mode::empty()) {
            Ok(fd) => Ok(Some((Dir { fd, path: parent.into() }, name))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The path of `name`, for messages.
    pub(super) fn path_of(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// What `name` is now. Nothing of what is mounted there is touched: it may be a server that does not answer.
    pub(super) fn look(&self, name: &OsStr) -> io::Result<Entry> {
        let opened = match self.open(name, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(Entry::Nothing),
            Err(Errno::EXDEV) => return Ok(Entry::Mount),
            Err(errno) => return Err(errno.into()),
        };
        let stat = fstat(&opened)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR {
            return Ok(Entry::File(stat));
        }
        // Of what was looked at, whatever has taken its name meanwhile.
        let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let fd = Dir { fd: opened, path: PathBuf::new() }.open(OsStr::new("."), how)?;
        Ok(Entry::Directory(Dir { fd, path: self.path_of(name) }))
    }

    fn open(&self, name: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_XDEV
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        openat2(&self.fd, name, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
    }

    /// The names in it.
    pub(super) fn names(&self) -> io::Result<Vec<CString>> {
        // A fresh description: a duplicate would share its read position with this one.
        let mut listed =
            dir::Dir::from_fd(self.open(OsStr::new("."), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?)?;
        let mut names = Vec::new();
        for entry in listed.iter() {
            let entry = entry?;
            if entry.file_name() != c"." && entry.file_name() != c".." {
                names.push(entry.file_name().to_owned());
            }
        }
        Ok(names)
    }

    /// unlinkat(2), which never acts on what a name is a mount point for.
    pub(super) fn unlink(&self, name: &OsStr, flag: UnlinkatFlags) -> nix::Result<()> {
        unlinkat(self.fd.as_fd(), name, flag)
    }

    /// Unmounts the topmost of what is mounted at `name`, with all below it. Lazily, for somebody may hold files
    /// of it open. Tells whether there was anything.
    pub(super) fn unmount(&self, name: &OsStr) -> io::Result<bool> {
        // umount2(2) takes no descriptor. The link leads to the directory itself, whatever its path is now.
        let mut path = format!("/proc/self/fd/{}/", self.fd.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.as_bytes());
        match umount2(OsStr::from_bytes(&path), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => Ok(true),
            // No mount point, or gone.
            Err(Errno::EINVAL | Errno::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// For names as [`Dir::names`] gives them.
pub(super) fn name(text: &CString) -> &OsStr {
    OsStr::from_bytes(text.to_bytes())
}
