//! Attacks on the control port: answers, errors, identities; and the console.

use std::time::Duration;

use cube_tests::{command::Finished, needs::Backend, soak};

use crate::arena::{Arena, HOSTILE};

/// Fails unless the error is short and harmless to a terminal, and has one of `words`.
fn explains(finished: Finished, words: &[&str]) {
    assert_ne!(finished.code(), 0, "{finished}");
    let text = finished.err();
    assert!(text.len() < 6000, "an error of {} bytes", text.len());
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control characters in {text:?}");
    assert!(words.iter().any(|word| text.contains(word)), "none of {words:?} in {text}");
}

/// Whatever of the sandbox could not be created is gone.
fn forget(arena: &Arena) {
    arena.lab.ctr(&["task", "delete", "--force", HOSTILE]);
    arena.lab.ctr(&["container", "delete", HOSTILE]);
}

/// Of every method that is called on the way to a running container.
pub(crate) fn an_answer_that_makes_no_sense_is_an_error_that_says_so(backend: Backend) {
    let methods = ["PrepareSandbox", "Create", "Start"];
    let answers = ["garbage", "garbage-payload", "huge", "bomb", "oversize", "close"];
    let arena = Arena::new(backend, "version");
    explains(arena.run_hostile(&["true"]), &["77.5"]);
    forget(&arena);
    for (n, answer) in answers.into_iter().enumerate() {
        // In `make soak` each with each.
        let each = soak::rounds(1, methods.len() as u32) as usize;
        for method in methods.iter().cycle().skip(n).take(each) {
            arena.will_attack(HOSTILE, &format!("{method}={answer}"));
            explains(arena.run_hostile(&["true"]), &[method]);
            forget(&arena);
            arena.honest_sandbox_works();
        }
    }
    for harmless in ["strays", "data"] {
        arena.will_attack(HOSTILE, &format!("Start={harmless}"));
        let started = arena.run_hostile(&["true"]);
        // The connection may be given up for it; what must not happen is that something hangs.
        if started.code() == 0 {
            arena.remove_hostile();
        } else {
            explains(started, &["Start"]);
            forget(&arena);
        }
    }
    arena.end("hostile answers");
}

pub(crate) fn an_error_of_any_length_is_told_in_a_line(backend: Backend) {
    let arena = Arena::new(backend, "none");
    // 0 is OK, 2 UNKNOWN, 5 NOT_FOUND, 12 UNIMPLEMENTED, 13 INTERNAL, 99 nothing.
    let codes = if soak::rounds(0, 1) == 0 { vec![2, 12, 99] } else { (1..=16).chain([99, -1]).collect() };
    for code in codes {
        let method = ["Create", "Start"][code as usize % 2];
        arena.will_attack(HOSTILE, &format!("{method}=status:{code}"));
        let answer = arena.run_hostile(&["true"]);
        // An error that has no code that we know is none; nothing else is said then.
        if answer.code() != 0 {
            explains(answer, &["no such luck", method]);
        }
        forget(&arena);
    }
    arena.will_attack(HOSTILE, "Kill=status:13");
    arena.run_hostile(&["true"]).succeeds();
    let kill = arena.lab.ctr(&["task", "kill", "--signal", "SIGTERM", HOSTILE]);
    explains(kill, &["no such luck"]);
    // SIGKILL is not the guest's to refuse.
    arena.lab.ctr(&["task", "kill", "--signal", "SIGKILL", HOSTILE]).succeeds();
    arena.lab.wait_for_state(HOSTILE, Some("STOPPED"));
    arena.remove_hostile();
    arena.end("hostile errors");
}

pub(crate) fn another_guest_behind_the_same_socket_is_the_end_of_the_sandbox(backend: Backend) {
    let arena = Arena::new(backend, "other-guest");
    arena.run_hostile(&["true"]).succeeds();
    arena.lab.wait_for_state(HOSTILE, Some("STOPPED"));
    assert!(arena.logged(&["the guest has restarted"]) > 0);
    arena.lab.delete_stopped(HOSTILE, 137);
    arena.end("hostile identity");
}

pub(crate) fn a_console_without_end_costs_a_bounded_memory(backend: Backend) {
    let arena = Arena::new(backend, "console");
    arena.run_hostile(&["true"]).succeeds();
    std::thread::sleep(Duration::from_secs(u64::from(soak::rounds(2, 60))));
    arena.honest_sandbox_works();
    let log = arena.lab.dir().join("containerd.log");
    assert!(std::fs::metadata(log).unwrap().len() < 8 << 20, "the console went to the log");
    arena.remove_hostile();
    arena.end("hostile console");

    // A line without end, where the handshake should be.
    let arena = Arena::new(backend, "handshake");
    arena.run_hostile(&["true"]).succeeds();
    arena.honest_sandbox_works();
    // What the killed shim leaves is cleaned up with the guest still at it.
    nix::sys::signal::kill(arena.lab.shim_pid(HOSTILE), nix::sys::signal::Signal::SIGKILL).unwrap();
    arena.lab.wait_for_state(HOSTILE, None);
    arena.lab.ctr(&["container", "delete", HOSTILE]).succeeds();
    arena.end("hostile handshake");
}
