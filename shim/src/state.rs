//! What a sandbox leaves on disk: its run directory and `state.json` in it.
//!
//! Clean-up after a crash knows nothing but these files, so the state is written before anything
//! that it describes is made, and replaced atomically. The run directory is on a tmpfs in any sane
//! set-up: what is here need not survive the host, only the processes.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, Metadata},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::files;

/// Name of the state file in the run directory.
pub const FILE: &str = "state.json";

/// Name of the shim's socket there.
const SOCKET: &str = "shim.sock";

/// Version of the file that this build writes, and the only one that it reads.
pub const FORMAT: u32 = 1;

/// Longest path that `sun_path` of unix(7) holds, without the final zero.
const SOCKET_PATH_MAX: usize = 107;

/// Everything about a sandbox that must outlive its shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    /// containerd namespace.
    pub namespace: String,
    /// Id of the sandbox: of its first container, or of the pod.
    pub sandbox_id: String,
    /// The cgroup v2 directory of the sandbox's VM: everything of the sandbox on the host is in it but the shim,
    /// which is beside it. See [`SandboxCgroup`](crate::cgroup::SandboxCgroup).
    pub cgroup: PathBuf,
    /// The cgroup that the shim came from, and goes back to at the end; `None` if it was not moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shim_home: Option<PathBuf>,
    /// Name of the VMM backend; empty until it is chosen.
    pub backend: String,
    /// The first of the two users that its processes run as, see [`users`](crate::users); 0 before it has some.
    #[serde(default)]
    pub user: u32,
    /// Pid that containerd is told for every process of the sandbox; 0 before the VM runs. For
    /// display and for `shim delete`'s answer, never for signals.
    pub vmm_pid: u32,
    /// Timeline that the guest is on; 0 before the VM runs.
    pub timeline: u64,
    /// The timelines that led to this one, the oldest first: those that the sandbox was on before a
    /// rollback, and the one of the snapshot that it was restored from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub past_timelines: Vec<PastTimeline>,
    /// Where the memory of a sandbox is that is paused to disk, or is to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<PathBuf>,
    /// When the shim began, nanoseconds since 1970.
    pub created_ns: u64,
    /// By id.
    pub containers: BTreeMap<String, ContainerState>,
}

/// A timeline that led to the one that a sandbox is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastTimeline {
    /// Its id.
    pub timeline: u64,
    /// The part of it until then, nanoseconds since 1970; all of it, if it was this sandbox's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ns: Option<u64>,
}

impl PastTimeline {
    /// Whether a snapshot taken at this time on `timeline` is a part of it.
    pub fn has(&self, timeline: u64, created_ns: u64) -> bool {
        self.timeline == timeline && self.until_ns.is_none_or(|until| created_ns <= until)
    }
}

/// A container of [`State`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// The bundle that containerd made.
    pub bundle: PathBuf,
    /// Directory of its log; `None` if its output is not logged.
    pub log_dir: Option<PathBuf>,
    /// When containerd asked for it, nanoseconds since 1970.
    pub created_ns: u64,
    /// Its id in the guest, if that is another one: it was restored from a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_id: Option<String>,
}

impl State {
    /// Whether the log of a container is in the directory `log_dir`.
    pub fn logs_to(&self, log_dir: &Path) -> bool {
        self.containers.values().any(|container| container.logs_to(log_dir))
    }
}

impl ContainerState {
    /// Whether its log is in the directory `log_dir`, by whatever path.
    pub fn logs_to(&self, log_dir: &Path) -> bool {
        self.log_dir.as_deref().is_some_and(|own| files::is_same(own, log_dir))
    }

    /// The id in the guest of the container that is `id` for containerd.
    pub fn guest_id<'a>(&'a self, id: &'a str) -> &'a str {
        self.guest_id.as_deref().unwrap_or(id)
    }
}

