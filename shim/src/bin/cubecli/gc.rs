//! `cubecli cubebox gc`

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use cube_shim::{
    cgroup::SandboxCgroup,
    config::Config,
    log::{
        locate::Name,
        retention::{self, Kept, Reason},
    },
    rootfs::{
        RootfsError,
        block::{Cache, SandboxDisks},
    },
    snapshot::{SnapshotError, Store, Suspended},
    state::{RunDir, StateError},
    text::printable,
    users,
};

use crate::{
    args::GcArgs,
    error::{CliError, complain},
    progress::Progress,
    sandboxes,
    task::Tasks,
    time,
};

/// Time that the kernel has to let go of a cgroup without processes.
const CGROUP_LIMIT: Duration = Duration::from_secs(2);

/// A run directory without a state file may be one that a shim is just making.
const STATELESS_AGE: Duration = Duration::from_secs(60);

pub(crate) fn run(config: &Config, args: &GcArgs, output: File) -> Result<(), CliError> {
    let mut gc = Gc {
        tasks: Tasks::new()?,
        dry_run: args.dry_run,
        output: BufWriter::new(output),
        progress: Progress::of("looking for sandboxes that are gone"),
        failures: 0,
    };
    gc.run_dirs(&config.run_dir)?;
    gc.progress.now("looking for disks that are not used");
    gc.disks(config)?;
    gc.progress.now("looking for parts of snapshots");
    gc.snapshots(config)?;
    gc.progress.now("looking for old logs");
    gc.logs(config)?;
    gc.progress.aside(|| gc.output.flush()).map_err(CliError::Output)?;
    if gc.failures > 0 { Err(CliError::Incomplete(gc.failures)) } else { Ok(()) }
}

/// One run: says what it removes, goes on after a failure.
struct Gc {
    tasks: Tasks,
    dry_run: bool,
    output: BufWriter<File>,
    progress: Progress,
    failures: usize,
}

impl Gc {
    fn run_dirs(&mut self, run_dir: &Path) -> Result<(), CliError> {
        for dir in RunDir::all(run_dir)? {
            match self.run_dir(&dir) {
                Ok(()) => {}
                Err(GcError::Output(e)) => return Err(CliError::Output(e)),
                Err(e) => self.failed(&e),
            }
        }
        Ok(())
    }

