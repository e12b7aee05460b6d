//! A lab with an honest sandbox beside a hostile one, and what must hold whatever the hostile one does.

use std::{
    cell::Cell,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use cube_tests::{
    command::{Finished, poll, start},
    lab::{Lab, Setup},
    leftovers::{self, Process},
    logs,
    needs::Backend,
    paths, soak,
};

/// Id of the container whose agent attacks.
pub(crate) const HOSTILE: &str = "hostile";

/// Id of the container that must notice nothing.
const HONEST: &str = "honest";

/// Most memory that a shim may ever have used: 12 MiB are its budget, and one answer of the agent may
/// have 256 KiB, which decode to 20 MiB at worst.
const RSS_MAX_KIB: u64 = 32 << 10;

/// Most descriptors of a shim with one container and a few execs.
const FDS_MAX: usize = 100;

/// `[log]` of the lab. A stream may take `SEGMENT` × `SEGMENTS`.
pub(crate) const SEGMENT: u64 = 1 << 20;
pub(crate) const SEGMENTS: u64 = 2;

/// How long removing a hostile sandbox may take: 3 s for the guest to take SIGKILL, 10 s for it to report
/// the exit, 10 s for its output, 7 s for it to power off; and as much for a busy machine.
const REMOVAL_MAX: Duration = Duration::from_secs(60);

/// The lab and its two sandboxes.
pub(crate) struct Arena {
    pub(crate) lab: Lab,
    usage: Arc<Mutex<Usage>>,
    honest_lines: Cell<usize>,
}

/// The most that the hostile sandbox's shim has used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) rss_kib: u64,
    pub(crate) fds: usize,
}

