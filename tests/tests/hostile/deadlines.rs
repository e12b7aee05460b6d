//! A guest that does not answer, or not with the truth.

use std::{
    fs,
    time::{Duration, Instant},
};

use containerd_shim_protos::{Client, TaskClient, api};
use cube_tests::{command::start, needs::Backend, soak};
use ttrpc::context::with_timeout;

use crate::arena::{Arena, HOSTILE};

/// What a busy machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(8);

/// The shim of a container, called as containerd does.
pub(crate) struct Shim(TaskClient);

pub(crate) fn client(arena: &Arena, id: &str) -> Shim {
    let address = fs::read_to_string(arena.lab.bundle(id).join("address")).unwrap();
    Shim(TaskClient::new(Client::connect(address.trim()).unwrap()))
}

impl Shim {
    pub(crate) fn state(&self, id: &str) -> api::StateResponse {
        let request = api::StateRequest { id: id.into(), ..Default::default() };
        self.0.state(with_timeout(60_000_000_000), &request).unwrap()
    }
}

type Call = fn(&TaskClient, ttrpc::context::Context) -> ttrpc::Result<()>;

/// Every call that needs the guest, and its deadline in `sandbox/job.rs`, in seconds.
const CALLS: [(&str, u64, Call); 5] = [
    ("Kill", 10, |task, context| {
        let request = api::KillRequest { id: HOSTILE.into(), signal: 15, ..Default::default() };
        task.kill(context, &request).map(drop)
    }),
    ("Stats", 1, |task, context| {
        let request = api::StatsRequest { id: HOSTILE.into(), ..Default::default() };
        task.stats(context, &request).map(drop)
    }),
    ("Update", 10, |task, context| {
        let request = api::UpdateTaskRequest { id: HOSTILE.into(), ..Default::default() };
        task.update(context, &request).map(drop)
    }),
    ("ResizePty", 10, |task, context| {
        let request =
            api::ResizePtyRequest { id: HOSTILE.into(), width: 80, height: 25, ..Default::default() };
        task.resize_pty(context, &request).map(drop)
    }),
    ("Exec", 10, |task, context| {
        let request =
            api::ExecProcessRequest { id: HOSTILE.into(), exec_id: "e".into(), ..Default::default() };
        task.exec(context, &request).map(drop)
    }),
];

/// The others are answered from memory, at once.
const AT_ONCE: [(&str, Call); 4] = [
    ("State", |task, context| {
        task.state(context, &api::StateRequest { id: HOSTILE.into(), ..Default::default() }).map(drop)
    }),
    ("Pids", |task, context| {
        task.pids(context, &api::PidsRequest { id: HOSTILE.into(), ..Default::default() }).map(drop)
    }),
    ("Connect", |task, context| {
        task.connect(context, &api::ConnectRequest { id: HOSTILE.into(), ..Default::default() }).map(drop)
    }),
    ("CloseIO", |task, context| {
        let request = api::CloseIORequest { id: HOSTILE.into(), stdin: true, ..Default::default() };
        task.close_io(context, &request).map(drop)
    }),
];

pub(crate) fn every_call_to_a_hung_guest_returns_by_its_deadline(backend: Backend) {
    let arena = Arena::new(backend, "hang");
    arena.run_hostile(&["wait"]).succeeds();
    // Calls on the way to a running container, each in a sandbox of its own, with its deadline. The
    // longer ones wait in `make soak` only.
    let mut ways = vec![("Start", 30)];
    if soak::rounds(0, 1) > 0 {
        ways.extend([("PrepareSandbox", 30), ("Create", 60), ("Hello", 120)]);
    }
    let begun = Instant::now();
    let creating: Vec<_> = ways
        .iter()
        .map(|(method, _)| {
            arena.will_attack(method, &format!("{method}=silence"));
            start(&mut arena.lab.run_command(&["--detach", "--null-io"], method, &["wait"]))
        })
        .collect();
    let (shim, limit) = (client(&arena, HOSTILE), 120_000_000_000);
    std::thread::scope(|scope| {
        for (name, deadline, call) in CALLS {
            let task = shim.0.clone();
            scope.spawn(move || {
                let begun = Instant::now();
                let error = call(&task, with_timeout(limit)).expect_err("a guest that hangs").to_string();
                let took = begun.elapsed();
                assert!(took < Duration::from_secs(deadline) + SLACK, "{name} took {took:?}");
                assert!(error.contains(name), "{name}: {error}");
                soak::record("hung guest", &format!("{name} returns after, ms"), took.as_millis());
            });
        }
        for (name, call) in AT_ONCE {
            let task = shim.0.clone();
            scope.spawn(move || {
                let begun = Instant::now();
                call(&task, with_timeout(limit)).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(begun.elapsed() < Duration::from_secs(4), "{name} took {:?}", begun.elapsed());
            });
        }
    });
    arena.honest_sandbox_works();
    arena.remove_hostile();
    for (running, (method, deadline)) in creating.into_iter().zip(&ways) {
        let failed = running.wait(Duration::from_secs(200)).fails_with(&[method]);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(*deadline) + 3 * SLACK, "{method} took {took:?}: {failed}");
        soak::record("hung guest", &format!("{method} returns after, ms"), took.as_millis());
        arena.lab.ctr(&["task", "delete", "--force", method]);
        arena.lab.ctr(&["container", "delete", method]);
    }
    arena.end("hung guest");
}

/// It takes the signal and nothing happens, or says that there is nobody to signal.
pub(crate) fn a_guest_that_lies_about_a_kill_is_killed(backend: Backend) {
    for attack in ["events=never", "Kill=status:5", "Kill=status:13", "Kill=silence", "Kill=garbage"] {
        let arena = Arena::new(backend, attack);
        arena.run_hostile(&["wait"]).succeeds();
        // Not found is passed on, as it may be true.
        arena.lab.ctr(&["task", "kill", "--signal", "SIGKILL", HOSTILE]);
        arena.lab.wait_for_state(HOSTILE, Some("STOPPED"));
        arena.lab.delete_stopped(HOSTILE, 137);
        arena.end("lying guest");
    }
}
