//! Logs whose retention is over, removed by the next shim that starts.

use std::time::Duration;

use tracing::{debug, info, warn};

use crate::{
    config::Config,
    errors::chain,
    log::{
        locate::{self, Name},
        retention,
    },
    state::{RunDir, State, StateError},
};

/// Removes the logs of deleted containers whose time is over. Every shim does it, so that no timer is
/// needed where containers come and go.
pub(super) fn remove_logs(config: &Config) {
    let root = &config.log.dir;
    if root.as_os_str() == locate::BUNDLE {
        return;
    }
    let retention = Duration::from_secs(config.log.retention_hours.saturating_mul(3600));
    let expired = retention::expired(root, retention, |_| false).unwrap_or_else(|e| {
        // The first container of a host makes the directory.
        debug!("cannot look for expired logs: {}", chain(&e));
        Vec::new()
    });
    if expired.is_empty() {
        return;
    }
    // Read after the logs were listed: the state of a container is there before its log. Without all
    // states nobody knows who lives.
    let states: Result<Vec<Option<State>>, StateError> =
        RunDir::all(&config.run_dir).and_then(|dirs| dirs.iter().map(RunDir::load).collect());
    let states = match states {
        Ok(states) => states,
        Err(e) => return warn!("expired logs stay: {}", chain(&e)),
    };
    let lives = |name: &Name| {
        states.iter().flatten().any(|s| s.namespace == name.namespace && s.containers.contains_key(&name.id))
    };
    for log in expired.iter().filter(|log| !lives(&log.name)) {
        match retention::remove(root, &log.name) {
            Ok(()) => info!(path = %log.path.display(), "expired log removed"),
            // Another shim may be at it as well.
            Err(e) => debug!("cannot remove an expired log: {}", chain(&e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::state::{ContainerState, FORMAT};

    #[test]
    fn the_logs_of_the_deleted_go_and_those_of_the_living_stay() {
        let root = tempfile::tempdir().unwrap();
        let mut config = Config { run_dir: root.path().join("run"), ..Config::default() };
        config.log.dir = root.path().join("log");
        config.log.retention_hours = 0;
        for id in ["deleted", "living"] {
            let dir = config.log.dir.join("default").join(id);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("stdout"), "x").unwrap();
        }
        let dir = RunDir::of(&config.run_dir, "address", "default", "living");
        fs::create_dir_all(&config.run_dir).unwrap();
        dir.create().unwrap();
        let container = ContainerState { bundle: "/b".into(), log_dir: None, created_ns: 1 };
        dir.save(&State {
            format: FORMAT,
            namespace: "default".into(),
            sandbox_id: "living".into(),
            cgroup: "/sys/fs/cgroup/cube/x".into(),
            backend: "qemu".into(),
            vmm_pid: 1,
            timeline: 1,
            created_ns: 1,
            containers: [("living".to_owned(), container)].into(),
        })
        .unwrap();
        remove_logs(&config);
        let left: Vec<_> = fs::read_dir(config.log.dir.join("default")).unwrap().flatten().collect();
        assert_eq!(left.iter().map(|entry| entry.file_name()).collect::<Vec<_>>(), ["living"]);
    }
}
