//! The control connection, cut and silent.

use std::time::{Duration, Instant};

use containerd_shim_protos::events::task::TaskExit;
use cube_protocol::ports;

use super::conversation::{end, running_behind};
use crate::{
    command::poll,
    direct::{Direct, exec::Exec},
    guest::Guest,
    lab::Lab,
    needs::Backend,
    proxy::{
        Proxy,
        plan::{Fault, Plan, Seed, Side, Target},
    },
    soak,
};

/// Most bytes between two cuts: a few calls.
const MOST: u64 = 4000;

/// What a call may take that is repeated because its connection was cut.
const LIMIT: Duration = Duration::from_secs(15);

/// At any byte of any call, again and again: each call is answered, what was asked for happens once, and
/// the guest keeps nothing of what has been deleted.
pub fn calls_and_exits_survive_a_control_connection_that_is_cut(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &super::super::WAIT);
    let proxy = Proxy::before(&lab, &direct.run_dir());
    let seed = Seed::choose();
    proxy.follow(Target::Control, Plan::random(seed.0, MOST));
    running_behind(&mut direct);
    let rounds = soak::rounds(60, 500);
    let mut worst = Duration::ZERO;
    for n in 0..rounds {
        worst = worst.max(run_exec(&direct, n));
    }
    let exited = || direct.events::<TaskExit>("/tasks/exit");
    assert!(poll(lab.limit(), || exited().len() >= rounds as usize), "{:?}", exited());
    let told: Vec<(String, u32)> = exited().into_iter().map(|exit| (exit.id, exit.exit_status)).collect();
    let expected: Vec<_> = (0..rounds).map(|n| (name(n), n % 256)).collect();
    assert_eq!(told, expected, "exits");
    let cuts = proxy.cuts();
    proxy.rest();
    let info = Guest::at(direct.socket()).info();
    assert_eq!(info.processes, 1, "processes in the guest: {info:?}");
    assert!(cuts >= u64::from(rounds) / 4, "only {cuts} cuts");
    end(&lab, direct);
    soak::record("control connection cut", "connections cut", cuts);
    soak::record("control connection cut", "execs", rounds);
    soak::record("control connection cut", "slowest call, seconds", worst.as_secs_f32());
}

fn name(n: u32) -> String {
    format!("exec-{n}")
}

/// Gives the time of the slowest call.
fn run_exec(direct: &Direct<'_>, n: u32) -> Duration {
    let script = format!("exit {}", n % 256);
    let (mut exec, _ends) = Exec::new(direct, &name(n), &["sh", "-c", &script]);
    let mut worst = Duration::ZERO;
    let mut call = |what: &str, result: &mut dyn FnMut() -> ttrpc::Result<()>| {
        let began = Instant::now();
        result().unwrap_or_else(|e| panic!("{what} of exec {n} after {:?}: {e}", began.elapsed()));
        worst = worst.max(began.elapsed());
    };
    call("Exec", &mut || exec.create());
    call("Start", &mut || exec.start());
    call("Wait", &mut || exec.wait().map(|status| assert_eq!(status, n % 256)));
    call("Delete", &mut || exec.delete().map(|status| assert_eq!(status, n % 256)));
    assert!(worst < LIMIT, "a call took {worst:?}");
    worst
}

/// With an error that names the call and the limit; SIGKILL ends the sandbox all the same.
pub fn calls_to_a_guest_that_falls_silent_end_by_their_deadlines(backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &super::super::WAIT);
    let proxy = Proxy::before(&lab, &direct.run_dir());
    running_behind(&mut direct);
    proxy.follow(Target::Control, Plan::Each(Fault::Stall(Side::ToHost, 0, None)));
    proxy.freeze(ports::CONTROL);

    let (mut exec, _ends) = Exec::new(&direct, "late", &["true"]);
    let (took, refused) = timed(|| exec.create());
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("did not answer Exec within 10s"), "{text}");
    assert!(took < Duration::from_secs(13), "Exec took {took:?}");
    assert!(direct.state().is_ok(), "State does not need the guest");
    drop(exec);

    let (took, killed) = timed(|| direct.kill(9));
    killed.unwrap();
    assert!(took < Duration::from_secs(8), "Kill took {took:?}");
    assert_eq!(direct.wait().unwrap(), 137);
    let (took, deleted) = timed(|| direct.delete());
    deleted.unwrap();
    assert!(took < Duration::from_secs(8), "Delete took {took:?}");
    direct.finish();
    lab.nothing_is_left();
}

fn timed<T>(call: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = call();
    (began.elapsed(), result)
}
