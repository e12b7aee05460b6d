//! Shim, VMM, agent and containerd die by `kill -9`, at random moments and at the worst ones.

use std::{fs, path::Path, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    command::{Running, poll, start},
    guest::Guest,
    kills::{AckWatch, Chance, KillLab, Programs, Victim, stdout_offsets},
    needs::Backend,
    soak,
};

/// Writes without end, so that some of it is always on its way.
const WRITER: [&str; 4] = ["cube-test-writer", "stream", "1", "1099511627776"];

/// Small segments: a writer at full speed rotates all the time.
const ROTATING: &str = "segment_bytes = 1048576\nsegments = 4";

/// When something dies.
#[derive(Debug, Clone, Copy)]
enum Moment {
    Create,
    Start,
    Run,
    Delete,
}

/// Shim, VMM and agent die at random moments of a container's life: containerd gets rid of the task each
/// time, nothing is left, and the log is an exact prefix with everything acknowledged in it.
pub fn whoever_dies_whenever_leaves_nothing_but_an_exact_log(backend: Backend) {
    let kills = KillLab::new(backend, Programs::Shipped, ROTATING);
    let victims: &[Victim] = match backend {
        Backend::Process => &[Victim::Shim, Victim::Vmm, Victim::Agent],
        Backend::Qemu | Backend::CloudHypervisor => &[Victim::Shim, Victim::Vmm],
    };
    let moments = [Moment::Create, Moment::Start, Moment::Run, Moment::Delete];
    let pairs: Vec<_> = moments.iter().flat_map(|m| victims.iter().map(move |v| (*m, *v))).collect();
    let rounds = if backend.is_vm() { soak::rounds(2, 24) } else { soak::rounds(12, 300) };
    let mut chance = Chance::default();
    let first = chance.below(pairs.len() as u64) as usize;
    let (mut hits, mut bytes) = (0, 0);
    for round in 0..rounds as usize {
        let (moment, victim) = pairs[(first + round) % pairs.len()];
        let id = format!("c{round}");
        eprintln!("round {round}: {victim:?} dies during {moment:?}");
        let watch = AckWatch::of(&kills.lab, &id);
        hits += u32::from(live_and_die(&kills, &id, moment, victim, &mut chance));
        kills.give_up(&id);
        let acknowledged = watch.end();
        kills.a_minute_passes(&id);
        kills.lab.nothing_is_left();
        let end = kills.log_end(&id);
        assert!(end >= acknowledged, "the log ends at {end}, but {acknowledged} bytes were acknowledged");
        bytes += end;
        fs::remove_dir_all(kills.lab.log_dir(&id)).ok();
    }
    let experiment = format!("kill -9 at random, {}", backend.name());
    soak::record(&experiment, "rounds", rounds);
    soak::record(&experiment, "rounds in which the victim still lived", hits);
    soak::record(&experiment, "bytes logged", bytes);
    kills.record_cleanups(&experiment);
    assert!(hits * 2 >= rounds, "only {hits} of {rounds} kills met a process");
}

/// Whether the victim was there to be killed.
fn live_and_die(kills: &KillLab, id: &str, moment: Moment, victim: Victim, chance: &mut Chance) -> bool {
    let lab = &kills.lab;
    let mut create = start(&mut lab.run_command(&["--detach", "--null-io"], id, &WRITER));
    let log = lab.log_dir(id).join("stdout");
    let wait_for = |create: &mut Running, happened: &dyn Fn() -> bool| {
        poll(lab.limit(), || happened() || !create.is_running());
    };
    match moment {
        Moment::Create => {
            wait_for(&mut create, &|| kills.find(victim, id).is_some());
            chance.sleep(Duration::from_millis(60));
        }
        Moment::Start => {
            wait_for(&mut create, &|| log.exists());
            chance.sleep(Duration::from_millis(if lab.backend().is_vm() { 20_000 } else { 80 }));
        }
        Moment::Run => {
            wait_for(&mut create, &|| fs::metadata(&log).is_ok_and(|log| log.len() > 0));
            chance.sleep(Duration::from_millis(300));
        }
        Moment::Delete => {
            create.wait(lab.limit()).succeeds();
            let delete = start(&mut lab.ctr_command(&["task", "delete", "--force", id]));
            chance.sleep(Duration::from_millis(100));
            let hit = kill_one(kills, victim, id);
            delete.wait(lab.limit());
            return hit;
        }
    }
    let hit = kill_one(kills, victim, id);
    // Fails, or not, as far as it has come.
    create.wait(lab.limit());
    hit
}

fn kill_one(kills: &KillLab, victim: Victim, id: &str) -> bool {
    kills.find(victim, id).is_some_and(|pid| kill(pid, Signal::SIGKILL).is_ok())
}

