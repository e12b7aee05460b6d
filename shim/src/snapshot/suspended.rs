//! The memory of a sandbox that is paused to disk: `<snapshot.dir>/.suspended-<key>/`.
//!
//! ```text
//! vm/    memory and devices, as the VMM has written them
//! run    link to the sandbox's run directory
//! ```
//!
//! The memory of a snapshot is linked here, too, while its sandbox is put back to it.
//!
//! It is beside the snapshots because the run directory is on a tmpfs, where it would cost the memory that
//! it is to set free. It is no snapshot: it has no disks, and is of use to the one sandbox that goes on from
//! it. The path is in that sandbox's state file before anything is made, so that clean-up needs nothing
//! else; the link tells which sandbox that is once the state file is gone.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{SnapshotError, failed};
use crate::{
    files,
    state::{RunDir, State},
};

const PREFIX: &str = ".suspended-";
const VM: &str = "vm";
const RUN_DIR: &str = "run";

/// One without a link may be one that is just being made.
const UNLINKED_AGE: Duration = Duration::from_secs(60);

/// The directory for one sandbox, whether it exists or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspended {
    dir: PathBuf,
}

impl Suspended {
    /// That of the sandbox with this run directory, in the store `store`.
    pub fn new(store: &Path, run_dir: &RunDir) -> Suspended {
        Suspended { dir: store.join(format!("{PREFIX}{}", run_dir.key())) }
    }

    /// The one that a state file names. `None` too if it names what cannot be one of this sandbox, which is
    /// then not removed.
    pub fn named_by(state: &State, run_dir: &RunDir) -> Option<Suspended> {
        let dir = state.suspended.clone()?;
        let name = dir.file_name()?.to_str()?;
        (name.strip_prefix(PREFIX)? == run_dir.key()).then_some(Suspended { dir })
    }

