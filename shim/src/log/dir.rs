//! The directory of one container's log. Every file in it is opened relative to the directory's
//! descriptor and without following links: whatever someone plants there, nothing outside of it is
//! read or written.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, open, openat, renameat},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};

use crate::files::{self, LOCK_LIMIT, Lock};

/// Streams that a log directory may hold. Any file named after one makes the directory a log.
const STREAMS: [&str; 2] = ["stdout", "stderr"];

/// An open log directory.
#[derive(Debug)]
pub struct LogDir {
    fd: OwnedFd,
    path: PathBuf,
    /// Keeps others away for as long as the directory is open; the kernel frees it with the process.
    _claim: Option<Flock<OwnedFd>>,
}

/// A log directory or a file in it could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path}")]
pub struct LogError {
    /// What was done, "cannot open" for example.
    pub action: &'static str,
    /// To what.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl LogDir {
    /// Makes `path` with mode 0700, and missing parents, for the log of a new container. A directory
    /// that holds a log already is renamed to `<name>.<unix time>` first.
    pub fn create(path: &Path) -> Result<LogDir, LogError> {
        let error = |action| move |source| LogError { action, path: path.into(), source };
        let (parent, name) = split(path).map_err(error("cannot create the log directory"))?;
        make_parents(parent).map_err(error("cannot create the parents of the log directory"))?;
        let parent = open_parent(parent).map_err(error("cannot open the parent of the log directory"))?;
        LogDir::create_in(&parent, path, name)
    }

    /// Like [`create`](LogDir::create) for a directory that several may want at once: whoever has it open by
    /// this or by [`open_alone`](LogDir::open_alone) has it alone.
    ///
    /// # Errors
    ///
    /// Of kind [`ResourceBusy`](io::ErrorKind::ResourceBusy) if another has it.
    pub fn create_alone(path: &Path) -> Result<LogDir, LogError> {
        let error = |action| move |source| LogError { action, path: path.into(), source };
        let (above, name) = split(path).map_err(error("cannot create the log directory"))?;
        make_parents(above).map_err(error("cannot create the parents of the log directory"))?;
        let open = || open_parent(above).map_err(error("cannot open the parent of the log directory"));
        // Between the look at the old directory and the claim on the new one nobody else may do the same.
        // Held for a few system calls, so that it is not long in coming.
        let _turn = files::lock(open()?, Lock::Exclusive, LOCK_LIMIT)
            .map_err(error("cannot lock the parent of the log directory"))?;
        let parent = open()?;
        match LogDir::open_alone(path) {
            Err(e) if e.source.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        LogDir::create_in(&parent, path, name)?.claim()
    }

    /// Makes the directory `name` in `parent`.
    fn create_in(parent: &OwnedFd, path: &Path, name: &Path) -> Result<LogDir, LogError> {
        let error = |action| move |source| LogError { action, path: path.into(), source };
        set_aside(parent, name).map_err(error("cannot rename the old log directory"))?;
        match mkdirat(parent, name, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(error("cannot create the log directory")(e.into())),
        }
        LogDir::open_in(parent, path, name)
    }

    /// Opens the existing directory `path`, for recovery.
    pub fn open(path: &Path) -> Result<LogDir, LogError> {
        let error = |source| LogError { action: "cannot open the log directory", path: path.into(), source };
        let (parent, name) = split(path).map_err(error)?;
        let parent = open_parent(parent).map_err(error)?;
        LogDir::open_in(&parent, path, name)
    }

    /// Like [`open`](LogDir::open), with the errors of [`create_alone`](LogDir::create_alone).
    pub fn open_alone(path: &Path) -> Result<LogDir, LogError> {
        LogDir::open(path)?.claim()
    }

    fn claim(self) -> Result<LogDir, LogError> {
        let action = "another sandbox writes its log to";
        let claim = self.fd.try_clone().map_err(|e| self.error("cannot lock", "", e))?;
        match Flock::lock(claim, FlockArg::LockExclusiveNonblock) {
            Ok(claim) => Ok(LogDir { _claim: Some(claim), ..self }),
            Err((_, Errno::EWOULDBLOCK)) => {
                Err(self.error(action, "", io::Error::from_raw_os_error(libc::EBUSY)))
            }
            Err((_, e)) => Err(self.error("cannot lock", "", e.into())),
        }
    }

    fn open_in(parent: &OwnedFd, path: &Path, name: &Path) -> Result<LogDir, LogError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(parent, name, flags, Mode::empty()) {
            Ok(fd) => Ok(LogDir { fd, path: path.into(), _claim: None }),
            Err(e) => {
                Err(LogError { action: "cannot open the log directory", path: path.into(), source: e.into() })
            }
        }
    }

