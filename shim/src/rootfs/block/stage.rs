//! Disks of a snapshot beside those of a sandbox that runs, to take their place.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Cache, SandboxDisks};
use crate::{
    files,
    rootfs::{RootfsError, failed},
    vmm::Disk,
};

/// Copies that are complete, under names of their own. Dropping this leaves them to
/// [`SandboxDisks::remove`].
#[derive(Debug, Default)]
pub struct Staged {
    /// From where, to where.
    moves: Vec<(PathBuf, PathBuf)>,
    disks: Vec<Disk>,
}

impl Staged {
    /// Copies each disk of `snapshot` that the guest writes to, for the sandbox with this run directory whose
    /// disks are `current`; what no guest writes to is the same in both. Shares blocks where the file system
    /// can; else takes the time to copy what guests have written. Undone by [`discard`](Staged::discard), also
    /// after an error.
    ///
    /// A disk that was given by containerd is left as it is, and replaced by one of our own.
    pub fn new(
        cache_dir: &Path,
        run_dir: &Path,
        current: &[Disk],
        snapshot: &[Disk],
    ) -> Result<Staged, RootfsError> {
        let disks = SandboxDisks::create(run_dir, &Cache::open(cache_dir)?)?;
        let mut staged = Staged { moves: Vec::new(), disks: Vec::new() };
        for disk in current {
            let Some(from) = snapshot.iter().find(|from| from.serial == disk.serial && !from.read_only)
            else {
                staged.disks.push(disk.clone());
                continue;
            };
            let (new, path) = (disks.staged(&disk.serial), disks.home_of(disk));
            staged.moves.push((new.clone(), path.clone()));
            staged.disks.push(Disk { path, ..disk.clone() });
            // One that was never renamed.
            let copied = files::remove(&new).and_then(|()| files::copy(&from.path, &new));
            if let Err(e) = copied {
                staged.discard();
                return Err(failed("cannot copy a disk to", &new)(e));
            }
        }
        Ok(staged)
    }

    /// Lets the copies take the place of the disks of a VM that has ended. Gives those of the next one.
    pub fn commit(self) -> Result<Vec<Disk>, RootfsError> {
        for (from, to) in &self.moves {
            fs::rename(from, to).map_err(failed("cannot replace the disk", to))?;
        }
        Ok(self.disks)
    }

    /// Removes the copies.
    pub fn discard(self) {
        for (new, _) in &self.moves {
            if let Err(e) = files::remove(new) {
                tracing::warn!(error = %e, disk = %new.display(), "a copy of a disk stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lab {
        temp: tempfile::TempDir,
    }

    impl Lab {
        fn new() -> Lab {
            let lab = Lab { temp: tempfile::tempdir().unwrap() };
            for dir in ["run", "snapshot"] {
                fs::create_dir(lab.path(dir)).unwrap();
            }
            lab
        }

        fn path(&self, name: &str) -> PathBuf {
            self.temp.path().join(name)
        }

        fn disk(&self, path: &str, serial: &str, read_only: bool, text: &str) -> Disk {
            let path = self.path(path);
            fs::write(&path, text).unwrap();
            Disk { path, serial: serial.into(), read_only }
        }

        fn stage(&self, current: &[Disk], snapshot: &[Disk]) -> Result<Staged, RootfsError> {
            Staged::new(&self.path("cache"), &self.path("run"), current, snapshot)
        }

        /// A sandbox with disks of its own, as made for it.
        fn own(&self) -> Vec<Disk> {
            self.stage(&[], &[]).unwrap();
            vec![
                self.disk("cache/sandboxes/run/a.erofs", "image", true, "image"),
                self.disk("cache/sandboxes/run/a.ext4", "data", false, "now"),
            ]
        }
    }

    fn text(disk: &Disk) -> String {
        fs::read_to_string(&disk.path).unwrap()
    }

    #[test]
    fn what_is_written_to_goes_back_and_the_rest_stays_where_it_is() {
        let lab = Lab::new();
        let current = lab.own();
        let snapshot =
            [lab.disk("snapshot/data", "data", false, "then"), lab.disk("snapshot/image", "image", true, "")];
        let staged = lab.stage(&current, &snapshot).unwrap();
        assert_eq!(text(&current[1]), "now", "before its VM has ended");
        let disks = staged.commit().unwrap();
        let paths = |disks: &[Disk]| disks.iter().map(|disk| disk.path.clone()).collect::<Vec<_>>();
        assert_eq!(paths(&disks), paths(&current));
        assert_eq!((text(&disks[0]).as_str(), text(&disks[1]).as_str()), ("image", "then"));
        assert_eq!(text(&snapshot[0]), "then");
        fs::write(&disks[1].path, "later").unwrap();
        assert_eq!(text(&snapshot[0]), "then", "a snapshot is never changed");
    }

    #[test]
    fn a_disk_of_containerds_is_left_alone() {
        let lab = Lab::new();
        let current = [lab.disk("given", "data", false, "now")];
        let snapshot = [lab.disk("snapshot/data", "data", false, "then")];
        let disks = lab.stage(&current, &snapshot).unwrap().commit().unwrap();
        assert_eq!((text(&current[0]).as_str(), text(&disks[0]).as_str()), ("now", "then"));
        assert!(disks[0].path.starts_with(lab.path("cache/sandboxes")));
    }

    #[test]
    fn what_cannot_be_copied_or_is_not_wanted_leaves_nothing() {
        let lab = Lab::new();
        let current = lab.own();
        let dir = lab.path("cache/sandboxes/run");
        let count = || fs::read_dir(&dir).unwrap().count();
        let before = count();
        let mut snapshot = [lab.disk("snapshot/data", "data", false, "then")];
        lab.stage(&current, &snapshot).unwrap().discard();
        assert_eq!(count(), before);
        snapshot[0].path = lab.path("nosuch");
        lab.stage(&current, &snapshot).unwrap_err();
        assert_eq!((count(), text(&current[1]).as_str()), (before, "now"));
    }
}