    /// Removes the one that the state file in `run_dir` names. One without a readable state file is left to
    /// [`remove_orphans`](Suspended::remove_orphans). May be repeated.
    pub fn remove_of(run_dir: &RunDir) -> Result<(), SnapshotError> {
        let state = run_dir.load().ok().flatten();
        match state.and_then(|state| Suspended::named_by(&state, run_dir)) {
            Some(suspended) => suspended.remove(),
            None => Ok(()),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Where the VMM writes to, and reads from.
    pub fn vm_dir(&self) -> PathBuf {
        self.dir.join(VM)
    }

    /// Makes it, empty and mode 0700.
    pub fn create(&self, run_dir: &RunDir) -> Result<(), SnapshotError> {
        self.remove()?;
        let make = |dir: &Path| files::make_dir(dir).map_err(failed("cannot create", dir));
        make(&self.dir)?;
        let link = self.dir.join(RUN_DIR);
        symlink(run_dir.path(), &link).map_err(failed("cannot create", &link))?;
        make(&self.vm_dir())
    }

    /// Gives it the memory of the snapshot in `dir`: links, which keep what they lead to when the snapshot is
    /// removed.
    pub fn link(&self, dir: &Path) -> Result<(), SnapshotError> {
        let from = dir.join(VM);
        for file in files::entries(&from).map_err(failed("cannot list", &from))? {
            let to = self.vm_dir().join(file.file_name().unwrap_or_default());
            fs::hard_link(&file, &to).map_err(failed("cannot link", &to))?;
        }
        Ok(())
    }

    /// Waits until it is on disk, which is also when a disk tells that it cannot hold it.
    pub fn sync(&self) -> Result<(), SnapshotError> {
        let dir = self.vm_dir();
        for path in files::entries(&dir).map_err(failed("cannot list", &dir))? {
            File::open(&path).and_then(|file| file.sync_all()).map_err(failed("cannot write out", &path))?;
        }
        Ok(())
    }

    /// Removes it. May be repeated.
    pub fn remove(&self) -> Result<(), SnapshotError> {
        files::remove(&self.dir).map_err(failed("cannot remove", &self.dir))
    }

    /// Removes those in `store` whose sandbox is gone. Gives what was removed, or with `dry_run` would be.
    pub fn remove_orphans(store: &Path, dry_run: bool) -> Result<Vec<PathBuf>, SnapshotError> {
        let entries = match files::entries(store) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed("cannot list", store))?,
        };
        let is_one = |path: &PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX))
        };
        let mut removed = Vec::new();
        for dir in entries.into_iter().filter(is_one) {
            let suspended = Suspended { dir };
            if suspended.has_owner() {
                continue;
            }
            if !dry_run {
                suspended.remove()?;
            }
            removed.push(suspended.dir);
        }
        Ok(removed)
    }

    /// Whether a sandbox that exists names it. In doubt it does.
    fn has_owner(&self) -> bool {
        let Ok(run_dir) = fs::read_link(self.dir.join(RUN_DIR)) else {
            let made = fs::metadata(&self.dir).and_then(|meta| meta.modified());
            let age = made.map(|made| SystemTime::now().duration_since(made).unwrap_or_default());
            return age.is_ok_and(|age| age < UNLINKED_AGE);
        };
        match RunDir::at(run_dir).load() {
            Ok(Some(state)) => state.suspended.is_some_and(|named| files::is_same(&named, &self.dir)),
            Ok(None) => false,
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::state::FORMAT;

    struct Lab {
        temp: tempfile::TempDir,
        run_dir: RunDir,
        suspended: Suspended,
    }

    impl Lab {
        fn new() -> Lab {
            let temp = tempfile::tempdir().unwrap();
            let run_dir = RunDir::of(&temp.path().join("run"), "/c", "default", "c1");
            run_dir.create().unwrap();
            let suspended = Suspended::new(&temp.path().join("store"), &run_dir);
            Lab { temp, run_dir, suspended }
        }

        fn state(&self, suspended: Option<&Path>) -> State {
            State {
                format: FORMAT,
                namespace: "default".into(),
                sandbox_id: "c1".into(),
                cgroup: "/no/such/cgroup".into(),
                shim_home: None,
                backend: "fake".into(),
                user: 0,
                vmm_pid: 7,
                timeline: 1,
                past_timelines: Vec::new(),
                suspended: suspended.map(Into::into),
                created_ns: 1,
                containers: Default::default(),
            }
        }

        fn orphans(&self, dry_run: bool) -> Vec<PathBuf> {
            Suspended::remove_orphans(&self.temp.path().join("store"), dry_run).unwrap()
        }
    }

    #[test]
    fn it_is_for_its_owner_alone_and_begins_empty() {
        let lab = Lab::new();
        lab.suspended.create(&lab.run_dir).unwrap();
        fs::write(lab.suspended.vm_dir().join("memory-ranges"), "x").unwrap();
        lab.suspended.sync().unwrap();
        lab.suspended.create(&lab.run_dir).unwrap();
        assert_eq!(fs::read_dir(lab.suspended.vm_dir()).unwrap().count(), 0);
        for dir in [lab.suspended.path(), &lab.suspended.vm_dir()] {
            assert_eq!(fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o700);
        }
        lab.suspended.remove().unwrap();
        lab.suspended.remove().unwrap();
        assert!(!lab.suspended.path().exists());
    }

    #[test]
    fn a_state_file_cannot_have_anything_else_removed() {
        let lab = Lab::new();
        let named = |path: &Path| Suspended::named_by(&lab.state(Some(path)), &lab.run_dir);
        assert_eq!(named(lab.suspended.path()), Some(lab.suspended.clone()));
        assert_eq!(Suspended::named_by(&lab.state(None), &lab.run_dir), None);
        for other in ["/", "/etc", "/store/.suspended-0123", "/store/.suspended-"] {
            assert_eq!(named(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn removing_it_costs_nobody_a_file() {
        let run_dir = |root: &Path| RunDir::of(&root.join("run"), "/c", "default", "c1");
        let make = |root: &Path| {
            let (run_dir, suspended) = (run_dir(root), Suspended::new(root, &run_dir(root)));
            suspended.create(&run_dir).unwrap();
            fs::write(suspended.vm_dir().join("memory-ranges"), "x").unwrap();
            suspended.dir
        };
        let remove = |root: &Path| Suspended::new(root, &run_dir(root)).remove();
        files::testing::costs_nobody_a_file(make, remove);
        files::testing::costs_nobody_a_file(make, |root| {
            // One that is half removed has no link any more.
            let opened = File::open(Suspended::new(root, &run_dir(root)).path()).unwrap();
            opened.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            Suspended::remove_orphans(root, false).map(drop)
        });
    }

    #[test]
    fn a_store_that_is_named_otherwise_now_keeps_what_its_sandboxes_wait_for() {
        let lab = Lab::new();
        lab.suspended.create(&lab.run_dir).unwrap();
        let link = lab.temp.path().join("link");
        symlink(lab.temp.path().join("store"), &link).unwrap();
        let before = link.join(lab.suspended.path().file_name().unwrap());
        lab.run_dir.create().unwrap();
        lab.run_dir.save(&lab.state(Some(&before))).unwrap();
        assert!(lab.orphans(false).is_empty());
        assert!(lab.suspended.path().exists());
    }

    #[test]
    fn one_whose_sandbox_is_gone_is_an_orphan() {
        let lab = Lab::new();
        assert!(lab.orphans(false).is_empty(), "there is no store yet");
        lab.suspended.create(&lab.run_dir).unwrap();
        lab.run_dir.save(&lab.state(Some(lab.suspended.path()))).unwrap();
        assert!(lab.orphans(false).is_empty());
        lab.run_dir.save(&lab.state(None)).unwrap();
        assert_eq!(lab.orphans(true), [lab.suspended.path()]);
        assert!(lab.suspended.path().exists());
        lab.run_dir.remove().unwrap();
        assert_eq!(lab.orphans(false), [lab.suspended.path()]);
        assert!(!lab.suspended.path().exists());
    }
}
