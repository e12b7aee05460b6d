//! Clients that rest: what a reader that is there has not taken is never given up because of the time.

use std::{
    fs::File,
    io::Read,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::Status,
    events::task::{TaskExit, TaskPaused},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::lab_with_waiting_container;
use crate::{
    command::{poll, wait_child},
    direct::{Direct, bind_mount, exec::Exec},
    lab::Lab,
    needs::Backend,
    verify::{compare, compare_slowly},
};

/// Longer than anything in the shim or the agent waits that goes by a clock: the shim waits for 2 s for a
/// reader whose process is to end, and for 4 s for a guest that is silent.
const REST: Duration = Duration::from_secs(5);

/// What a process writes before it exits: more than pipes, rings and the client's buffers hold.
const BYTES: u64 = 5_000_000;

/// As much as pipes and rings hold, so that the process exits.
const HELD_BYTES: u64 = 1_500_000;

/// Time for what no clock of the product decides, or one of 2 s.
const SOON: Duration = Duration::from_secs(10);

fn writer(bytes: u64) -> [String; 4] {
    ["cube-test-writer".into(), "stream".into(), "1".into(), bytes.to_string()]
}

fn words(argv: &[String; 4]) -> [&str; 4] {
    argv.each_ref().map(String::as_str)
}

/// Starts `command` with a pipe for its output.
fn client(command: &mut Command) -> (Child, impl Read + use<>) {
    let mut client = command.stdout(Stdio::piped()).spawn().unwrap();
    let out = client.stdout.take().unwrap();
    (client, out)
}

fn signal(client: &Child, signal: Signal) {
    kill(Pid::from_raw(client.id().cast_signed()), signal).unwrap();
}

/// Reads all of `out`, and rests on the way, with the client stopped as well: early, before the process can
/// have exited, and with the last bytes in the client's FIFO.
fn read_with_rests(client: &Child, out: impl Read) -> u64 {
    let mut rests = vec![BYTES - 120_000, BYTES - (600 << 10), 100_000];
    compare_slowly(out, 1, 0, |read| {
        if rests.last().is_some_and(|at| read >= *at) {
            rests.pop();
            signal(client, Signal::SIGSTOP);
            sleep(REST);
            signal(client, Signal::SIGCONT);
        }
    })
    .unwrap()
}

/// containerd's own client, of a container and of an exec, whose output no log keeps.
pub fn a_client_that_rests_has_every_byte(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let argv = writer(BYTES);
    let run = lab.run_command(&["--rm"], "r", &words(&argv));
    let exec = lab.exec_command(&[], "c", &words(&argv));
    for (what, mut command) in [("run", run), ("exec", exec)] {
        let (mut client, out) = client(&mut command);
        assert_eq!(read_with_rests(&client, out), BYTES, "bytes at the client of {what}");
        let status = wait_child(&mut client, lab.limit());
        assert!(status.is_some_and(|status| status.success()), "the client of {what} ended with {status:?}");
    }
    lab.remove("c");
    lab.nothing_is_left();
}

/// At 1 MiB a rest: a pipe to `tar` over a slow line, say.
pub fn a_client_that_is_slow_all_the_time_has_every_byte(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let argv = writer(3 << 20);
    let (mut client, out) = client(&mut lab.exec_command(&[], "c", &words(&argv)));
    let mut next = 1 << 20;
    let read = compare_slowly(out, 1, 0, |read| {
        if read >= next {
            next += 1 << 20;
            sleep(REST);
        }
    });
    assert_eq!(read.unwrap(), 3 << 20, "bytes at the client");
    assert!(wait_child(&mut client, lab.limit()).unwrap().success());
    lab.remove("c");
    lab.nothing_is_left();
}

/// The client dies with a container's exit waiting for it.
pub fn the_death_of_a_resting_client_is_noticed_at_once(backend: Backend) {
    let lab = Lab::new(backend);
    let argv = writer(BYTES);
    let (mut client, mut out) = client(&mut lab.run_command(&[], "c", &words(&argv)));
    out.read_exact(&mut [0; 1000]).unwrap();
    signal(&client, Signal::SIGSTOP);
    lab.wait_for_state("c", Some("RUNNING"));
    sleep(REST);
    lab.wait_for_state("c", Some("RUNNING"));
    client.kill().unwrap();
    client.wait().unwrap();
    let stopped = || lab.task("c").is_some_and(|(state, _)| state == "STOPPED");
    assert!(poll(SOON, stopped), "the task is {:?}", lab.task("c"));
    lab.delete_stopped("c", 0);
    lab.nothing_is_left_but_fifos();
}

/// A container whose process has written [`BYTES`] and exited, with a reader that has taken nothing.
struct Held<'a> {
    direct: Direct<'a>,
    out: File,
    exited_before: Duration,
}

