//! A lab in which processes are killed: at random, or at the points that `fault/` names.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cube_test_writer::fill;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    command::poll,
    guest::Guest,
    lab::{Lab, Setup},
    leftovers, logs,
    needs::Backend,
    paths, soak,
};

/// containerd gives `shim delete` 5 s. What takes longer than this will be too long somewhere.
const CLEANUP_LIMIT: Duration = Duration::from_secs(4);

/// Which programs a lab runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Programs {
    /// Those that are shipped.
    Shipped,
    /// Those that die at named points.
    WithFaultPoints,
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The daemon of the sandbox.
    Shim,
    /// The VMM; on the process backend what clients take for it, which takes the agent along.
    Vmm,
    /// The agent, where it is a process of this host.
    Agent,
}

/// See the module.
#[derive(Debug)]
pub struct KillLab {
    /// containerd and all the rest.
    pub lab: Lab,
    /// Holds the shim that containerd runs: a script that times clean-ups.
    scripts: TempDir,
}

impl KillLab {
    /// A lab with this `[log]` table.
    pub fn new(backend: Backend, programs: Programs, log: &str) -> KillLab {
        let scripts = tempfile::Builder::new().prefix("ck.").tempdir().unwrap();
        let (shim, agent) = match programs {
            Programs::Shipped => (paths::shim(), paths::agent()),
            Programs::WithFaultPoints => {
                let dir = paths::fault_dir();
                (dir.join("containerd-shim-cube-v2"), dir.join("cube-agent"))
            }
        };
        write_script(scripts.path(), &shim);
        let setup =
            Setup { log: log.to_owned(), shim_dir: scripts.path().into(), agent, ..Setup::from(backend) };
        KillLab { lab: Lab::with(setup), scripts }
    }

    fn kill_at(&self) -> PathBuf {
        self.scripts.path().join("kill-at")
    }

    /// Lets whoever reaches `point` for the n-th time from now on die there.
    pub fn arm(&self, point: &str, times: u64) {
        fs::write(self.kill_at(), format!("{point} {times}")).unwrap();
    }

    /// Waits until somebody has died at the point that was armed last.
    #[track_caller]
    pub fn fires(&self, point: &str) {
        assert!(poll(self.lab.limit(), || !self.kill_at().exists()), "nobody has reached {point}");
    }

    /// The process that is `victim` in the sandbox of container `id`, if there is one.
    pub fn find(&self, victim: Victim, id: &str) -> Option<Pid> {
        let key = self.lab.key(id);
        let is_victim = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            match victim {
                Victim::Shim => words.last() == Some(&"serve") && words.contains(&id),
                Victim::Vmm if self.lab.backend() == Backend::Process => {
                    words.get(1) == Some(&"keep") && line.contains(&key)
                }
                Victim::Vmm => {
                    (words[0].contains("qemu") || words[0].contains("cloud-hypervisor"))
                        && line.contains(&key)
                }
                Victim::Agent => words[0].ends_with("cube-agent") && line.contains(&key),
            }
        };
        let processes = leftovers::processes(self.lab.dir());
        processes.iter().find(|process| is_victim(&process.line)).map(|process| Pid::from_raw(process.pid))
    }

    /// Kills the shim of container `id`.
    pub fn kill_shim(&self, id: &str) {
        kill(self.find(Victim::Shim, id).expect("no shim"), Signal::SIGKILL).unwrap();
    }

    /// What a user does with a container that is broken; then containerd must have neither task nor
    /// container.
    #[track_caller]
    pub fn give_up(&self, id: &str) {
        let mut said = String::new();
        let gone = poll(self.lab.limit(), || {
            let deleted = self.lab.ctr(&["task", "delete", "--force", id]);
            said = format!("{deleted}");
            self.lab.task(id).is_none()
        });
        assert!(gone, "containerd still has the task: {said}");
        // A creation that failed early has taken the container along.
        let removed = self.lab.ctr(&["container", "delete", id]);
        let missing = removed.err().contains("not found");
        assert!(removed.status.success() || missing, "{removed}");
    }

    /// What becomes of the run directory of a shim that died before its containerd had connected, which
    /// therefore runs no clean-up: it goes when it is a minute old and another shim starts.
    pub fn a_minute_passes(&self, id: &str) {
        let run_dir = self.lab.run_dir().join(self.lab.key(id));
        if run_dir.exists() && !run_dir.join("state.json").exists() {
            // A shim that still ends by itself may be faster.
            fs::File::open(&run_dir).and_then(|dir| dir.set_modified(UNIX_EPOCH)).ok();
            self.lab.run("next", &["true"]).succeeds();
        }
    }

    /// How long each clean-up took so far. Panics if one took too long.
    #[track_caller]
    pub fn cleanups(&self) -> Vec<Duration> {
        let lines = |name| fs::read_to_string(self.scripts.path().join(name)).unwrap_or_default();
        let count = |name| lines(name).lines().count();
        // One that a containerd began that was stopped meanwhile may still be at work.
        poll(self.lab.limit(), || count("begun") == count("cleanups"));
        let times: Vec<Duration> =
            lines("cleanups").lines().map(|line| Duration::from_nanos(line.parse().unwrap())).collect();
        assert_eq!(count("begun"), times.len(), "clean-ups that were begun, and that ended");
        let worst = times.iter().max().copied().unwrap_or_default();
        assert!(worst < CLEANUP_LIMIT, "a clean-up took {worst:?}");
        times
    }

    /// Puts the figures of all clean-ups into the summary of `make soak`.
    #[track_caller]
    pub fn record_cleanups(&self, experiment: &str) {
        let times = self.cleanups();
        let worst = times.iter().max().copied().unwrap_or_default();
        soak::record(experiment, "clean-ups", times.len());
        soak::record(experiment, "slowest clean-up, ms", worst.as_millis());
    }

    /// Compares what is left of stdout's log with the stream of seed 1, and gives its end. 0 if nothing
    /// was ever written, or nobody got so far as to make the log.
    #[track_caller]
    pub fn log_end(&self, id: &str) -> u64 {
        let dir = self.lab.log_dir(id);
        if fs::metadata(dir.join("stdout")).is_err() {
            return 0;
        }
        let segments = logs::segments(&dir, "stdout");
        let last = segments.last().expect("no segment");
        let end = last.header.first_offset + last.len;
        logs::compare_segments(&dir, "stdout", 1, end);
        self.readers_agree(id, &dir);
        end
    }

    /// What `cubecli` prints with the help of the index must be what is in the files.
    #[track_caller]
    fn readers_agree(&self, id: &str, dir: &Path) {
        let segments = logs::segments(dir, "stdout");
        let kept = segments.iter().flat_map(|segment| fs::read(&segment.path).unwrap()).collect::<Vec<u8>>();
        let print = |flags: &[&str]| {
            let args = [&["cubebox", "logs", "--all"], flags, &[id]].concat();
            self.lab.cubecli(&args).succeeds().stdout
        };
        assert!(print(&[]) == kept, "cubecli prints something else");
        assert!(print(&["--since", "1d"]) == kept, "not everything is younger than a day");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(print(&["--since", &(now + 3600).to_string()]), b"", "output from the future");
        let mut without_times = Vec::new();
        let mut latest = String::new();
        for line in print(&["--timestamps"]).split_inclusive(|byte| *byte == b'\n') {
            let space = line.iter().position(|byte| *byte == b' ').expect("no time");
            let time = String::from_utf8(line[..space].to_vec()).unwrap();
            assert!(time.starts_with("20") && time >= latest, "{time} after {latest}");
            latest = time;
            without_times.extend_from_slice(&line[space + 1..]);
        }
        assert!(without_times == kept, "cubecli --timestamps prints something else");
    }
}

