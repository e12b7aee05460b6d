//! Unpacking what a container has sent, which may be anything.
//!
//! Everything is done by descriptors: a directory is reached from the target's by openat2(2), which follows no link
//! and does not leave it, also if the container can write to the target meanwhile, as to a volume. A file takes the
//! place of what had its name, and is never written through it.

use std::{
    cell::Cell,
    ffi::{OsStr, OsString},
    fs::{self, File, Permissions},
    io::{self, ErrorKind, Read},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, fchown},
        },
    },
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, SystemTime},
};

use cube_shim::text::printable;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::stat::{Mode, mkdirat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};
use tar::{Archive, Entry, EntryType, Header};

use super::drain;
use crate::error::CliError;

/// What may come between two files: names and attributes, which are kept in memory.
const HEADERS_MAX: u64 = 1 << 20;

/// Files that are named when they are left out.
const NAMED_MAX: usize = 20;

/// Permissions that are kept: on the host, set-user-ID files of a container would be anybody's way to its root.
const MODE: u32 = 0o1777;

/// Where a stream goes.
pub(super) struct Unpack {
    root: OwnedFd,
    /// What the stream calls the file or directory that it is of, and what it is to be called; neither, if it is of
    /// what is in a directory.
    renamed: Option<(OsString, OsString)>,
}

impl Unpack {
    /// For a stream of `name`: into the directory `local`, if it is one, else as `local`.
    pub(super) fn new(local: &Path, name: &str) -> Result<Unpack, CliError> {
        let failed = |action, source| CliError::File { action, path: local.into(), source };
        let is_dir = fs::metadata(local).is_ok_and(|meta| meta.is_dir());
        let own = OsString::from(name);
        let (dir, renamed) = match (is_dir, name) {
            (true, ".") => (local.to_owned(), None),
            (true, _) => (local.to_owned(), Some((own.clone(), own))),
            (false, ".") => {
                fs::create_dir(local).map_err(|e| failed("make", e))?;
                (local.to_owned(), None)
            }
            (false, _) => {
                let name = local.file_name().ok_or_else(|| failed("make", ErrorKind::NotFound.into()))?;
                let dir = local.parent().filter(|dir| !dir.as_os_str().is_empty());
                (dir.unwrap_or(Path::new(".")).to_owned(), Some((own, name.into())))
            }
        };
        let root = File::open(&dir).map_err(|source| CliError::File { action: "open", path: dir, source })?;
        Ok(Unpack { root: root.into(), renamed })
    }

    /// Unpacks all of it, and reads it to its end.
    pub(super) fn all(&self, from: impl Read) -> Result<(), CliError> {
        let budget = Rc::new(Cell::new(HEADERS_MAX));
        let mut archive = Archive::new(Rationed { inner: from, budget: budget.clone() });
        let mut left_out = 0;
        let mut entries = archive.entries().map_err(CliError::Received)?;
        loop {
            budget.set(HEADERS_MAX);
            let Some(entry) = entries.next().transpose().map_err(CliError::Received)? else { break };
            budget.set(u64::MAX);
            let path = entry.path_bytes().into_owned();
            let shown = || printable(&String::from_utf8_lossy(&path)).into_owned();
            match self.one(entry, &path) {
                Ok(true) => {}
                Ok(false) => {
                    left_out += 1;
                    if left_out <= NAMED_MAX {
                        eprintln!("cubecli: left out: {} is no file, directory or link", shown());
                    }
                }
                Err(Problem::Wrong(why)) => return Err(CliError::Entry { path: shown(), why }),
                Err(Problem::Failed(action, source)) => {
                    return Err(CliError::Unpack { action, path: shown(), source });
                }
            }
        }
        budget.set(u64::MAX);
        drain(archive.into_inner()).map_err(CliError::Received)?;
        if left_out > 0 { Err(CliError::LeftOut(left_out)) } else { Ok(()) }
    }