/// A run directory or state file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a state of this format.
    #[error("{path} is not a state file of this version")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// There is something that is not a run directory of ours, or `run_dir` is open to others.
    #[error(
        "{path} is {found}: it must be a directory that {rule}. Find out who made it, and remove it or choose another run_dir"
    )]
    Foreign {
        /// What is there.
        path: PathBuf,
        /// What it is, with owner and mode.
        found: String,
        /// What it must be.
        rule: String,
    },
    /// The run directory's path leaves no room for a socket's name.
    #[error("the socket path {path} has more than {SOCKET_PATH_MAX} bytes: set run_dir to a shorter path")]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else holds the lock.
    #[error("the lock of {path} was not free within {limit:?}")]
    Locked {
        /// The run directory.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io { action, path: path.into(), source }
}

/// Nanoseconds since 1970.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The run directory of one sandbox, `<run_dir>/<key>/`, whether it exists or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

/// The lock of a run directory; given back when dropped.
#[derive(Debug)]
pub struct RunDirLock {
    _directory: Flock<File>,
}

impl RunDir {
    /// The directory of sandbox `id` in `namespace` of the containerd behind `ttrpc_address`. The
    /// address is part of the key because two containerds may run on one host.
    pub fn of(run_dir: &Path, ttrpc_address: &str, namespace: &str, id: &str) -> RunDir {
        let address = ttrpc_address.strip_prefix("unix://").unwrap_or(ttrpc_address);
        let digest = Sha256::digest(format!("{address}\0{namespace}\0{id}"));
        let key: String = digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect();
        RunDir(run_dir.join(key))
    }

    /// The one at this path, which somebody has noted.
    pub fn at(path: impl Into<PathBuf>) -> RunDir {
        RunDir(path.into())
    }

    /// The directory that holds `socket`, which is what a bundle's `address` file names. `None` if that cannot be
    /// a shim's: the directory may be removed.
    pub fn of_socket(socket: &Path) -> Option<RunDir> {
        let dir = RunDir(socket.parent()?.into());
        (socket.file_name()? == SOCKET && RunDir::is_key(dir.key())).then_some(dir)
    }