    /// Removes the run directory of a sandbox that nothing is left of.
    fn run_dir(&mut self, dir: &RunDir) -> Result<(), GcError> {
        // Whoever starts, deletes or cleans a sandbox holds this lock.
        let _lock = match dir.lock(Duration::ZERO) {
            Ok(Some(lock)) => lock,
            Ok(None) | Err(StateError::Locked { .. }) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        if self.tasks.listens(&dir.path().join("shim.sock")) {
            return Ok(());
        }
        let state = match dir.load()? {
            Some(state) => state,
            None if is_older_than(dir.path(), STATELESS_AGE) => {
                if !self.dry_run {
                    remove(dir)?;
                }
                return Ok(self.say(&format!("{} (no state file)", dir.path().display()))?);
            }
            None => return Ok(()),
        };
        let name = Name { namespace: state.namespace.clone(), id: state.sandbox_id.clone() };
        if SandboxCgroup::at(&state.cgroup).has_processes() {
            let cgroup = state.cgroup.display();
            let dir = dir.path().display();
            let note = "the shim is gone, but processes of the sandbox run in";
            return Ok(self.line(&format!("kept {dir} (sandbox {name}: {note} {cgroup})"))?);
        }
        if !self.dry_run {
            SandboxCgroup::at(&state.cgroup).destroy(CGROUP_LIMIT, state.shim_home.as_deref())?;
            remove(dir)?;
        }
        Ok(self.say(&format!("{} (sandbox {name}: no shim, no processes)", dir.path().display()))?)
    }

    /// Removes disks of sandboxes that are gone, then packed images beyond the limit.
    fn disks(&mut self, config: &Config) -> Result<(), CliError> {
        if !config.rootfs.cache_dir.exists() {
            return Ok(());
        }
        let collect = || -> Result<_, RootfsError> {
            let cache = Cache::open(&config.rootfs.cache_dir)?;
            let orphans = cache.remove_orphans(self.dry_run)?;
            Ok((orphans, cache.evict(config.rootfs.cache_limit, self.dry_run)?))
        };
        let (orphans, evicted) = match collect() {
            Ok(collected) => collected,
            Err(e) => {
                self.failed(&e);
                return Ok(());
            }
        };
        let orphans = orphans.iter().map(|disks| (disks, "disks of a sandbox that is gone"));
        let evicted = evicted.iter().map(|image| (image, "a packed image that no sandbox uses"));
        for (collected, what) in orphans.chain(evicted) {
            let line = format!("{} ({what}, {} MiB)", collected.path.display(), collected.bytes >> 20);
            self.say(&line).map_err(CliError::Output)?;
        }
        Ok(())
    }

    /// Removes snapshots that were left half made, and memory that nobody can go on from.
    fn snapshots(&mut self, config: &Config) -> Result<(), CliError> {
        match Suspended::remove_orphans(&config.snapshot.dir, self.dry_run) {
            Ok(removed) => removed.iter().try_for_each(|path| {
                self.say(&format!("{} (memory of a sandbox that is gone)", path.display()))
                    .map_err(CliError::Output)
            })?,
            Err(e) => self.failed(&e),
        }
        match Store::at(&config.snapshot.dir).collect(self.dry_run) {
            Ok(removed) => removed.iter().try_for_each(|path| {
                self.say(&format!("{} (a part of a snapshot)", path.display())).map_err(CliError::Output)
            }),
            Err(e) => {
                self.failed(&e);
                Ok(())
            }
        }
    }

    fn logs(&mut self, config: &Config) -> Result<(), CliError> {
        let mut logs = Vec::new();
        for (root, namespace) in retention::roots(&config.log) {
            logs.append(&mut retention::kept(root, namespace)?);
        }
        // Read after the logs were listed: the state of a container is there before its log.
        let sandboxes = sandboxes::all(&config.run_dir)?;
        let living: BTreeSet<Name> =
            sandboxes.iter().flat_map(|s| s.containers()).map(|(name, _)| name).collect();
        let lives =
            |log: &Kept| living.contains(&log.name) || sandboxes.iter().any(|s| s.state.logs_to(&log.path));
        logs.retain(|log| !lives(log));
        for (log, reason) in retention::due(logs, &config.log) {
            if !self.dry_run
                && let Err(e) = retention::remove(&log.root, &log.name)
            {
                self.failed(&e);
                continue;
            }
            let why = match reason {
                Reason::Age => String::new(),
                Reason::Total => format!(", {} MiB beyond log.total_limit", log.bytes.div_ceil(1 << 20)),
            };
            let line = format!("{} (unchanged for {}{why})", log.path.display(), time::age(log.age));
            self.say(&line).map_err(CliError::Output)?;
        }
        Ok(())
    }

    fn say(&mut self, what: &str) -> io::Result<()> {
        let verb = if self.dry_run { "would remove" } else { "removed" };
        self.line(&format!("{verb} {what}"))
    }

    fn line(&mut self, line: &str) -> io::Result<()> {
        self.progress.aside(|| writeln!(self.output, "{}", printable(line)))
    }

    fn failed(&mut self, error: &dyn std::error::Error) {
        self.failures += 1;
        self.progress.aside(|| complain(error));
    }
}

/// Why a run directory could not be removed.
#[derive(Debug, thiserror::Error)]
enum GcError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] cube_shim::cgroup::CgroupError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    User(#[from] users::UserError),
    #[error("cannot write the output")]
    Output(#[from] io::Error),
}

/// Unmounts what is mounted below the run directory, then removes it. Never in the other order: what
/// is mounted there are the files of images and volumes.
fn remove(dir: &RunDir) -> Result<(), GcError> {
    dir.unmount()?;
    if let Some(disks) = SandboxDisks::of(dir.path())? {
        disks.remove()?;
    }
    Suspended::remove_of(dir)?;
    users::release_all(dir)?;
    Ok(dir.remove()?)
}

fn is_older_than(path: &Path, age: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|passed| passed >= age))
}