/// Points of `start`, `Create` and `Start`, of shim and agent.
const CREATION: [&str; 21] = [
    "create.state_saved",
    "create.shim_moved",
    "create.cgroup_made",
    "create.share_prepared",
    "create.rootfs_mounted",
    "segment.index_created",
    "segment.header_written",
    "segment.data_created",
    "create.stdio_prepared",
    "create.vmm_spawned",
    "create.guest_ready",
    "agent.create.rootfs_mounted",
    "agent.create.spawned",
    "create.container_made",
    "create.pid_saved",
    "create.before_reply",
    "run.before_start",
    "agent.start.started",
    "run.process_started",
    "run.before_reply",
    "agent.exit.before_event",
];

/// A creation that is cut short at any step fails, leaves nothing, and can be repeated under the same name.
pub fn a_creation_killed_at_any_step_leaves_nothing_and_can_be_repeated(backend: Backend) {
    let kills = KillLab::new(backend, Programs::WithFaultPoints, "");
    for point in CREATION {
        eprintln!("{point}");
        kills.arm(point, 1);
        start(&mut kills.lab.run_command(&["--detach", "--null-io"], "c", &["true"])).wait(kills.lab.limit());
        kills.fires(point);
        kills.give_up("c");
        kills.lab.nothing_is_left();
        let logs = kills.lab.cubecli(&["cubebox", "logs", "c"]);
        assert!(!logs.err().contains("panicked"), "{logs}");
        let again = kills.lab.run("c", &["echo", "again"]).succeeds();
        assert_eq!(again.out(), "again\n");
    }
    kills.lab.nothing_is_left();
    kills.record_cleanups("kill -9 at each step of a creation");
}

/// Points of `start`, before containerd knows the shim. In the last two there is a daemon, which waits a
/// minute for its first Create.
const START: [&str; 3] = ["start.socket_bound", "start.daemon_ready", "start.address_written"];

/// A `start` that is killed leaves no shim behind, and its directory is gone once another shim has started.
pub fn a_start_that_is_killed_leaves_nothing_for_long(backend: Backend) {
    let kills = KillLab::new(backend, Programs::WithFaultPoints, "");
    let lab = &kills.lab;
    let points = &START[..soak::rounds(1, 3) as usize];
    for point in points {
        eprintln!("{point}");
        kills.arm(point, 1);
        let started =
            start(&mut lab.run_command(&["--detach", "--null-io"], "c", &["true"])).wait(lab.limit());
        assert!(!started.status.success(), "{started}");
        kills.fires(point);
        kills.give_up("c");
        let ended = poll(Duration::from_secs(100), || kills.find(Victim::Shim, "c").is_none());
        assert!(ended, "the shim waits on");
        kills.a_minute_passes("c");
        lab.nothing_is_left();
        lab.run("c", &["true"]).succeeds();
    }
    lab.nothing_is_left();
}

/// Points between a byte in the guest and its acknowledgement, rotation included.
const LOGGING: [&str; 10] = [
    "log.data_written",
    "log.index_written",
    "log.acknowledged",
    "rotation.oldest_data_removed",
    "rotation.oldest_index_removed",
    "rotation.index_renamed",
    "rotation.data_renamed",
    "segment.index_created",
    "segment.header_written",
    "segment.data_created",
];

/// The shim dies between two steps of its work on the log, with everything that the process wrote still in
/// the guest or in the log: the clean-up brings it together, and not a byte is missing or doubled.
pub fn a_shim_killed_between_any_two_steps_of_logging_loses_no_byte(backend: Backend) {
    let kills = KillLab::new(backend, Programs::WithFaultPoints, "segment_bytes = 65536\nsegments = 4");
    let mut chance = Chance::default();
    let rounds = soak::rounds(1, 8);
    for point in LOGGING {
        for round in 0..rounds {
            // The first time is as bad as any later one, and surely comes.
            let times = if round == 0 { 1 } else { 1 + chance.below(5) };
            eprintln!("{point}, time {times}");
            die_logging(&kills, point, times);
        }
    }
    soak::record("kill -9 between steps of logging", "deaths", LOGGING.len() as u32 * rounds);
    kills.record_cleanups("kill -9 between steps of logging");
}

/// A shim that dies with everything that the process wrote still in the guest: the clean-up fetches it.
pub fn what_the_guest_holds_when_its_shim_dies_is_saved(backend: Backend) {
    let kills = KillLab::new(backend, Programs::Shipped, "segment_bytes = 65536\nsegments = 4");
    for _ in 0..soak::rounds(1, if backend.is_vm() { 10 } else { 50 }) {
        hold_output(&kills, |shim| kill(shim, Signal::SIGKILL).unwrap());
    }
    kills.record_cleanups(&format!("kill -9 with {HELD} bytes in the guest, {}", backend.name()));
}

/// Bytes that the guest can hold while its shim does nothing: less than a ring.
const HELD: u64 = 900_000;

fn die_logging(kills: &KillLab, point: &str, times: u64) {
    hold_output(kills, |shim| {
        kills.arm(point, times);
        kill(shim, Signal::SIGCONT).unwrap();
        kills.fires(point);
    });
}