    /// Unpacks one; tells whether it is something that is unpacked.
    fn one(&self, mut entry: Entry<'_, impl Read>, path: &[u8]) -> Result<bool, Problem> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(true);
        }
        let path = self.place(path)?;
        let Some(name) = path.file_name() else {
            // The directory itself.
            return Ok(kind.is_dir());
        };
        let parent = self.dir(path.parent().unwrap_or(Path::new("")))?;
        match kind {
            EntryType::Directory => {
                match mkdirat(&parent, name, Mode::S_IRWXU) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(failed("make")(errno)),
                }
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let dir = openat(&parent, name, flags, Mode::empty()).map_err(failed("open"))?;
                dress(&File::from(dir), entry.header(), false)?;
            }
            EntryType::Regular | EntryType::Continuous => {
                make_way(&parent, name)?;
                let flags =
                    OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let file =
                    openat(&parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(failed("make"))?;
                let mut file = File::from(file);
                let copied = io::copy(&mut entry, &mut file).map_err(|e| Problem::Failed("write", e))?;
                if copied != entry.size() {
                    return Err(Problem::Wrong("is cut short"));
                }
                dress(&file, entry.header(), true)?;
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or(Problem::Wrong("is a link to nothing"))?;
                make_way(&parent, name)?;
                symlinkat(OsStr::from_bytes(&target), &parent, name).map_err(failed("make"))?;
                if let (Ok(uid), Ok(gid)) = (id(entry.header().uid()), id(entry.header().gid())) {
                    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                    fchownat(&parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
                        .map_err(failed("give away"))?;
                }
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().ok_or(Problem::Wrong("is a link to nothing"))?;
                let target = self.place(&target)?;
                let of = target.file_name().ok_or(Problem::Wrong("is a link to a directory"))?;
                let from = self.dir(target.parent().unwrap_or(Path::new("")))?;
                make_way(&parent, name)?;
                linkat(&from, of, &parent, name, AtFlags::empty()).map_err(failed("link"))?;
            }
            // The holes would be as many zeros, and the container's tar was not asked for any.
            EntryType::GNUSparse => return Err(Problem::Wrong("is sparse, which nobody asked for")),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Where below the target a path of the stream is.
    fn place(&self, path: &[u8]) -> Result<PathBuf, Problem> {
        let mut words = Vec::new();
        for word in path.split(|byte| *byte == b'/') {
            match word {
                b"" | b"." => {}
                b".." => return Err(Problem::Wrong("leads out of where it is to be")),
                word if word.contains(&0) => return Err(Problem::Wrong("is no path")),
                word => words.push(OsStr::from_bytes(word)),
            }
        }
        if path.first() == Some(&b'/') {
            return Err(Problem::Wrong("leads out of where it is to be"));
        }
        if let Some((own, new)) = &self.renamed {
            match words.first_mut() {
                Some(first) if *first == own => *first = new,
                _ => return Err(Problem::Wrong("is not what was asked for")),
            }
        }
        Ok(words.iter().collect())
    }

    /// The directory of this path below the target, reached without a link.
    fn dir(&self, path: &Path) -> Result<OwnedFd, Problem> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(&self.root, path, how).map_err(|errno| match errno {
            Errno::ELOOP | Errno::EXDEV | Errno::ENOTDIR => Problem::Wrong("leads through a link, or a file"),
            errno => failed("open the directory of")(errno),
        })
    }
}

/// Why an entry cannot be unpacked.
enum Problem {
    Wrong(&'static str),
    Failed(&'static str, io::Error),
}

fn failed(action: &'static str) -> impl FnOnce(Errno) -> Problem {
    move |errno| Problem::Failed(action, errno.into())
}

/// Removes the file or link that has the name. A directory stays, and is in the way.
fn make_way(parent: &OwnedFd, name: &OsStr) -> Result<(), Problem> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(failed("replace")(errno)),
    }
}

/// Gives a file its owner, its mode and, if it is to be kept, its time.
fn dress(file: &File, header: &Header, with_time: bool) -> Result<(), Problem> {
    if let (Ok(uid), Ok(gid)) = (id(header.uid()), id(header.gid())) {
        fchown(file, Some(uid), Some(gid)).map_err(|e| Problem::Failed("give away", e))?;
    }
    // After the owner, whose change takes bits away.
    let mode = header.mode().map_err(|_| Problem::Wrong("has no mode"))? & MODE;
    file.set_permissions(Permissions::from_mode(mode)).map_err(|e| Problem::Failed("set the mode of", e))?;
    let time = header.mtime().ok().and_then(|s| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(s)));
    if let Some(time) = time.filter(|_| with_time) {
        // A time that the file system does not have is not worth an error.
        let _ = file.set_modified(time);
    }
    Ok(())
}

/// A number of a user or group; the highest stands for none.
fn id(field: io::Result<u64>) -> Result<u32, ()> {
    field.ok().and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX).ok_or(())
}

/// Ends when its budget is spent: what comes between files is kept in memory.
struct Rationed<R> {
    inner: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for Rationed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.get();
        if left == 0 {
            return Err(io::Error::new(ErrorKind::InvalidData, "headers without end"));
        }
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        self.budget.set(left - read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
