use std::os::{fd::OwnedFd, unix::process::CommandExt};

use nix::pty::openpty;
use stream::Stream::{STDIN, TERMINAL};

use super::*;

const REQUEST: Request =
    Request { terminal: true, stdin: true, stdout: true, stderr: false, policy: Policy::Block };

/// Runs `script` on the slave in a session of its own, as the init stage does.
fn spawn_on(slave: OwnedFd, script: &str) -> Running {
    let stdio = || slave.try_clone().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(stdio()).stdout(stdio()).stderr(stdio());
    // SAFETY: setsid and ioctl are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            nix::errno::Errno::result(nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0))?;
            Ok(())
        });
    }
    Running(command.spawn().unwrap())
}

#[tokio::test]
async fn a_terminal_carries_both_directions_and_ends_with_its_process() {
    let hub = hub();
    assert!(matches!(hub.open(&process(), REQUEST).unwrap(), ChildStdio::Terminal));
    let (mut host, _) = Host::open(&hub, TERMINAL, 1, 0).await;
    let (mut stdin, _) = Host::open(&hub, STDIN, 1, 0).await;
    stdin.send_data(0, b"typed ahead\n").await;
    hub.resize(&process(), 90, 33).unwrap();

    let pty = openpty(None, None).unwrap();
    hub.attach_terminal(&process(), pty.master).unwrap();
    let child =
        spawn_on(pty.slave, "stty -echo; stty size; read line; echo \"<$line>\"; read line; stty size");
    assert_eq!(stdin.expect(Kind::Ack).await.header.offset, 12);
    // EOF does nothing on a terminal: its process reads on, and a new connection may bring more.
    stdin.send_header(Header::new(Kind::Eof, 12)).await;
    assert_eq!(stdin.expect(Kind::Ack).await.header, Header::new(Kind::Ack, 12).with_flags(Flags::LAST));
    let (mut stdin, _) = Host::open(&hub, STDIN, 2, 12).await;

    let mut seen = String::new();
    while !seen.contains("<typed ahead>") {
        let frame = host.expect(Kind::Data).await;
        seen.push_str(std::str::from_utf8(&frame.body).unwrap());
    }
    assert!(seen.contains("33 90"), "{seen}");
    hub.resize(&process(), 100, 40).unwrap();
    stdin.send_data(12, b"\n").await;
    let (rest, eof) = host.drain(seen.len() as u64).await;
    assert!(String::from_utf8(rest).unwrap().contains("40 100"));
    assert_eq!(eof.flags, Flags::NONE, "EIO is the end of a terminal");
    assert!(exit(child).await.success());
    assert_eq!(info(&hub, "terminal").end_offset, eof.offset);
}

#[tokio::test]
async fn a_terminal_whose_output_nobody_wants_does_not_stall_its_process() {
    let hub = hub();
    hub.open(&process(), Request { stdin: false, stdout: false, ..REQUEST }).unwrap();
    let pty = openpty(None, None).unwrap();
    let child = spawn_on(pty.slave, "seq 1 100000");
    hub.attach_terminal(&process(), pty.master).unwrap();
    assert!(exit(child).await.success());
    assert!(hub.streams().is_empty());
}

#[tokio::test]
async fn a_process_that_never_got_its_terminal_ends_without_output() {
    let hub = hub();
    hub.open(&process(), REQUEST).unwrap();
    let (mut host, _) = Host::open(&hub, TERMINAL, 1, 0).await;
    hub.exited(&process());
    assert_eq!(host.expect(Kind::Eof).await.header, Header::new(Kind::Eof, 0));
}
