//! Removing what is ours, and nothing that anybody has mounted or linked there.
//!
//! A tree is taken away from the directory that it is in, by descriptors: a link in it is removed, not followed,
//! and where something is mounted the removal ends with an error. What was unmounted just before may still be
//! mounted, or again, for whatever reason: then its contents are somebody's files.

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
};

use nix::{errno::Errno, sys::stat::SFlag, unistd::UnlinkatFlags};

use super::dir::{Dir, Entry, name};

/// How often a name may have become something else when it is removed. More, and somebody makes things there.
const ROUNDS: usize = 16;

/// Why something stays. The kind of the [`io::Error`] that it is in is `ResourceBusy`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Kept {
    /// Whatever it is, it is not ours.
    #[error("{0} is a mount point: what is mounted there stays; unmount it first")]
    Mount(PathBuf),
    /// No mount point that we made.
    #[error("{0} is neither an empty file nor a directory, so it was not made as a mount point, and stays")]
    Contents(PathBuf),
    /// New things appear as fast as old ones are removed.
    #[error("{0} changes while it is being removed: find out who writes there")]
    Busy(PathBuf),
}

impl From<Kept> for io::Error {
    fn from(kept: Kept) -> io::Error {
        io::Error::new(io::ErrorKind::ResourceBusy, kept)
    }
}

/// What may be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Everything,
    MountPoints,
}

/// Removes a file, a link, or a directory with all that is in it, unless it is gone.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    remove_as(path, Rule::Everything)
}

/// Removes a mount point, or a tree of them, unless it is gone: directories and empty files, and nothing that
/// has contents.
pub(crate) fn remove_mount_points(path: &Path) -> io::Result<()> {
    remove_as(path, Rule::MountPoints)
}

fn remove_as(path: &Path, rule: Rule) -> io::Result<()> {
    match Dir::of(path)? {
        Some((dir, name)) => remove_entry(&dir, name, rule),
        None => Ok(()),
    }
}

fn remove_entry(dir: &Dir, name: &OsStr, rule: Rule) -> io::Result<()> {
    for _ in 0..ROUNDS {
        let unlinked = match dir.look(name)? {
            Entry::Nothing => return Ok(()),
            Entry::Mount => return Err(Kept::Mount(dir.path_of(name)).into()),
            Entry::File(stat) => {
                let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
                if rule == Rule::MountPoints && (kind != SFlag::S_IFREG || stat.st_size != 0) {
                    return Err(Kept::Contents(dir.path_of(name)).into());
                }
                dir.unlink(name, UnlinkatFlags::NoRemoveDir)
            }
            Entry::Directory(sub) => {
                remove_below(&sub, rule)?;
                dir.unlink(name, UnlinkatFlags::RemoveDir)
            }
        };
        match unlinked {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) => return Err(Kept::Mount(dir.path_of(name)).into()),
            // It has become something else, or has got something in it.
            Err(Errno::EISDIR | Errno::ENOTDIR | Errno::ENOTEMPTY | Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Kept::Busy(dir.path_of(name)).into())
}

fn remove_below(dir: &Dir, rule: Rule) -> io::Result<()> {
    dir.names()?.iter().try_for_each(|text| remove_entry(dir, name(text), rule))
}

/// Unmounts whatever is mounted at and below `path`. Can be repeated.
///
/// # Errors
///
/// [`Kept::Mount`] if there is always something new.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    match Dir::of(path)? {
        Some((dir, name)) => unmount_entry(&dir, name),
        None => Ok(()),
    }
}

fn unmount_entry(dir: &Dir, entry: &OsStr) -> io::Result<()> {
    // Unmounting uncovers what was mounted over.
    for _ in 0..ROUNDS {
        if dir.unmount(entry)? {
            continue;
        }
        return match dir.look(entry)? {
            // Of another mount namespace, and locked, or mounted just now.
            Entry::Mount => Err(Kept::Mount(dir.path_of(entry)).into()),
            Entry::Nothing | Entry::File(_) => Ok(()),
            Entry::Directory(sub) => sub.names()?.iter().try_for_each(|text| unmount_entry(&sub, name(text))),
        };
    }
    Err(Kept::Mount(dir.path_of(entry)).into())
}

/// Whether something is mounted at `path`.
pub(crate) fn is_mount_point(path: &Path) -> io::Result<bool> {
    Ok(match Dir::of(path)? {
        Some((dir, name)) => matches!(dir.look(name)?, Entry::Mount),
        None => false,
    })
}

#[cfg(test)]
mod tests;