    /// The path of `name` in this directory, for messages only.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens `name` for reading and writing; creates it with mode 0600 if it does not exist.
    pub(super) fn create_file(&self, name: &str) -> Result<File, LogError> {
        self.open_regular(name, OFlag::O_RDWR | OFlag::O_CREAT, "cannot create the log file")
    }

    /// Opens the existing file `name` for reading.
    pub(super) fn open_file(&self, name: &str) -> Result<File, LogError> {
        self.open_regular(name, OFlag::O_RDONLY, "cannot open the log file")
    }

    // O_NONBLOCK: opening a FIFO that somebody planted must not wait for its other end.
    fn open_regular(&self, name: &str, flags: OFlag, action: &'static str) -> Result<File, LogError> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let open = || -> io::Result<File> {
            let fd = openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
            let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
            if kind != SFlag::S_IFREG {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
            }
            Ok(fd.into())
        };
        open().map_err(|source| self.error(action, name, source))
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), LogError> {
        renameat(&self.fd, from, &self.fd, to)
            .map_err(|e| self.error("cannot rename the log file", from, e.into()))
    }

    /// Removes `name`; that it does not exist is no error.
    pub(super) fn remove(&self, name: &str) -> Result<(), LogError> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(self.error("cannot remove the log file", name, e.into())),
        }
    }

    /// Names of the entries that are valid UTF-8; every name of ours is.
    pub(super) fn names(&self) -> Result<Vec<String>, LogError> {
        names(&self.fd).map_err(|e| self.error("cannot list the log directory", "", e))
    }

    /// Makes renames and new files durable.
    pub(super) fn sync(&self) -> Result<(), LogError> {
        nix::unistd::fsync(&self.fd).map_err(|e| self.error("cannot sync the log directory", "", e.into()))
    }

    pub(super) fn error(&self, action: &'static str, name: &str, source: io::Error) -> LogError {
        LogError { action, path: self.path_of(name), source }
    }

    #[cfg(test)]
    pub(crate) fn from_fd(fd: OwnedFd, path: &Path) -> LogDir {
        LogDir { fd, path: path.into(), _claim: None }
    }
}

fn split(path: &Path) -> io::Result<(&Path, &Path)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if path.is_absolute() => Ok((parent, Path::new(name))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not an absolute path that ends in a name")),
    }
}