/// Runs as the shim, notes when a clean-up begins, and how many nanoseconds it took. Shells and date(1)
/// cost milliseconds, which count for the shim here.
fn write_script(dir: &Path, shim: &Path) {
    let (dir, shim) = (dir.display(), shim.display());
    let script = format!(
        "#!/bin/sh\n\
         export CUBE_KILL_AT='{dir}/kill-at'\n\
         for action; do :; done\n\
         [ \"$action\" = delete ] || exec '{shim}' \"$@\"\n\
         begin=$(date +%s%N)\n\
         echo $begin >> '{dir}/begun'\n\
         '{shim}' \"$@\"\n\
         status=$?\n\
         echo $(($(date +%s%N) - begin)) >> '{dir}/cleanups'\n\
         exit $status\n"
    );
    let path = Path::new(&dir.to_string()).join("containerd-shim-cube-v2");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Asks an agent again and again how much of stdout the host has acknowledged.
#[derive(Debug)]
pub struct AckWatch {
    stop: Arc<AtomicBool>,
    watching: JoinHandle<u64>,
}

impl AckWatch {
    /// Watches the init process of container `id`, which need not exist yet.
    pub fn of(lab: &Lab, id: &str) -> AckWatch {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, guest, id) = (stop.clone(), Guest::of(lab, id), id.to_owned());
        let watching = thread::spawn(move || {
            let mut seen = 0;
            while !stopped.load(Ordering::Relaxed) {
                seen = stdout_offsets(&guest, &id).map_or(seen, |(_, acknowledged)| acknowledged.max(seen));
                thread::sleep(Duration::from_millis(1));
            }
            seen
        });
        AckWatch { stop, watching }
    }

    /// Everything below this offset was acknowledged.
    pub fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.watching.join().unwrap()
    }
}

/// What the agent has read of stdout of container `id`, and what the host has acknowledged.
pub fn stdout_offsets(guest: &Guest, id: &str) -> Option<(u64, u64)> {
    let info = guest.try_info()?;
    let is_it = |stream: &&cube_protocol::guest::StreamInfo| {
        stream.container_id == id && stream.exec_id.is_empty() && stream.stream == "stdout"
    };
    info.streams.iter().find(is_it).map(|stream| (stream.end_offset, stream.acked_offset))
}

/// Moments and victims: another sequence in each run, for the moments are different anyway.
#[derive(Debug)]
pub struct Chance {
    seed: u64,
    drawn: u64,
}

impl Default for Chance {
    fn default() -> Chance {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Chance { seed: since.as_nanos() as u64, drawn: 0 }
    }
}

impl Chance {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        let mut bytes = [0; 8];
        fill(self.seed, self.drawn * 8, &mut bytes);
        self.drawn += 1;
        u64::from_le_bytes(bytes) % limit
    }

    /// Sleeps for less than `limit`.
    pub fn sleep(&mut self, limit: Duration) {
        thread::sleep(Duration::from_micros(self.below(limit.as_micros() as u64)));
    }
}