impl Arena {
    /// The honest sandbox runs. `attack` is what the agent of the hostile one does, see
    /// `cube-hostile-agent`.
    pub(crate) fn new(backend: Backend, attack: &str) -> Arena {
        let log = format!("segment_bytes = {SEGMENT}\nsegments = {SEGMENTS}");
        let lab = Lab::with(Setup { log, ..backend.into() });
        let attacks = lab.dir().join("attacks");
        fs::create_dir(&attacks).unwrap();
        let script = lab.dir().join("agent");
        let (honest, hostile) = (paths::agent(), env!("CARGO_BIN_EXE_cube-hostile-agent"));
        let text = format!(
            "#!/bin/sh\nrun_dir=${{3%/*/*}}\n\
             attack=$(cat '{}'/\"${{run_dir##*/}}\" 2> /dev/null) || exec '{}' \"$@\"\n\
             exec '{hostile}' \"$attack\" \"$@\"\n",
            attacks.display(),
            honest.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let config = fs::read_to_string(lab.config_file()).unwrap();
        let config = config.replace(honest.to_str().unwrap(), script.to_str().unwrap());
        fs::write(lab.config_file(), config).unwrap();

        let arena = Arena { lab, usage: Arc::default(), honest_lines: Cell::new(0) };
        arena.will_attack(HOSTILE, attack);
        let lines = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done";
        arena.lab.detached(HONEST, &["sh", "-c", lines]);
        arena.honest_sandbox_works();
        watch(arena.lab.dir().to_owned(), Arc::downgrade(&arena.usage));
        arena
    }

    /// The agent of the sandbox `id` will do this.
    pub(crate) fn will_attack(&self, id: &str, attack: &str) {
        fs::write(self.lab.dir().join("attacks").join(self.lab.key(id)), attack).unwrap();
    }

    /// `ctr run --detach` of the hostile container, whose stdout does what `argv` says.
    pub(crate) fn run_hostile(&self, argv: &[&str]) -> Finished {
        let mut command = self.lab.run_command(&["--detach", "--null-io"], HOSTILE, argv);
        let finished = start(&mut command).wait(self.lab.limit());
        // It may not live long enough to be seen by who watches.
        look_at(&hostile_shims(self.lab.dir()), &self.usage);
        finished
    }

    /// An exec in the hostile container whose stdout does what `attack` says, to its end.
    pub(crate) fn exec_attack(&self, attack: &[&str]) -> Finished {
        self.lab.exec(HOSTILE, &[&["attack"], attack].concat())
    }

    /// What the hostile agent counted under `name`.
    pub(crate) fn counted(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.state(HOSTILE).join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn state(&self, id: &str) -> PathBuf {
        self.lab.run_dir().join(self.lab.key(id)).join("agent")
    }

    /// Lines of the containerd log, to which the shims' lines go, with every one of `words`.
    pub(crate) fn logged(&self, words: &[&str]) -> usize {
        let log = fs::read(self.lab.dir().join("containerd.log")).unwrap();
        let log = String::from_utf8_lossy(&log);
        log.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    /// The honest sandbox goes on writing, and serves an exec.
    pub(crate) fn honest_sandbox_works(&self) {
        let more = || {
            let log = logs::read(&self.lab.log_dir(HONEST), "stdout");
            log.iter().filter(|byte| **byte == b'\n').count()
        };
        let begun = Instant::now();
        assert!(poll(self.lab.limit(), || more() > self.honest_lines.get()), "the honest sandbox is silent");
        self.honest_lines.set(more());
        assert_eq!(self.lab.exec(HONEST, &["echo", "hello"]).succeeds().out(), "hello\n");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(10), "the honest sandbox took {took:?}");
    }

    /// CPU time that the hostile sandbox's shim uses while `time` passes, as a part of it.
    pub(crate) fn cpu_of_shim(&self, time: Duration) -> f64 {
        let pid = self.lab.shim_pid(HOSTILE).as_raw();
        let (before, begun) = (cpu_seconds(pid), Instant::now());
        thread::sleep(time);
        (cpu_seconds(pid) - before) / begun.elapsed().as_secs_f64()
    }

    /// `kill -9` and delete work on the hostile container in their time.
    pub(crate) fn remove_hostile(&self) {
        self.remove(HOSTILE);
    }

    pub(crate) fn remove(&self, id: &str) {
        let complaints = fs::read_to_string(self.state(id).join("complaints")).unwrap_or_default();
        assert_eq!(complaints, "", "what the shim should not have done");
        let begun = Instant::now();
        let delete = &mut self.lab.ctr_command(&["task", "delete", "--force", id]);
        start(delete).wait(REMOVAL_MAX).succeeds();
        self.lab.ctr(&["container", "delete", id]).succeeds();
        soak::record("hostile guest", "kill -9 and delete, ms", begun.elapsed().as_millis());
    }

    /// Everything is removed, the honest log is exact, nothing is left, and the hostile sandbox's shim has
    /// stayed inside of its bounds.
    pub(crate) fn end(self, experiment: &str) {
        self.honest_sandbox_works();
        self.lab.remove(HONEST);
        let log = String::from_utf8(logs::read(&self.lab.log_dir(HONEST), "stdout")).unwrap();
        for (n, line) in log.lines().enumerate().take(log.matches('\n').count()) {
            assert_eq!(line, format!("line {n}"), "the honest log is not exact");
        }
        self.lab.nothing_is_left_but_fifos();
        let log = fs::read(self.lab.dir().join("containerd.log")).unwrap();
        let control = |byte: &&u8| byte.is_ascii_control() && **byte != b'\n' && **byte != b'\t';
        assert_eq!(log.iter().find(control), None, "a control character in the log");
        let Usage { rss_kib, fds } = *self.usage.lock().unwrap();
        soak::record(experiment, "shim RSS at most, KiB", rss_kib);
        soak::record(experiment, "shim descriptors at most", fds);
        println!("{experiment}: {rss_kib} KiB, {fds} descriptors");
        assert!(rss_kib > 0, "the shim was never seen");
        assert!(rss_kib <= RSS_MAX_KIB, "the shim has used {rss_kib} KiB");
        assert!(fds <= FDS_MAX, "the shim has had {fds} descriptors");
    }
}

/// Looks at the hostile sandboxes' shims as long as the arena exists.
fn watch(lab: PathBuf, usage: std::sync::Weak<Mutex<Usage>>) {
    thread::spawn(move || {
        let mut shims = Vec::new();
        for round in 0_u64.. {
            let Some(usage) = usage.upgrade() else { return };
            // A look at every process is dear, and the peak of the memory is kept by the kernel.
            if round % 10 == 0 {
                shims = hostile_shims(&lab);
            }
            look_at(&shims, &usage);
            drop(usage);
            thread::sleep(Duration::from_millis(20));
        }
    });
}

fn hostile_shims(lab: &Path) -> Vec<Process> {
    let mut shims = leftovers::processes(lab);
    shims.retain(|process| {
        let is = |word| process.line.contains(word);
        is("containerd-shim-cube-v2") && is("serve") && !is(HONEST)
    });
    shims
}

fn look_at(shims: &[Process], usage: &Mutex<Usage>) {
    for shim in shims {
        let (rss_kib, fds) = (peak_rss_kib(shim.pid), descriptors(shim.pid));
        let mut usage = usage.lock().unwrap();
        usage.rss_kib = usage.rss_kib.max(rss_kib);
        usage.fds = usage.fds.max(fds);
    }
}

fn peak_rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0)
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).map(Iterator::count).unwrap_or(0)
}

fn cpu_seconds(pid: i32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in parentheses, may have spaces.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on every architecture that Linux has.
    ticks as f64 / 100.0
}