fn make_parents(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn open_parent(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Renames `name` if it is a directory with a log in it. A bundle that serves as log directory has
/// none yet when its container is created, so it stays where it is.
fn set_aside(parent: &OwnedFd, name: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let old = match openat(parent, name, flags, Mode::empty()) {
        Ok(old) => old,
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    if !names(&old)?.iter().any(|entry| is_log_file(entry)) {
        return Ok(());
    }
    let mut time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    loop {
        let mut aside = name.as_os_str().to_owned();
        aside.push(format!(".{time}"));
        // Without RENAME_NOREPLACE an empty directory of that name would be replaced.
        match nix::fcntl::renameat2(
            parent,
            name,
            parent,
            Path::new(&aside),
            nix::fcntl::RenameFlags::RENAME_NOREPLACE,
        ) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::EEXIST) => time += 1,
            Err(e) => return Err(e.into()),
        }
    }
}

pub(super) fn is_log_file(name: &str) -> bool {
    STREAMS
        .iter()
        .any(|stream| name.strip_prefix(stream).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

fn names(dir: &OwnedFd) -> io::Result<Vec<String>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::openat(dir, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        if let Ok(name) = entry?.file_name().to_str() {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_new_directory_is_for_its_owner_alone_and_so_are_its_files() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("ns/id");
        let dir = LogDir::create(&path).unwrap();
        let file = dir.create_file("stdout").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(root.path().join("ns")).unwrap().mode() & 0o777, 0o700);
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_log_of_an_earlier_container_of_that_name_is_set_aside_each_time() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("id");
        for n in 0..3 {
            LogDir::create(&path).unwrap();
            assert!(!path.join("stdout").exists());
            std::fs::write(path.join("stdout"), n.to_string()).unwrap();
        }
        let mut kept: Vec<_> = std::fs::read_dir(root.path())
            .unwrap()
            .map(|entry| std::fs::read_to_string(entry.unwrap().path().join("stdout")).unwrap())
            .collect();
        kept.sort();
        assert_eq!(kept, ["0", "1", "2"]);
    }

    #[test]
    fn a_directory_for_one_is_refused_to_others_for_as_long_as_it_is_open() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("templates/id");
        let first = LogDir::create_alone(&path).unwrap();
        first.create_file("stdout").unwrap();
        for refused in [LogDir::create_alone(&path), LogDir::open_alone(&path)] {
            let error = refused.unwrap_err();
            assert_eq!(error.source.kind(), io::ErrorKind::ResourceBusy, "{error}");
        }
        assert!(path.join("stdout").exists(), "a create that is refused changes nothing");
        drop(first);
        let second = LogDir::create_alone(&path).unwrap();
        assert!(!path.join("stdout").exists());
        assert_eq!(std::fs::read_dir(root.path().join("templates")).unwrap().count(), 2);
        drop(second);
        LogDir::open_alone(&path).unwrap();
    }

    #[test]
    fn of_many_who_want_a_directory_at_once_one_gets_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("id");
        let begin = std::sync::Barrier::new(8);
        let got: Vec<_> = std::thread::scope(|scope| {
            let try_it = || {
                begin.wait();
                LogDir::create_alone(&path)
            };
            let all: Vec<_> = (0..8).map(|_| scope.spawn(try_it)).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(got.iter().filter(|dir| dir.is_ok()).count(), 1, "{got:?}");
    }

    #[test]
    fn a_bundle_stays_where_it_is() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("bundle");
        std::fs::create_dir(&bundle).unwrap();
        std::fs::write(bundle.join("config.json"), "{}").unwrap();
        LogDir::create(&bundle).unwrap();
        assert!(bundle.join("config.json").exists());
    }

    #[test]
    fn a_link_in_place_of_the_directory_or_of_a_file_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, root.path().join("id")).unwrap();
        assert!(LogDir::create(&root.path().join("id")).is_err());
        assert!(LogDir::open(&root.path().join("id")).is_err());

        let dir = LogDir::create(&root.path().join("real")).unwrap();
        std::fs::write(outside.join("secret"), "kept").unwrap();
        symlink(outside.join("secret"), root.path().join("real/stdout")).unwrap();
        let error = dir.create_file("stdout").unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::ELOOP), "{error}");
        assert!(dir.open_file("stdout").is_err());
    }

    #[test]
    fn a_fifo_in_place_of_a_file_is_refused_without_waiting() {
        let root = tempfile::tempdir().unwrap();
        let dir = LogDir::create(&root.path().join("id")).unwrap();
        nix::unistd::mkfifo(&root.path().join("id/stdout"), Mode::S_IRWXU).unwrap();
        assert!(dir.create_file("stdout").is_err());
        assert!(dir.open_file("stdout").is_err());
    }
}