/// Lets the guest have [`HELD`] bytes of output while the shim is stopped; `die` ends the shim. Everything
/// must be in the log then.
fn hold_output(kills: &KillLab, die: impl Fn(Pid)) {
    let lab = &kills.lab;
    let go = lab.dir().join("go");
    run_when_told(kills, "c", &go);
    let guest = Guest::of(lab, "c");
    let shim = kills.find(Victim::Shim, "c").expect("no shim");
    kill(shim, Signal::SIGSTOP).unwrap();
    fs::write(go.join("now"), "").unwrap();
    let read = || stdout_offsets(&guest, "c").map_or(0, |(read, _)| read);
    assert!(poll(lab.limit(), || read() == HELD), "the guest has {} bytes", read());
    die(shim);
    kills.give_up("c");
    lab.nothing_is_left();
    assert_eq!(kills.log_end("c"), HELD, "end of the log");
    fs::remove_dir_all(lab.log_dir("c")).unwrap();
    fs::remove_dir_all(go).unwrap();
}

/// Container `id`, which writes [`HELD`] bytes as soon as there is a file `now` in `go`.
fn run_when_told(kills: &KillLab, id: &str, go: &Path) {
    fs::create_dir_all(go).unwrap();
    let mount = format!("type=bind,src={},dst=/go,options=rbind:ro", go.display());
    let script = format!(
        "while [ ! -e /go/now ]; do sleep 0.02; done; cube-test-writer stream 1 {HELD}; exec sleep 1000"
    );
    kills.lab.detached_with(&["--mount", &mount], id, &["sh", "-c", &script]);
}

/// Points of Delete, in the shim and in the agent that it ends.
const DELETION: [&str; 16] = [
    "delete.drained",
    "agent.delete.killed",
    "agent.delete.unmounted",
    "delete.guest_ended",
    "delete.rootfs_released",
    "destroy.processes_killed",
    "destroy.vm_cgroup_removed",
    "destroy.cgroup_removed",
    "destroy.disks_returned",
    "destroy.share_removed",
    "destroy.disks_removed",
    "destroy.memory_removed",
    "destroy.users_released",
    "destroy.run_dir_removed",
    "delete.before_reply",
    "agent.delete.exec_forgotten",
];

/// containerd runs `shim delete` then, which takes over wherever Delete has come.
pub fn a_deletion_killed_at_any_step_is_completed(backend: Backend) {
    let kills = KillLab::new(backend, Programs::WithFaultPoints, "");
    let lab = &kills.lab;
    for point in DELETION {
        eprintln!("{point}");
        lab.detached("c", &["sh", "-c", "cube-test-writer stream 1 100000; exec sleep 1000"]);
        let logged = || fs::metadata(lab.log_dir("c").join("stdout")).is_ok_and(|log| log.len() == 100_000);
        assert!(poll(lab.limit(), logged), "no output");
        kills.arm(point, 1);
        if point.contains("exec") {
            lab.exec("c", &["true"]);
        } else {
            lab.ctr(&["task", "delete", "--force", "c"]);
        }
        kills.fires(point);
        kills.give_up("c");
        lab.nothing_is_left();
        assert_eq!(kills.log_end("c"), 100_000, "end of the log");
        fs::remove_dir_all(lab.log_dir("c")).unwrap();
    }
    kills.record_cleanups("kill -9 at each step of Delete");
}

/// Points of `shim delete`.
const CLEANUP: [&str; 13] = [
    "cleanup.begun",
    "cleanup.containers_killed",
    "cleanup.log_recovered",
    "cleanup.drained",
    "destroy.processes_killed",
    "destroy.vm_cgroup_removed",
    "destroy.cgroup_removed",
    "destroy.disks_returned",
    "destroy.share_removed",
    "destroy.disks_removed",
    "destroy.memory_removed",
    "destroy.users_released",
    "destroy.run_dir_removed",
];

/// containerd does not run it again by itself, but when it is started the next time.
pub fn a_clean_up_killed_at_any_step_can_be_repeated(backend: Backend) {
    let kills = KillLab::new(backend, Programs::WithFaultPoints, "segment_bytes = 65536\nsegments = 4");
    let lab = &kills.lab;
    for point in CLEANUP {
        eprintln!("{point}");
        hold_output(&kills, |shim| {
            kills.arm(point, 1);
            kill(shim, Signal::SIGKILL).unwrap();
            kills.fires(point);
            // A containerd that stops kills what it has begun, with the script that counts.
            kills.cleanups();
            lab.stop_containerd();
            lab.start_containerd();
        });
    }
    kills.record_cleanups("kill -9 at each step of shim delete");
}

/// The points compile to nothing unless a feature is on.
pub fn shipped_programs_have_no_fault_points(_: Backend) {
    let has_points = |program: &Path| {
        let bytes = fs::read(program).unwrap();
        let name = b"CUBE_KILL_AT";
        bytes.windows(name.len()).any(|window| window == name)
    };
    let dir = crate::paths::fault_dir();
    assert!(has_points(&dir.join("containerd-shim-cube-v2")) && has_points(&dir.join("cube-agent")));
    assert!(!has_points(&crate::paths::shim()) && !has_points(&crate::paths::agent()));
}
