//! Attacks by what the guest says has happened.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cube_tests::{command::start, needs::Backend, soak};

use crate::{
    arena::{Arena, HOSTILE},
    deadlines::client,
};

/// Answers to Events that the shim may ask for in a second, on average.
const POLLS_MAX: f64 = 60.0;

/// Of processes that do not exist, of a process that has exited already, nothing at all, errors, and
/// connections that end.
pub(crate) fn events_without_end_are_taken_at_a_bounded_rate(backend: Backend) {
    for kind in ["unknown", "again", "empty", "refused", "close"] {
        let arena = Arena::new(backend, &format!("events={kind}"));
        arena.run_hostile(&["wait"]).succeeds();
        // The first ones may come at once.
        std::thread::sleep(Duration::from_secs(1));
        let before = arena.counted("Events");
        let window = Duration::from_secs(u64::from(soak::rounds(3, 60)));
        let cpu = arena.cpu_of_shim(window);
        let rate = (arena.counted("Events") - before) as f64 / window.as_secs_f64();
        arena.honest_sandbox_works();
        println!("{kind}: {rate:.0} polls a second, {:.1} % of a CPU", cpu * 100.0);
        soak::record("hostile events", &format!("polls a second, {kind}"), format!("{rate:.0}"));
        soak::record(
            "hostile events",
            &format!("CPU of the shim in %, {kind}"),
            format!("{:.1}", cpu * 100.0),
        );
        assert!(rate <= POLLS_MAX, "{kind}: {rate} polls a second");
        assert!(cpu <= 0.25, "{kind}: {cpu} CPUs");
        let lines = arena.logged(&["level=warn"]) + arena.logged(&["level=error"]);
        assert!(lines < 200, "{kind}: {lines} lines in the log");
        arena.remove_hostile();
        arena.end(&format!("hostile events, {kind}"));
    }
}

/// 0 to 255, and neither before the container was created nor after now.
pub(crate) fn an_exit_that_cannot_be_true_is_told_as_far_as_it_can_be(backend: Backend) {
    let arena = Arena::new(backend, "events=odd");
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let before = now();
    arena.run_hostile(&["wait"]).succeeds();
    arena.lab.wait_for_state(HOSTILE, Some("STOPPED"));
    let state = client(&arena, HOSTILE).state(HOSTILE);
    assert_eq!(state.exit_status, 255, "65536 would be success to a shell");
    let at = state.exited_at.seconds;
    assert!(at >= before && at <= now(), "exited at {at}");
    arena.lab.delete_stopped(HOSTILE, 255);
    arena.end("hostile exits");
}

/// containerd and whoever listens to it is told that memory is short, and not how often.
pub(crate) fn out_of_memory_a_hundred_thousand_times_is_a_handful_of_events(backend: Backend) {
    let arena = Arena::new(backend, "events=oom");
    let events = start(&mut arena.lab.ctr_command(&["events"]));
    let begun = Instant::now();
    arena.run_hostile(&["wait"]).succeeds();
    events.stdout.wait_for("/tasks/oom", arena.lab.limit());
    std::thread::sleep(Duration::from_secs(u64::from(soak::rounds(3, 60))));
    arena.honest_sandbox_works();
    arena.remove_hostile();
    events.stdout.wait_for(&format!("\"container_id\":\"{HOSTILE}\",\"pid\""), arena.lab.limit());
    let told = events.stdout.text().matches("/tasks/oom").count();
    let seconds = begun.elapsed().as_secs() as usize;
    assert!(told <= seconds + 2, "{told} events in {seconds} s");
    drop(events);
    soak::record("hostile events", "OOM events told to containerd", told);
    arena.end("hostile OOM");
}
