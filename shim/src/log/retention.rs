//! Removing the logs of deleted containers when their time is over, or there are too many of them.

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
use crate::{config, files};

/// A log that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The directory that it is below.
    pub root: PathBuf,
    /// Whose it is.
    pub name: Name,
    /// Its directory.
    pub path: PathBuf,
    /// Time since anything changed in it.
    pub age: Duration,
    /// What it takes on the disk.
    pub bytes: u64,
}

/// Why a log goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its time is over.
    Age,
    /// With it, and all that are younger, there are more bytes than may be.
    Total,
}

/// Where logs are that are removed by age and size: each root, with the namespace in it if only that counts.
pub fn roots(log: &config::Log) -> Vec<(&Path, Option<&str>)> {
    let (root, templates) = locate::templates(&log.template_dir);
    let dir = Some((log.dir.as_path(), None)).filter(|_| log.dir.as_os_str() != locate::BUNDLE);
    [(root, Some(templates))].into_iter().chain(dir).collect()
}

/// The logs below `root`, in `namespace` if given. Directories that cannot be examined, or hold anything that
/// is not a log file, are left out: a wrong `log.dir` must not cost somebody else's files.
pub fn kept(root: &Path, namespace: Option<&str>) -> Result<Vec<Kept>, ReadError> {
    let mut found = Vec::new();
    for name in locate::names(root, namespace)? {
        let Ok(dir) = locate::open(root, &name) else { continue };
        let (Ok(files), Ok((age, bytes))) = (dir.names(), measure(&dir)) else { continue };
        if !files.is_empty() && files.iter().all(|file| Stream::is_log_file(file)) {
            let path = root.join(&name.namespace).join(&name.id);
            found.push(Kept { root: root.into(), name, path, age, bytes });
        }
    }
    Ok(found)
}

/// Those of `logs`, all of deleted containers, that have to go: the old ones, and the oldest of what has more
/// bytes than `log.total_limit`.
pub fn due(mut logs: Vec<Kept>, log: &config::Log) -> Vec<(Kept, Reason)> {
    let retention = Duration::from_secs(log.retention_hours.saturating_mul(3600));
    logs.sort_by_key(|log| log.age);
    let mut total = 0u64;
    let mut due = Vec::new();
    for kept in logs {
        if kept.age >= retention {
            due.push((kept, Reason::Age));
            continue;
        }
        total = total.saturating_add(kept.bytes);
        if total > log.total_limit {
            due.push((kept, Reason::Total));
        }
    }
    due
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

/// Time since the directory or a file in it was last changed, and what all of them take on the disk.
fn measure(dir: &Dir) -> Result<(Duration, u64), ReadError> {
    let (mut newest, mut total) = examine(dir, None)?;
    for file in dir.names()? {
        let (modified, bytes) = examine(dir, Some(&file))?;
        (newest, total) = (newest.max(modified), total.saturating_add(bytes));
    }
    Ok((SystemTime::now().duration_since(newest).unwrap_or_default(), total))
}

fn examine(dir: &Dir, file: Option<&str>) -> Result<(SystemTime, u64), ReadError> {
    let stat = match file {
        None => fstat(dir.as_fd()),
        Some(file) => nix::sys::stat::fstatat(dir.as_fd(), file, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW),
    };
    let path = || file.map_or_else(|| dir.path().into(), |file| dir.path().join(file));
    let stat = stat.map_err(|e| ReadError::io("cannot examine", path(), e))?;
    let seconds = Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
    // Blocks of 512 bytes, whatever those of the file system are.
    let bytes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    Ok((SystemTime::UNIX_EPOCH + seconds, bytes))
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

    /// Names of what has to go, and why.
    fn due_in(root: &Path, retention_hours: u64, total_limit: u64) -> Vec<(String, Reason)> {
        let log = config::Log { retention_hours, total_limit, ..Default::default() };
        let due = due(kept(root, None).unwrap(), &log);
        due.into_iter().map(|(log, reason)| (log.name.id, reason)).collect()
    }

    #[test]
    fn logs_older_than_the_retention_expire() {
        let root = tempfile::tempdir().unwrap();
        for (id, hours) in [("new", 1), ("old", 30)] {
            age_by_hours(&log(root.path(), id), hours);
        }
        assert_eq!(due_in(root.path(), 24, u64::MAX), [("old".into(), Reason::Age)]);
    }

    #[test]
    fn beyond_the_total_the_oldest_go_first() {
        let root = tempfile::tempdir().unwrap();
        for (id, hours) in [("b", 2), ("d", 4), ("a", 1), ("c", 3), ("old", 30)] {
            let dir = log(root.path(), id);
            fs::write(dir.join("stdout"), vec![1; 1 << 20]).unwrap();
            age_by_hours(&dir, hours);
        }
        let age = || ("old".to_owned(), Reason::Age);
        let total = |id: &str| (id.to_owned(), Reason::Total);
        assert_eq!(due_in(root.path(), 24, 5 << 20), [age()], "what expires anyway does not count");
        let two_and_a_half = (2 << 20) + (1 << 19);
        assert_eq!(due_in(root.path(), 24, two_and_a_half), [total("c"), total("d"), age()]);
        assert_eq!(due_in(root.path(), 99, 0).len(), 5);
    }

    #[test]
    fn a_directory_that_is_not_a_log_never_expires() {
        let root = tempfile::tempdir().unwrap();
        fs::write(log(root.path(), "journal").join("system.journal"), "x").unwrap();
        fs::write(log(root.path(), "other").join("stdout-of-mine"), "x").unwrap();
        fs::create_dir(root.path().join("default/empty")).unwrap();
        assert_eq!(kept(root.path(), None).unwrap(), []);
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
        assert_eq!(kept(root.path(), None).unwrap(), []);
    }
}
