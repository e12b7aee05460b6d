//! Opening files that somebody else may have tampered with.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::{Mode, SFlag, fstat, fstatat},
};

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A link where a file or directory of ours belongs. Nothing of ours makes links, so somebody
    /// else did.
    #[error("{path} is a symbolic link, and links in a log directory are not followed: find out who made it")]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// A directory, FIFO, socket or device where a file belongs.
    #[error("{path} is a {kind}, not a regular file: find out who made it")]
    NotRegular {
        /// The object.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A system call failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot read" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ReadError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        ReadError::Io { action, path: path.into(), source: source.into() }
    }

    /// Whether the file or directory does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A directory below which nothing is opened through a link, a mount or `..`.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens the directory at `path`, which an administrator chose: links in it are followed.
    pub fn open(path: &Path) -> Result<Dir, ReadError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty()).map_err(|e| ReadError::io("cannot open", path, e))?;
        Ok(Dir { fd, path: path.into() })
    }

    /// Opens the directory `name` in this one.
    pub fn open_dir(&self, name: &str) -> Result<Dir, ReadError> {
        let fd = self.open_beneath(name, OFlag::O_DIRECTORY)?;
        Ok(Dir { fd, path: self.path.join(name) })
    }

    /// Opens the regular file `name` in this directory for reading.
    pub fn open_file(&self, name: &str) -> Result<File, ReadError> {
        // O_NONBLOCK: a FIFO that somebody planted must be refused, not waited for.
        let file = File::from(self.open_beneath(name, OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?);
        let path = self.path.join(name);
        let metadata = file.metadata().map_err(|e| ReadError::io("cannot examine", &path, e))?;
        let kind = metadata.file_type();
        if kind.is_file() {
            return Ok(file);
        }
        let kind = match () {
            () if kind.is_dir() => "directory",
            () if kind.is_fifo() => "FIFO",
            () => "device",
        };
        Err(ReadError::NotRegular { path, kind })
    }

    /// Names of what the directory holds now, in no order; names that are not UTF-8 are left out, as
    /// nothing of ours has one.
    pub fn names(&self) -> Result<Vec<String>, ReadError> {
        let failed = |e| ReadError::io("cannot list", &self.path, e);
        // A fresh description: a duplicate would share its read position with this one.
        let fd = self.open_beneath(".", OFlag::O_DIRECTORY)?;
        let mut dir = nix::dir::Dir::from_fd(fd).map_err(failed)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Whether the directory has been removed.
    pub fn is_removed(&self) -> bool {
        fstat(self.fd.as_fd()).map_or(true, |stat| stat.st_nlink == 0)
    }

    /// The path that the directory was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn is_link(&self, name: &str) -> bool {
        fstatat(self.fd.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|stat| {
            SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFLNK
        })
    }

    fn open_beneath(&self, name: &str, flags: OFlag) -> Result<OwnedFd, ReadError> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let path = || self.path.join(name);
        match openat2(self.fd.as_fd(), name, how) {
            Ok(fd) => Ok(fd),
            // O_DIRECTORY on a link is ENOTDIR.
            Err(Errno::ELOOP | Errno::ENOTDIR) if self.is_link(name) => Err(ReadError::Link { path: path() }),
            // What open(2) answers for a socket, whatever the flags.
            Err(Errno::ENXIO) => Err(ReadError::NotRegular { path: path(), kind: "socket" }),
            Err(e) => Err(ReadError::io("cannot open", path(), e)),
        }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The inode, which with the file system is a file's identity for as long as it is open.
pub(super) fn inode(file: &File, path: &Path) -> Result<u64, ReadError> {
    Ok(file.metadata().map_err(|e| ReadError::io("cannot examine", path, e))?.ino())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, os::unix::net::UnixListener};

    use super::*;

    fn dir() -> (tempfile::TempDir, Dir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        (temp, dir)
    }

    #[test]
    fn a_link_is_refused_by_name_whether_it_points_to_a_file_or_a_directory() {
        let (temp, dir) = dir();
        symlink("/etc/passwd", temp.path().join("stdout")).unwrap();
        symlink("/etc", temp.path().join("web")).unwrap();
        let error = dir.open_file("stdout").unwrap_err();
        assert!(matches!(error, ReadError::Link { .. }), "{error}");
        assert!(error.to_string().contains("stdout is a symbolic link"), "{error}");
        assert!(matches!(dir.open_dir("web"), Err(ReadError::Link { .. })));
    }

    #[test]
    fn a_path_cannot_climb_out_of_the_directory() {
        let (_temp, dir) = dir();
        assert!(dir.open_dir("..").is_err());
        assert!(dir.open_file("../../etc/passwd").is_err());
        assert!(dir.open_file("/etc/passwd").is_err());
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused_without_waiting_for_it() {
        let (temp, dir) = dir();
        nix::unistd::mkfifo(&temp.path().join("fifo"), Mode::S_IRWXU).unwrap();
        fs::create_dir(temp.path().join("dir")).unwrap();
        let _socket = UnixListener::bind(temp.path().join("socket")).unwrap();
        for (name, kind) in [("fifo", "FIFO"), ("dir", "directory"), ("socket", "socket")] {
            let error = dir.open_file(name).unwrap_err().to_string();
            assert!(error.contains(&format!("is a {kind}")), "{error}");
        }
    }

    #[test]
    fn names_can_be_listed_again_and_again() {
        let (temp, dir) = dir();
        assert!(dir.names().unwrap().is_empty());
        fs::write(temp.path().join("stdout"), "x").unwrap();
        assert_eq!(dir.names().unwrap(), ["stdout"]);
        assert_eq!(dir.names().unwrap(), ["stdout"]);
    }
}
