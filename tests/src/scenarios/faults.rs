//! Connections that are cut, stalled and split between shim and guest.

pub mod control;
mod conversation;
pub mod readers;

use std::{
    io::Read,
    time::{Duration, Instant},
};

use cube_protocol::stream::Stream;

use self::conversation::{Conversation, converse, running};
use crate::{
    direct::{
        Direct, bind_mount,
        exec::{Ends, Exec},
    },
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    proxy::{
        Proxy,
        plan::{Fault, Plan, Point, Seed, Side, Target, handshake},
    },
    soak,
};

/// Mid-frame included, in both directions, while the process writes to both outputs and reads its input.
pub fn connections_cut_at_random_points_cost_no_byte(backend: Backend) {
    let (wanted, bytes): (u64, u64) = (soak::rounds(20, 200).into(), u64::from(soak::rounds(32, 512)) << 20);
    let log = "segment_bytes = 67108864\nsegments = 40".to_owned();
    let lab = Lab::with(Setup { log, ..backend.into() });
    let bytes_arg = bytes.to_string();
    let mut direct = Direct::new(&lab, "c", &["cube-test-writer", "converse", "1", &bytes_arg]);
    let proxy = Proxy::before(&lab, &direct.run_dir());
    let seed = Seed::choose();
    // Three streams, and cuts in the middle of the range on average: about twice as many as wanted.
    proxy.follow(Target::Streams, Plan::random(seed.0, 3 * bytes / wanted));
    let rootfs = direct.unpack_image();
    let (stdin, [stdout, stderr]) = (direct.write_fifo(), direct.read_fifos());
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    let started = Instant::now();
    direct.start().unwrap();
    let ends = Ends { stdin, stdout, stderr };
    Conversation { output: bytes, input: bytes }.hold(ends, || direct.close_stdin("").unwrap());
    assert_eq!(direct.wait().unwrap(), 0);
    let took = started.elapsed();
    direct.delete().unwrap();
    assert!(proxy.cuts() >= wanted, "only {} cuts", proxy.cuts());
    for (stream, seed) in [("stdout", 1), ("stderr", 2)] {
        assert_eq!(logs::compare_segments(&lab.log_dir("c"), stream, seed, bytes), 0);
    }
    direct.finish();
    lab.nothing_is_left();
    record("cuts at random points", &proxy, 4 * bytes, took);
}

/// Of each stream of a short process, in each direction.
pub fn a_connection_may_be_cut_at_every_frame_boundary(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = running(&lab);
    let proxy = Proxy::at(&direct.socket());
    let (mut sessions, mut worst) = (0, Duration::ZERO);
    for stream in [Stream::STDIN, Stream::STDOUT, Stream::STDERR] {
        for side in [Side::ToGuest, Side::ToHost] {
            // Until the connection has fewer frames than that, and the cut is not met.
            for frames in 1.. {
                let cuts = proxy.cuts();
                let cut = Fault::Cut(vec![Point::Frames(side, frames)]);
                proxy.follow(Target::Only(stream), Plan::once([cut]));
                worst = worst.max(converse(&direct, &format!("{stream:?}-{side:?}-{frames}")));
                sessions += 1;
                if proxy.cuts() == cuts {
                    assert!(frames > 2, "{stream:?} has no {frames} frames {side:?}");
                    break;
                }
            }
        }
    }
    conversation::end(&lab, direct);
    record("cuts at every frame boundary", &proxy, sessions * conversation::SHORT.bytes(), worst);
}

/// Before CONNECT reaches the guest, at each byte of the answer, of OPEN and of OPENED, and after each.
pub fn a_connection_may_be_cut_at_every_step_of_the_handshake(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = running(&lab);
    let proxy = Proxy::at(&direct.socket());
    let (mut worst, faults) = (Duration::ZERO, handshake());
    // One for each stream, so that none meets two in a row and waits longer and longer.
    for (n, steps) in faults.chunks(3).enumerate() {
        proxy.follow(Target::Streams, Plan::once(steps.to_vec()));
        worst = worst.max(converse(&direct, &format!("step-{n}")));
    }
    let most = faults.len() as u64;
    assert!(proxy.cuts() * 10 >= most * 9, "only {} cuts of {most}", proxy.cuts());
    let sessions = faults.chunks(3).len() as u64;
    conversation::end(&lab, direct);
    record("cuts in the handshake", &proxy, sessions * conversation::SHORT.bytes(), worst);
}

