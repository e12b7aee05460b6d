//! Attacks on the stream port.

use std::{fs, process::Stdio, time::Duration};

use cube_test_writer::fill;
use cube_tests::{command::start, logs, needs::Backend, soak};

use crate::arena::{Arena, HOSTILE, SEGMENT, SEGMENTS};

/// The hostile container of an attack by execs.
const WAIT: [&str; 2] = ["wait", "for execs"];

/// Forbidden frames on an open stream, and in place of its beginning, that the stand-in knows.
const FORBIDDEN: u64 = 30;
const FORBIDDEN_FIRST: u64 = 9;

/// Connections on which a stream may break the protocol before it is given up, less one.
const PATIENCE: u64 = 15;

/// What the relay says when it closes such a connection.
const REFUSAL: &str = "closed a stream connection";

/// The first bytes of the stream of seed 1.
fn good(bytes: u64) -> Vec<u8> {
    let mut good = vec![0; bytes as usize];
    fill(1, 0, &mut good);
    good
}

fn arena(backend: Backend) -> Arena {
    let arena = Arena::new(backend, "none");
    arena.run_hostile(&WAIT).succeeds();
    arena
}

/// The next connection goes on where the good bytes ended. Each refusal is counted, and said.
pub(crate) fn a_forbidden_frame_closes_its_connection_and_costs_no_byte(backend: Backend) {
    let arena = arena(backend);
    let mut refused = 0;
    for from in (0..FORBIDDEN).step_by(PATIENCE as usize) {
        let to = FORBIDDEN.min(from + PATIENCE);
        let exec = arena.exec_attack(&["frames", &from.to_string(), &to.to_string()]).succeeds();
        assert_eq!(exec.stdout, good(to - from), "frames from {from} to {to}");
        refused += to - from;
        assert_eq!(arena.logged(&[REFUSAL]) as u64, refused);
    }
    assert_eq!(arena.exec_attack(&["first"]).succeeds().out(), "");
    assert_eq!(arena.exec_attack(&["epoch"]).succeeds().stdout, good(1));
    refused += FORBIDDEN_FIRST + 4;
    assert_eq!(arena.logged(&[REFUSAL]) as u64, refused);
    assert_eq!(arena.exec_attack(&["eof-then-data"]).succeeds().stdout, good(1));
    arena.remove_hostile();
    soak::record("hostile frames", "forbidden frames refused", refused);
    arena.end("hostile frames");
}

/// And headers that are valid, but not here.
pub(crate) fn random_bytes_are_no_frames(backend: Backend) {
    let arena = arena(backend);
    let rounds = soak::rounds(4, 200);
    let first = std::process::id();
    for seed in first..first + rounds {
        let (seed, count) = (seed.to_string(), PATIENCE.to_string());
        let exec = arena.exec_attack(&["random", &seed, &count]).succeeds();
        assert_eq!(exec.stdout, good(PATIENCE), "seed {seed}");
    }
    assert_eq!(arena.logged(&[REFUSAL]) as u64, u64::from(rounds) * PATIENCE);
    arena.remove_hostile();
    soak::record("hostile frames", "random frames refused", u64::from(rounds) * PATIENCE);
    arena.end("hostile random frames");
}

/// An ERROR with any code and too long a text, half a frame, no answer at all, no end of misbehaviour.
pub(crate) fn a_stream_that_is_refused_or_stuck_holds_no_exec_up(backend: Backend) {
    let arena = arena(backend);
    let codes = (0..=9).chain([99]).map(|code: u32| code.to_string()).collect::<Vec<_>>();
    let mut attacks: Vec<(Vec<&str>, u64)> = Vec::new();
    for code in &codes {
        attacks.push((vec!["error", code], 0));
        // Some codes are worth another attempt, with another good byte.
        attacks.push((vec!["late-error", code], 1));
    }
    attacks.push((vec!["half", "7"], 1));
    attacks.push((vec!["half", "60"], 1));
    attacks.push((vec!["mute"], 0));
    thread_scope(&arena, &attacks);
    arena.honest_sandbox_works();
    let refusals = arena.logged(&[REFUSAL]) as u64;
    // Two codes mean a broken protocol, and two are unknown; each stream is given up after 16.
    assert!(refusals <= 8 * (PATIENCE + 1), "{refusals} refusals");
    arena.remove_hostile();
    arena.end("hostile refusals");
}