    /// Every run directory of ours below `run_dir`, in the order of their keys. None if that does not exist.
    pub fn all(run_dir: &Path) -> Result<Vec<RunDir>, StateError> {
        let entries = match fs::read_dir(run_dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed("cannot list", run_dir)(e)),
        };
        let mut dirs = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("cannot list", run_dir))?;
            // What others have put there says nothing about sandboxes.
            let is_ours = |meta: Metadata| meta.is_dir() && [0, geteuid().as_raw()].contains(&meta.uid());
            if entry.metadata().is_ok_and(is_ours) && entry.file_name().to_str().is_some_and(RunDir::is_key) {
                dirs.push(RunDir(entry.path()));
            }
        }
        dirs.sort_by(|a, b| a.key().cmp(b.key()));
        Ok(dirs)
    }

    /// Whether a run directory can have this name.
    pub(crate) fn is_key(name: &str) -> bool {
        name.len() == 20 && name.bytes().all(|b| b.is_ascii_hexdigit())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Last component of its path: 20 hex digits that also name the cgroup.
    pub fn key(&self) -> &str {
        self.0.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// The shim's ttrpc socket.
    ///
    /// # Errors
    ///
    /// [`StateError::SocketPath`] if the kernel would not take the path.
    pub fn socket(&self) -> Result<PathBuf, StateError> {
        let path = self.0.join(SOCKET);
        if path.as_os_str().len() > SOCKET_PATH_MAX { Err(StateError::SocketPath { path }) } else { Ok(path) }
    }

    /// Makes the directory and its parents, mode 0700. It may exist if it is as this would have made it.
    ///
    /// # Errors
    ///
    /// [`StateError::Foreign`] if it is another's, or a link, or somebody else may put things beside it: what is
    /// in it says what clean-up unmounts and removes.
    pub fn create(&self) -> Result<(), StateError> {
        let above = self.0.parent().unwrap_or(&self.0);
        files::make_dir(above).map_err(failed("cannot create", above))?;
        // `run_dir` itself may be a link: that was the administrator's choice.
        let meta = fs::metadata(above).map_err(failed("cannot look at", above))?;
        must_be(above, &meta, meta.mode() & 0o022 == 0, "nobody else can write to")?;
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map_err(failed("cannot create", &self.0)),
        }
        match fs::symlink_metadata(&self.0) {
            Ok(meta) => must_be(&self.0, &meta, meta.mode() & 0o777 == 0o700, "has mode 0700"),
            // Removed meanwhile: whoever takes the lock notices.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed("cannot look at", &self.0)(e)),
        }
    }

    /// Takes the exclusive lock, waiting at most `limit`. Blocks the thread. The lock is on the
    /// directory itself, so that removing it leaves nothing behind; `None` if it does not exist.
    pub fn lock(&self, limit: Duration) -> Result<Option<RunDirLock>, StateError> {
        let begun = Instant::now();
        let flags = libc::O_NOFOLLOW | libc::O_DIRECTORY;
        let mut directory = match File::options().read(true).custom_flags(flags).open(&self.0) {
            Ok(directory) => directory,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("cannot open", &self.0)(e)),
        };
        loop {
            directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                // Whoever held it before may have removed the directory.
                Ok(lock) if !files::is_at(&*lock, &self.0) => return Ok(None),
                Ok(lock) => return Ok(Some(RunDirLock { _directory: lock })),
                Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
                Err((_, errno)) => return Err(failed("cannot lock", &self.0)(errno.into())),
            };
            if begun.elapsed() >= limit {
                return Err(StateError::Locked { path: self.0.clone(), limit });
            }
            // flock(2) has no time limit of its own.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Replaces the state file.
    pub fn save(&self, state: &State) -> Result<(), StateError> {
        let (path, new) = (self.0.join(FILE), self.0.join("state.json.new"));
        let text = serde_json::to_vec_pretty(state)
            .map_err(|source| StateError::Parse { path: path.clone(), source })?;
        let write = || {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_data()?;
            fs::rename(&new, &path)
        };
        write().map_err(failed("cannot write", &path))
    }

    /// Reads the state file; `None` if there is none.
    pub fn load(&self) -> Result<Option<State>, StateError> {
        let path = self.0.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("cannot read", &path)(e)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| StateError::Parse { path, source })
    }

    /// Unmounts whatever is mounted at and below the directory. May be repeated.
    pub fn unmount(&self) -> Result<(), StateError> {
        files::unmount(&self.0).map_err(failed("cannot unmount what is below", &self.0))
    }

    /// Removes the directory with all that is in it. Ends with an error where something is still mounted: that
    /// stays. May be repeated.
    pub fn remove(&self) -> Result<(), StateError> {
        files::remove(&self.0).map_err(failed("cannot remove", &self.0))
    }
}