/// A byte at a time, in bursts, and through the smallest window.
pub fn however_a_connection_splits_its_bytes_they_arrive(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = running(&lab);
    let proxy = Proxy::at(&direct.socket());
    for (name, fault) in [
        ("single", Fault::SingleBytes),
        ("bursts", Fault::Bursts(Duration::from_millis(20))),
        ("narrow", Fault::Narrow),
    ] {
        proxy.follow(Target::Streams, Plan::Each(fault));
        let took = converse(&direct, name);
        soak::record("connections that split", &format!("{name}, seconds"), took.as_secs_f32());
    }
    conversation::end(&lab, direct);
}

/// For seconds in the middle of a frame, in either direction of each stream: nothing is lost, and
/// nothing is dialled again.
pub fn a_connection_that_stalls_and_goes_on_costs_only_time(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = running(&lab);
    let proxy = Proxy::at(&direct.socket());
    for (n, (side, after)) in [(Side::ToHost, 1000), (Side::ToGuest, 100)].into_iter().enumerate() {
        let stall = Fault::Stall(side, after, Some(Duration::from_secs(3)));
        proxy.follow(Target::Streams, Plan::once([stall.clone(), stall.clone(), stall]));
        let (before, name) = (proxy.connections(), format!("stall-{n}"));
        let took = converse(&direct, &name);
        assert!(took >= Duration::from_secs(3), "nothing was stalled: {took:?}");
        assert_eq!(proxy.connections() - before, 3, "connections of {name}");
    }
    conversation::end(&lab, direct);
}

/// What a hypervisor does that has lost a connection: the shim gives the handshake up and dials again.
pub fn a_handshake_without_an_answer_is_given_up_and_tried_again(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = running(&lab);
    let proxy = Proxy::at(&direct.socket());
    let stall = Fault::Stall(Side::ToHost, 0, None);
    proxy.follow(Target::Streams, Plan::once([stall.clone(), stall.clone(), stall]));
    let took = converse(&direct, "silence");
    assert!(proxy.connections() >= 6, "{} connections", proxy.connections());
    soak::record("handshake without an answer", "longest conversation, seconds", took.as_secs_f32());
    conversation::end(&lab, direct);
}

/// A stream on which nothing comes any more holds up no other, no exit, and Delete for a bounded time.
pub fn a_stream_that_stalls_for_good_holds_up_nothing_else(backend: Backend) {
    let lab = Lab::new(backend);
    let direct = running(&lab);
    let proxy = Proxy::at(&direct.socket());
    proxy.follow(Target::Only(Stream::STDOUT), Plan::once([Fault::Stall(Side::ToHost, 300_000, None)]));
    let (mut exec, ends) = Exec::new(&direct, "stuck", &["cube-test-writer", "converse", "1", "10000000"]);
    exec.create().unwrap();
    exec.start().unwrap();
    let mut byte = [0];
    (&ends.stdout).read_exact(&mut byte).unwrap();
    converse(&direct, "other");
    exec.kill(9).unwrap();
    assert_eq!(exec.wait().unwrap(), 137);
    let began = Instant::now();
    exec.delete().unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(15), "Delete took {took:?}");
    soak::record("stream that stalls for good", "Delete, seconds", took.as_secs_f32());
    drop(exec);
    conversation::end(&lab, direct);
}

fn record(experiment: &str, proxy: &Proxy, bytes: u64, worst: Duration) {
    soak::record(experiment, "connections cut", proxy.cuts());
    soak::record(experiment, "connections", proxy.connections());
    soak::record(experiment, "bytes compared", bytes);
    soak::record(experiment, "longest conversation, seconds", worst.as_secs_f32());
}