/// Runs the attacks, some at a time, and checks how many good bytes there are at least.
fn thread_scope(arena: &Arena, attacks: &[(Vec<&str>, u64)]) {
    for attacks in attacks.chunks(8) {
        let running: Vec<_> = attacks
            .iter()
            .map(|(attack, _)| {
                let argv = [&["attack"], attack.as_slice()].concat();
                start(&mut arena.lab.exec_command(&[], HOSTILE, &argv))
            })
            .collect();
        for (running, (attack, bytes)) in running.into_iter().zip(attacks) {
            let exec = running.wait(arena.lab.limit()).succeeds();
            let got = exec.stdout.len() as u64;
            assert_eq!(exec.stdout, good(got), "{attack:?}");
            assert!(got >= *bytes, "{attack:?}: {got} bytes");
        }
    }
}

pub(crate) fn an_acknowledgement_that_cannot_be_right_costs_no_byte_of_stdin(backend: Backend) {
    let arena = arena(backend);
    for attack in ["ahead", "far-ahead", "data", "opened", "stopped", "gap", "opened-ahead"] {
        let refused = arena.logged(&[REFUSAL]);
        let mut command = arena.lab.exec_command(&[], HOSTILE, &["attack", "stdin", attack, "200"]);
        let mut exec = start(command.stdin(Stdio::piped()));
        exec.feed(vec![b'x'; 200]);
        // The stand-in exits with the number of bytes that it was given.
        exec.wait(arena.lab.limit()).exits_with(200);
        assert_eq!(arena.logged(&[REFUSAL]) - refused, 3, "{attack}");
    }
    arena.remove_hostile();
    arena.end("hostile stdin");
}

pub(crate) fn connections_that_end_at_once_are_dialled_at_a_bounded_rate(backend: Backend) {
    let arena = arena(backend);
    let window = Duration::from_secs(u64::from(soak::rounds(2, 30)));
    for storm in ["at-once", "after-opened", "after-a-byte"] {
        let exec = start(&mut arena.lab.exec_command(&[], HOSTILE, &["attack", "storm", storm]));
        let before = arena.counted("connections");
        let cpu = arena.cpu_of_shim(window);
        let rate = (arena.counted("connections") - before) as f64 / window.as_secs_f64();
        arena.honest_sandbox_works();
        println!("{storm}: {rate:.0} connections a second, {:.1} % of a CPU", cpu * 100.0);
        soak::record("hostile storm", &format!("connections a second, {storm}"), format!("{rate:.0}"));
        soak::record(
            "hostile storm",
            &format!("CPU of the shim in %, {storm}"),
            format!("{:.1}", cpu * 100.0),
        );
        assert!(rate <= 150.0, "{storm}: {rate} connections a second");
        assert!(cpu <= 0.25, "{storm}: {cpu} CPUs");
        drop(exec);
    }
    arena.remove_hostile();
    arena.end("hostile storm");
}

/// At full speed, in frames of 64 KiB and of one byte, and as losses.
pub(crate) fn output_without_end_stays_in_its_log_and_in_its_memory(backend: Backend) {
    let time = Duration::from_secs(u64::from(soak::rounds(2, 60)));
    let tiny = soak::rounds(100_000, 5_000_000).to_string();
    for attack in [&["flood"][..], &["tiny", &tiny], &["gaps", &tiny], &["jump"]] {
        let arena = Arena::new(backend, "none");
        arena.run_hostile(&[&["attack"], attack].concat()).succeeds();
        if attack == ["flood"] {
            std::thread::sleep(time);
            arena.honest_sandbox_works();
        } else {
            arena.honest_sandbox_works();
            arena.lab.wait_for_state(HOSTILE, Some("STOPPED"));
        }
        let dir = arena.lab.log_dir(HOSTILE);
        let size = || -> u64 {
            fs::read_dir(&dir)
                .unwrap()
                .flatten()
                .map(|file| file.metadata().map_or(0, |file| file.len()))
                .sum()
        };
        let most = (0..20).map(|_| size()).max().unwrap();
        assert!(most <= 2 * SEGMENT * SEGMENTS, "{attack:?}: the log has {most} bytes");
        arena.remove_hostile();
        if attack[0] == "flood" || attack[0] == "tiny" {
            let end = logs::segments(&dir, "stdout")
                .last()
                .map(|last| last.header.first_offset + last.len)
                .unwrap();
            logs::compare_segments(&dir, "stdout", 1, end);
            soak::record("hostile output", &format!("bytes of {}", attack[0]), end);
        }
        // Whoever reads such a log is not led astray, either.
        arena.lab.cubecli(&["cubebox", "logs", "--tail", "5", HOSTILE]);
        arena.end(&format!("hostile {}", attack[0]));
    }
}
