//! Freezing every process of a cgroup and those below it, with the cgroup v2 core's own freezer.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{super::ContainerError, is_gone, stats};

/// How often to look whether everything stands still. The kernel also notifies, but at most once in 10 ms
/// for each file (kernel/cgroup/cgroup.c, CGROUP_FILE_NOTIFY_MIN_INTV): the news of a freeze that soon
/// follows a thaw, or the exit of a container, comes late, by half of what a pause may take.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Freezes the cgroup that holds the cgroups of all containers, or that of one.
///
/// A frozen process can still be killed, and stays frozen if whoever froze it dies.
#[derive(Debug)]
pub struct Freezer {
    path: PathBuf,
    scope: Scope,
}

/// Whose cgroup it is.
#[derive(Debug, Clone, Copy)]
enum Scope {
    All,
    One,
}

impl Freezer {
    /// For the cgroup v2 directory `path`, in which each directory is the cgroup of one container.
    pub fn new(path: PathBuf) -> Freezer {
        Freezer { path, scope: Scope::All }
    }

    /// For the cgroup v2 directory `path` of one container, named after it.
    pub fn of_one(path: PathBuf) -> Freezer {
        Freezer { path, scope: Scope::One }
    }

    /// Freezes, and resolves once every process stands still. On an error they run again. Cancelling
    /// leaves them freezing. Can be repeated.
    pub async fn freeze(&self, limit: Duration) -> Result<(), ContainerError> {
        let frozen = timeout(limit, self.frozen()).await.unwrap_or_else(|_elapsed| {
            Err(ContainerError::NotFrozen { containers: self.unfrozen().unwrap_or_default(), limit })
        });
        if frozen.is_err()
            && let Err(error) = self.thaw()
        {
            log::error!("after a freeze that failed: {error}");
        }
        frozen
    }

    /// Lets them run again. Can be repeated.
    pub fn thaw(&self) -> Result<(), ContainerError> {
        self.write("0")
    }

    async fn frozen(&self) -> Result<(), ContainerError> {
        let path = self.path.join("cgroup.events");
        self.write("1")?;
        while !is_frozen(&path).map_err(|source| ContainerError::cgroup("cannot read", &path, source))? {
            sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    }

    /// Names of the containers that are not frozen.
    fn unfrozen(&self) -> io::Result<Vec<String>> {
        if let (Scope::One, Some(name)) = (self.scope, self.path.file_name()) {
            return Ok(vec![name.to_string_lossy().into_owned()]);
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            match is_frozen(&entry.path().join("cgroup.events")) {
                Ok(false) => names.push(entry.file_name().to_string_lossy().into_owned()),
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn write(&self, value: &str) -> Result<(), ContainerError> {
        let path = self.path.join("cgroup.freeze");
        fs::write(&path, value)
            .map_err(|source| ContainerError::cgroup(format!("cannot write {value} to"), path, source))
    }
}

/// Whether a `cgroup.events` file says that every process in the cgroup and below it is frozen.
fn is_frozen(path: &Path) -> io::Result<bool> {
    Ok(stats::field(&fs::read_to_string(path)?, "frozen") == Some(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files such as the kernel shows for a cgroup with two containers.
    fn cgroup(frozen: [u8; 2]) -> tempfile::TempDir {
        let cgroup = tempfile::tempdir().unwrap();
        let events = |frozen| format!("populated 1\nfrozen {frozen}\n");
        fs::write(cgroup.path().join("cgroup.events"), events(0)).unwrap();
        fs::write(cgroup.path().join("cgroup.freeze"), "0").unwrap();
        for (name, frozen) in ["c1", "c2"].into_iter().zip(frozen) {
            fs::create_dir(cgroup.path().join(name)).unwrap();
            fs::write(cgroup.path().join(name).join("cgroup.events"), events(frozen)).unwrap();
        }
        cgroup
    }

    fn asked(cgroup: &tempfile::TempDir) -> String {
        fs::read_to_string(cgroup.path().join("cgroup.freeze")).unwrap()
    }

    #[tokio::test]
    async fn the_container_that_does_not_come_to_rest_is_named_and_all_run_again() {
        let cgroup = cgroup([1, 0]);
        let freezer = Freezer::new(cgroup.path().into());
        let error = freezer.freeze(Duration::from_millis(20)).await.unwrap_err();
        assert!(error.to_string().starts_with("container \"c2\" cannot be frozen within 20ms"), "{error}");
        assert_eq!(asked(&cgroup), "0");
    }

    #[tokio::test]
    async fn one_that_does_not_come_to_rest_is_named_by_its_own_cgroup() {
        let cgroup = cgroup([0, 0]);
        let one = cgroup.path().join("c1");
        let error = Freezer::of_one(one.clone()).freeze(Duration::from_millis(20)).await.unwrap_err();
        assert!(error.to_string().starts_with("container \"c1\" cannot be frozen within 20ms"), "{error}");
        assert_eq!(fs::read_to_string(one.join("cgroup.freeze")).unwrap(), "0");
        assert_eq!(asked(&cgroup), "0", "the others are left alone");
    }

    #[tokio::test]
    async fn a_freeze_ends_when_everything_stands_still() {
        let cgroup = cgroup([0, 0]);
        let freezer = Freezer::new(cgroup.path().into());
        let freezing = freezer.freeze(Duration::from_secs(60));
        let kernel = async {
            while asked(&cgroup) != "1" {
                tokio::task::yield_now().await;
            }
            fs::write(cgroup.path().join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        };
        let (frozen, ()) = tokio::join!(freezing, kernel);
        frozen.unwrap();
        assert_eq!(asked(&cgroup), "1");
    }

    #[tokio::test]
    async fn a_cgroup_that_cannot_be_frozen_is_an_error_that_names_the_file() {
        let nowhere = tempfile::tempdir().unwrap();
        let error = Freezer::new(nowhere.path().into()).freeze(Duration::from_secs(60)).await.unwrap_err();
        assert!(error.to_string().contains("cgroup."), "{error}");
    }
}
