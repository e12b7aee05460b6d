//! A stand-in for the agent that a container has taken over. It is honest up to the point of attack:
//! containers are created and started, execs registered, exits reported.
//!
//! `cube-hostile-agent ATTACK process --listen SOCKET --cgroup DIR --state DIR`, the last three as the
//! `process` backend gives them. `ATTACK` is what the control port does ([`control::Attack`]); what a
//! stream does is told by the arguments of its process, `attack NAME ...` ([`stream`]).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "all of this is tests")]

mod control;
mod frames;
mod stream;
mod world;

use std::{
    env,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::ExitCode,
    sync::Arc,
    thread,
};

use cube_protocol::ports;

use self::{control::Attack, world::World};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let [attack, "process", "--listen", socket, "--cgroup", _, "--state", state] = args[..] else {
        eprintln!("cube-hostile-agent: unexpected arguments {args:?}");
        return ExitCode::FAILURE;
    };
    let Some(attack) = Attack::parse(attack) else {
        eprintln!("cube-hostile-agent: unknown attack {attack:?}");
        return ExitCode::FAILURE;
    };
    let listener = UnixListener::bind(socket).unwrap();
    if matches!(attack, Attack::Console) {
        thread::spawn(flood_console);
    }
    let world = Arc::new(World::new(attack, state.into()));
    for connection in listener.incoming().flatten() {
        let world = world.clone();
        thread::spawn(move || serve(&world, connection));
    }
    ExitCode::SUCCESS
}

fn serve(world: &Arc<World>, mut connection: UnixStream) {
    let mut line = Vec::new();
    let mut byte = [0];
    while connection.read_exact(&mut byte).is_ok() && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let port = line.strip_prefix(b"CONNECT ").and_then(|port| std::str::from_utf8(port).ok()?.parse().ok());
    world.count("connections");
    if port == Some(ports::STREAM) && matches!(world.attack, Attack::Handshake) && world.has_started() {
        return attack_handshake(connection);
    }
    if connection.write_all(b"OK 1\n").is_err() {
        return;
    }
    match port {
        Some(ports::CONTROL) => control::serve(world, connection),
        Some(ports::STREAM) => stream::serve(world, connection),
        _ => {}
    }
}

/// A line without end in place of `OK`.
fn attack_handshake(mut connection: UnixStream) {
    while connection.write_all(&[b'O'; 4096]).is_ok() {}
}

fn flood_console() {
    let line =
        b"\x1b[2J\x07console\xff console console console console console console console\r\n".repeat(512);
    while io::stdout().write_all(&line).is_ok() && io::stderr().write_all(&line).is_ok() {}
}
