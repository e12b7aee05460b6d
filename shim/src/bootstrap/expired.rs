//! What nobody else removes, removed by the next shim that starts: logs whose retention is over, and run
//! directories of shims that died before containerd knew of them.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use tracing::{debug, info, warn};

use crate::{
    config::Config,
    errors::chain,
    log::{
        locate::Name,
        retention::{self, Kept},
    },
    state::{RunDir, State, StateError},
};

/// A run directory without a state file may be one that a shim is just making.
const STATELESS_AGE: Duration = Duration::from_secs(60);

/// Removes run directories that a `start` has left which was killed: containerd runs no `delete` for it.
pub(super) fn remove_run_dirs(config: &Config) {
    let dirs = RunDir::all(&config.run_dir).unwrap_or_else(|e| {
        debug!("cannot look for abandoned run directories: {}", chain(&e));
        Vec::new()
    });
    for dir in dirs.iter().filter(|dir| is_stateless(dir)) {
        // Whoever holds the lock is using it.
        let removed = match dir.lock(Duration::ZERO) {
            Ok(Some(lock)) => super::delete::remove_if_unused(dir, &lock),
            Ok(None) | Err(StateError::Locked { .. }) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(e) = removed {
            warn!("cannot remove an abandoned run directory: {}", chain(&e));
        }
    }
}

fn is_stateless(dir: &RunDir) -> bool {
    let modified = fs::metadata(dir.path()).and_then(|metadata| metadata.modified());
    let age = modified.ok().and_then(|time| SystemTime::now().duration_since(time).ok());
    age.is_some_and(|age| age >= STATELESS_AGE) && matches!(dir.load(), Ok(None))
}

/// Removes the logs of deleted containers, and of templates, whose time is over, and the oldest of those that
/// are too many. Every shim does it, so that no timer is needed where containers come and go.
pub(super) fn remove_logs(config: &Config) {
    let all = retention::roots(&config.log).into_iter().map(|(root, namespace)| {
        retention::kept(root, namespace).unwrap_or_else(|e| {
            // The first container of a host makes the directory.
            debug!("cannot look for expired logs: {}", chain(&e));
            Vec::new()
        })
    });
    let mut logs: Vec<Kept> = all.flatten().collect();
    if retention::due(logs.clone(), &config.log).is_empty() {
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
    let lives = |log: &Kept| {
        let Name { namespace, id } = &log.name;
        states.iter().flatten().any(|state| {
            state.namespace == *namespace && state.containers.contains_key(id) || state.logs_to(&log.path)
        })
    };
    logs.retain(|log| !lives(log));
    for (log, reason) in retention::due(logs, &config.log) {
        match retention::remove(&log.root, &log.name) {
            Ok(()) => info!(path = %log.path.display(), ?reason, "log of a deleted container removed"),
            // Another shim may be at it as well.
            Err(e) => debug!("cannot remove an expired log: {}", chain(&e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::state::{ContainerState, FORMAT};

    #[test]
    fn a_run_directory_goes_if_it_is_old_and_has_neither_state_nor_shim() {
        let root = tempfile::tempdir().unwrap();
        let config = Config { run_dir: root.path().join("run"), ..Config::default() };
        let make = |id: &str| {
            let dir = RunDir::of(&config.run_dir, "address", "default", id);
            dir.create().unwrap();
            let socket = UnixListener::bind(dir.socket().unwrap()).unwrap();
            (dir, socket)
        };
        let age = |dir: &RunDir| {
            fs::File::open(dir.path()).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        };
        let (abandoned, socket) = make("abandoned");
        drop(socket);
        let (young, socket) = make("young");
        drop(socket);
        let (served, _socket) = make("served");
        age(&abandoned);
        age(&served);
        remove_run_dirs(&config);
        let left = [&abandoned, &young, &served].map(|dir| dir.path().exists());
        assert_eq!(left, [false, true, true]);
    }

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
        let container = ContainerState { bundle: "/b".into(), log_dir: None, created_ns: 1, guest_id: None };
        let template_dir = root.path().join("templates");
        for id in ["over", "built"] {
            fs::create_dir_all(template_dir.join(id)).unwrap();
            fs::write(template_dir.join(id).join("stderr"), "x").unwrap();
        }
        let build = ContainerState { log_dir: Some(template_dir.join("built")), ..container.clone() };
        config.log.template_dir = template_dir.clone();
        dir.save(&State {
            format: FORMAT,
            namespace: "default".into(),
            sandbox_id: "living".into(),
            cgroup: "/sys/fs/cgroup/cube/x".into(),
            shim_home: None,
            backend: "qemu".into(),
            user: 0,
            vmm_pid: 1,
            timeline: 1,
            past_timelines: Vec::new(),
            suspended: None,
            created_ns: 1,
            containers: [("living".to_owned(), container), ("builder".to_owned(), build)].into(),
        })
        .unwrap();
        remove_logs(&config);
        for (dir, expected) in [(config.log.dir.join("default"), "living"), (template_dir, "built")] {
            let left: Vec<_> = fs::read_dir(dir).unwrap().flatten().collect();
            assert_eq!(left.iter().map(|entry| entry.file_name()).collect::<Vec<_>>(), [expected]);
        }
    }
}