impl<'a> Held<'a> {
    fn new(lab: &'a Lab) -> Held<'a> {
        let argv = writer(BYTES);
        let mut direct = Direct::new(lab, "c", &words(&argv));
        let rootfs = direct.unpack_image();
        let [out, _] = direct.read_fifos();
        direct.start_shim();
        direct.create(bind_mount(&rootfs)).unwrap();
        direct.start().unwrap();
        let held = Held { direct, out, exited_before: Duration::ZERO };
        sleep(REST);
        held.is_running();
        Held { exited_before: since_epoch(), ..held }
    }

    #[track_caller]
    fn is_running(&self) {
        assert_eq!(self.status(), Status::RUNNING);
        assert!(self.direct.events::<TaskExit>("/tasks/exit").is_empty(), "{:?}", self.direct.topics());
    }

    fn status(&self) -> Status {
        self.direct.state().unwrap().status.unwrap()
    }

    /// Everything is at its reader, and the exit is that of the process.
    fn ends(self, lab: &Lab) {
        assert_eq!(compare(&self.out, 1, 0).unwrap(), BYTES, "bytes at the reader");
        self.is_told(0);
        self.direct.delete().unwrap();
        self.direct.finish();
        lab.nothing_is_left();
    }

    fn is_told(&self, status: u32) {
        assert_eq!(self.direct.wait().unwrap(), status);
        let exit: TaskExit = self.direct.event("/tasks/exit");
        assert_eq!(exit.exit_status, status);
        let at = Duration::from_secs(exit.exited_at.seconds.cast_unsigned());
        assert!(at <= self.exited_before - REST / 2, "{at:?} is no time of the process");
        assert_eq!(self.status(), Status::STOPPED);
    }
}

fn since_epoch() -> Duration {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap()
}

/// Signals that ask for an end, and no others; the exit is still that of the process.
pub fn only_a_signal_that_asks_for_the_end_ends_the_wait_for_a_reader(backend: Backend) {
    let lab = Lab::new(backend);
    let held = Held::new(&lab);
    held.direct.kill(nix::libc::SIGUSR1 as u32).unwrap();
    held.direct.kill(nix::libc::SIGWINCH as u32).unwrap();
    sleep(REST / 2);
    held.is_running();
    held.direct.kill(nix::libc::SIGTERM as u32).unwrap();
    let began = Instant::now();
    held.is_told(0);
    assert!(began.elapsed() < SOON, "told {:?} after the signal", began.elapsed());
    assert!(held.direct.kill(nix::libc::SIGTERM as u32).is_err(), "a signal to what has exited");
    // What a reader that was given up has in its pipe it has, and then the end.
    let read = compare(&held.out, 1, 0).unwrap();
    assert!((1..BYTES).contains(&read), "{read} bytes at the reader");
    held.direct.delete().unwrap();
    held.direct.finish();
    lab.nothing_is_left();
}

/// Delete of what has exited asks for its end, too.
pub fn a_delete_ends_the_wait_for_a_reader(backend: Backend) {
    let lab = Lab::new(backend);
    let held = Held::new(&lab);
    let began = Instant::now();
    assert_eq!(held.direct.delete().unwrap().exit_status, 0);
    assert!(began.elapsed() < SOON, "Delete took {:?}", began.elapsed());
    let exit: TaskExit = held.direct.event("/tasks/exit");
    assert_eq!(exit.exit_status, 0);
    held.direct.finish();
    lab.nothing_is_left();
}

/// A sandbox is paused and resumed while the exit of its process, and of an exec, waits.
pub fn an_exit_that_waits_for_a_reader_survives_a_pause(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let argv = writer(HELD_BYTES);
    let (mut exec, ends) = Exec::new(&direct, "e", &words(&argv));
    exec.create().unwrap();
    exec.start().unwrap();
    sleep(REST);
    direct.pause().unwrap();
    let _: TaskPaused = direct.event("/tasks/paused");
    sleep(REST);
    assert_eq!(exec.state().unwrap().status.unwrap(), Status::PAUSED);
    direct.resume().unwrap();
    assert_eq!(exec.state().unwrap().status.unwrap(), Status::RUNNING);
    assert_eq!(compare(ends.stdout, 1, 0).unwrap(), HELD_BYTES, "bytes at the reader");
    assert_eq!(exec.wait().unwrap(), 0);
    exec.delete().unwrap();
    drop(exec);
    direct.kill(nix::libc::SIGTERM as u32).unwrap();
    assert_eq!(direct.wait().unwrap(), 0);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

/// A reader that takes everything after a rest has everything, and then the exit is told.
pub fn an_exit_is_told_when_its_reader_has_everything(backend: Backend) {
    let lab = Lab::new(backend);
    Held::new(&lab).ends(&lab);
}
