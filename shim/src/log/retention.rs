//! Removing the logs of deleted containers when their time is over.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::{
    sys::stat::fstat,
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{
    locate::{self, Name},
    reader::{Dir, ReadError, Stream},
};
use crate::files;

/// A log that is older than the retention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expired {
    /// Whose it is.
    pub name: Name,
    /// Its directory.
    pub path: PathBuf,
    /// Time since anything changed in it.
    pub age: Duration,
}

/// The logs below `root`, in `namespace` if given, in which nothing has changed for `retention`, those of containers that
/// `lives` names left out. Directories that cannot be examined, or hold anything that is not a log
/// file, are left out too: a wrong `log.dir` must not cost somebody else's files.
pub fn expired(
    root: &Path,
    namespace: Option<&str>,
    retention: Duration,
    lives: impl Fn(&Name) -> bool,
) -> Result<Vec<Expired>, ReadError> {
    let mut found = Vec::new();
    for name in locate::names(root, namespace)? {
        if lives(&name) {
            continue;
        }
        let Ok(dir) = locate::open(root, &name) else { continue };
        let (Ok(files), Ok(age)) = (dir.names(), age(&dir)) else { continue };
        let is_log = !files.is_empty() && files.iter().all(|file| Stream::is_log_file(file));
        if is_log && age >= retention {
            let path = root.join(&name.namespace).join(&name.id);
            found.push(Expired { name, path, age });
        }
    }
    Ok(found)
}

/// Removes the log directory of `name` below `root`, following no link on the way: what a link in it
/// points to stays. A subdirectory, which nothing of ours makes, is an error and stays, as does what is mounted
/// there.
pub fn remove(root: &Path, name: &Name) -> Result<(), ReadError> {
    let namespace = Dir::open(root)?.open_dir(&name.namespace)?;
    let dir = namespace.open_dir(&name.id)?;
    if files::is_mount_point(dir.path()).map_err(|e| ReadError::io("cannot look at", dir.path(), e))? {
        let busy = std::io::Error::from_raw_os_error(libc::EBUSY);
        return Err(ReadError::io("cannot remove the mount point", dir.path(), busy));
    }
    for file in dir.names()? {
        unlinkat(dir.as_fd(), file.as_str(), UnlinkatFlags::NoRemoveDir)
            .map_err(|e| ReadError::io("cannot remove", dir.path().join(&file), e))?;
    }
    unlinkat(namespace.as_fd(), name.id.as_str(), UnlinkatFlags::RemoveDir)
        .map_err(|e| ReadError::io("cannot remove", dir.path(), e))
}

/// Time since the directory or a file in it was last changed.
fn age(dir: &Dir) -> Result<Duration, ReadError> {
    let mut newest = modified(dir, None)?;
    for file in dir.names()? {
        newest = newest.max(modified(dir, Some(&file))?);
    }
    Ok(SystemTime::now().duration_since(newest).unwrap_or_default())
}

fn modified(dir: &Dir, file: Option<&str>) -> Result<SystemTime, ReadError> {
    let stat = match file {
        None => fstat(dir.as_fd()),
        Some(file) => nix::sys::stat::fstatat(dir.as_fd(), file, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW),
    };
    let path = || file.map_or_else(|| dir.path().into(), |file| dir.path().join(file));
    let stat = stat.map_err(|e| ReadError::io("cannot examine", path(), e))?;
    let seconds = Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
    Ok(SystemTime::UNIX_EPOCH + seconds)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn name(id: &str) -> Name {
        Name { namespace: "default".into(), id: id.into() }
    }

    fn log(root: &Path, id: &str) -> PathBuf {
        let dir = root.join("default").join(id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("stdout"), "x").unwrap();
        dir
    }

    fn age_by_hours(dir: &Path, hours: u64) {
        let time = SystemTime::now() - Duration::from_secs(hours * 3600);
        for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).chain([dir.to_owned()]) {
            fs::File::open(path).unwrap().set_modified(time).unwrap();
        }
    }

    #[test]
    fn only_logs_of_deleted_containers_older_than_the_retention_expire() {
        let root = tempfile::tempdir().unwrap();
        for (id, hours) in [("new", 1), ("old", 30), ("running", 30)] {
            age_by_hours(&log(root.path(), id), hours);
        }
        let day = Duration::from_secs(24 * 3600);
        let expired = expired(root.path(), None, day, |name| name.id == "running").unwrap();
        assert_eq!(expired.iter().map(|e| e.name.id.as_str()).collect::<Vec<_>>(), ["old"]);
    }

    #[test]
    fn a_directory_that_is_not_a_log_never_expires() {
        let root = tempfile::tempdir().unwrap();
        fs::write(log(root.path(), "journal").join("system.journal"), "x").unwrap();
        fs::write(log(root.path(), "other").join("stdout-of-mine"), "x").unwrap();
        fs::create_dir(root.path().join("default/empty")).unwrap();
        assert_eq!(expired(root.path(), None, Duration::ZERO, |_| false).unwrap(), []);
    }

    #[test]
    fn removing_a_log_removes_links_in_it_and_not_what_they_point_to() {
        let root = tempfile::tempdir().unwrap();
        let dir = log(root.path(), "c1");
        let precious = root.path().join("precious");
        fs::write(&precious, "x").unwrap();
        symlink(&precious, dir.join("stderr")).unwrap();
        remove(root.path(), &name("c1")).unwrap();
        assert!(!dir.exists() && precious.exists());
    }

    #[test]
    fn removing_a_log_costs_nobody_a_file() {
        files::testing::costs_nobody_a_file(
            |root| log(root, "c1"),
            |root| match remove(root, &name("c1")) {
                Err(e) if e.is_not_found() => Ok(()),
                removed => removed,
            },
        );
    }

    #[test]
    fn a_link_in_place_of_a_log_directory_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let victim = root.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::write(victim.join("stdout"), "x").unwrap();
        fs::create_dir(root.path().join("default")).unwrap();
        symlink(&victim, root.path().join("default/c1")).unwrap();
        assert!(remove(root.path(), &name("c1")).is_err());
        assert!(victim.join("stdout").exists());
        assert_eq!(expired(root.path(), None, Duration::ZERO, |_| false).unwrap(), []);
    }
}