/// [`StateError::Foreign`] unless this is a directory of this user's of which `holds` is true, as `rule` says.
fn must_be(path: &Path, meta: &Metadata, holds: bool, rule: &'static str) -> Result<(), StateError> {
    let user = geteuid().as_raw();
    if meta.is_dir() && meta.uid() == user && holds {
        return Ok(());
    }
    let kind = match meta.file_type() {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_symlink() => "a symbolic link",
        _ => "no directory",
    };
    let found = format!("{kind} of user {} with mode {:04o}", meta.uid(), meta.mode() & 0o7777);
    Err(StateError::Foreign { path: path.into(), found, rule: format!("belongs to user {user} and {rule}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> State {
        let container = ContainerState {
            bundle: "/b/c1".into(),
            log_dir: Some("/l/c1".into()),
            created_ns: 7,
            guest_id: None,
        };
        State {
            format: FORMAT,
            namespace: "default".into(),
            sandbox_id: "c1".into(),
            cgroup: "/sys/fs/cgroup/cube/x/vm".into(),
            shim_home: Some("/sys/fs/cgroup/system.slice".into()),
            backend: "qemu".into(),
            user: 0,
            vmm_pid: 42,
            timeline: u64::MAX,
            past_timelines: vec![PastTimeline { timeline: u64::MAX - 1, until_ns: None }],
            suspended: Some("/s/.suspended-x".into()),
            created_ns: 6,
            containers: [("c1".to_owned(), container)].into(),
        }
    }

    fn run_dir(root: &tempfile::TempDir) -> RunDir {
        RunDir::of(root.path(), "/run/containerd/containerd.sock.ttrpc", "default", "c1")
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(&root);
        assert_eq!(dir.load().unwrap(), None);
        dir.create().unwrap();
        dir.save(&example()).unwrap();
        assert_eq!(dir.load().unwrap(), Some(example()));
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert_eq!(dir.load().unwrap(), None);
    }

    #[test]
    fn what_exists_is_taken_only_if_it_is_as_it_would_have_been_made() {
        use std::os::unix::fs::{PermissionsExt, chown, symlink};
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(&root);
        let set_mode =
            |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let refused = |words: &[&str]| {
            let error = dir.create().unwrap_err();
            assert!(matches!(error, StateError::Foreign { .. }), "{error}");
            words.iter().for_each(|word| assert!(error.to_string().contains(word), "{error}"));
        };
        dir.create().unwrap();
        dir.create().unwrap();
        for mode in [0o755, 0o777, 0o770, 0o1777] {
            set_mode(dir.path(), mode);
            refused(&[&format!("mode {mode:04o}"), "has mode 0700"]);
        }
        set_mode(dir.path(), 0o700);
        chown(dir.path(), Some(1), None).unwrap();
        refused(&["user 1 ", "belongs to user 0"]);
        assert!(RunDir::all(root.path()).unwrap().is_empty());
        fs::remove_dir(dir.path()).unwrap();
        let elsewhere = root.path().join("elsewhere");
        DirBuilder::new().mode(0o700).create(&elsewhere).unwrap();
        symlink(&elsewhere, dir.path()).unwrap();
        refused(&["symbolic link"]);
        assert!(dir.lock(Duration::ZERO).is_err(), "the lock of another directory");
        fs::remove_file(dir.path()).unwrap();
        fs::write(dir.path(), "").unwrap();
        refused(&["no directory"]);
        fs::remove_file(dir.path()).unwrap();
        assert!(RunDir::all(root.path()).unwrap().is_empty());
        // Whoever may rename what is beside it may put another in its place.
        for mode in [0o777, 0o1777, 0o730] {
            set_mode(root.path(), mode);
            refused(&["nobody else can write to"]);
        }
        set_mode(root.path(), 0o755);
        dir.create().unwrap();
    }

    #[test]
    fn removing_a_run_directory_costs_nobody_a_file() {
        let of = |root: &Path| RunDir::of(root, "/a", "default", "c1");
        files::testing::costs_nobody_a_file(
            |root| {
                let dir = of(root);
                dir.create().unwrap();
                dir.save(&example()).unwrap();
                dir.path().into()
            },
            |root| of(root).remove(),
        );
    }

    #[test]
    fn a_reader_never_sees_half_a_state() {
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(&root);
        dir.create().unwrap();
        dir.save(&example()).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..200).for_each(|_| dir.save(&example()).unwrap()));
            while !writer.is_finished() {
                assert_eq!(dir.load().unwrap(), Some(example()));
            }
        });
    }

    #[test]
    fn the_same_id_behind_another_containerd_or_namespace_is_another_sandbox() {
        let of = |address, namespace| RunDir::of(Path::new("/run/cube"), address, namespace, "c1");
        assert_ne!(of("/a", "default"), of("/b", "default"));
        assert_ne!(of("/a", "default"), of("/a", "k8s.io"));
        assert_eq!(of("/a", "default"), of("unix:///a", "default"));
        assert_eq!(of("/a", "default").key().len(), 20);
    }

    #[test]
    fn a_path_that_no_socket_fits_into_is_refused_with_advice() {
        let long = format!("/{}", "x".repeat(100));
        let error = RunDir::of(Path::new(&long), "/a", "n", "c").socket().unwrap_err().to_string();
        assert!(error.contains("run_dir"), "{error}");
    }

    #[test]
    fn a_lock_that_is_held_is_waited_for_and_a_removed_directory_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let dir = run_dir(&root);
        dir.create().unwrap();
        let held = dir.lock(Duration::ZERO).unwrap().unwrap();
        assert!(matches!(dir.lock(Duration::from_millis(50)), Err(StateError::Locked { .. })));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| dir.lock(Duration::from_secs(20)).unwrap().is_none());
            dir.remove().unwrap();
            drop(held);
            assert!(waiter.join().unwrap());
        });
    }
}
