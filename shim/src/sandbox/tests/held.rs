//! Exits that wait for a reader, as the owner tells them.
//!
//! The guest of these tests has more output than a pipe holds, and the readers take none of it.

use std::{
    fs::{self, File},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use ttrpc::Code;

use super::lab::*;
use crate::sandbox::{CreateRequest, ExecRequest, KillRequest, SnapshotRequest, Status, Stdio};

/// A container whose process has exited with 7, with a reader of its output.
struct Held {
    lab: Lab,
    reader: File,
}

impl Held {
    async fn new() -> Held {
        let lab = speaking().await;
        let (stdout, reader) = fifo(&lab, "stdout");
        let stdio = Stdio { stdout, ..Default::default() };
        let request = CreateRequest { stdio, ..lab.request("c1", spec()) };
        lab.sandbox.create(request).await.unwrap();
        lab.sandbox.start(init("c1")).await.unwrap();
        lab.guest().exit("c1", "", 7);
        let held = Held { lab, reader };
        held.is_held().await;
        held
    }

    async fn is_held_still(&self) {
        let state = self.lab.sandbox.state(init("c1")).await.unwrap();
        assert_eq!((state.status, state.exit), (Status::Running, None));
    }

    /// The guest has told the exit, and containerd is not told.
    async fn is_held(&self) {
        let lab = &self.lab;
        within(async {
            while lab.sandbox.status().await.unwrap().vm.unwrap().link.last_event == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        // Longer than a first reader is waited for.
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        let state = lab.sandbox.state(init("c1")).await.unwrap();
        assert_eq!((state.status, state.exit), (Status::Running, None));
        assert_eq!(lab.events().await, ["create", "start"]);
    }
}

async fn speaking() -> Lab {
    let lab = Lab::new().await;
    lab.guest().speaks.store(true, Ordering::Relaxed);
    lab
}

/// The path of a FIFO, and its reader.
fn fifo(lab: &Lab, name: &str) -> (String, File) {
    let path: PathBuf = lab.dir.path().join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    let reader = open(&path);
    (path.to_str().unwrap().into(), reader)
}

fn open(path: &Path) -> File {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

fn kill(signal: i32, all: bool) -> KillRequest {
    KillRequest { process: init("c1"), signal: signal.cast_unsigned(), all }
}

#[tokio::test]
async fn a_signal_that_asks_for_the_end_is_answered_with_the_exit_of_the_process() {
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let held = Held::new().await;
        let lab = &held.lab;
        within(lab.sandbox.kill(kill(signal, false))).await.unwrap();
        assert_eq!(lab.wait(init("c1")).await, 7);
        assert_eq!(lab.events().await, ["create", "start", "exit"]);
        let calls = lab.guest().calls.lock().unwrap().clone();
        assert!(!calls.iter().any(|call| call.starts_with("Kill")), "there is nobody to signal: {calls:?}");
        assert!(lab.kill(init("c1"), signal.cast_unsigned()).await.is_err(), "it has exited");
    }
}

#[tokio::test]
async fn other_signals_are_accepted_and_do_nothing() {
    let held = Held::new().await;
    for signal in [0, libc::SIGUSR1, libc::SIGWINCH, libc::SIGSTOP, libc::SIGCHLD] {
        within(held.lab.sandbox.kill(kill(signal, false))).await.unwrap();
    }
    held.is_held().await;
    // Those of its container that live get what is for all of them.
    within(held.lab.sandbox.kill(kill(libc::SIGUSR1, true))).await.unwrap();
    let calls = held.lab.guest().calls.lock().unwrap().clone();
    assert!(calls.iter().any(|call| call == "Kill c1"), "{calls:?}");
}

#[tokio::test]
async fn an_exit_after_sigkill_waits_for_a_reader_for_2_s_only() {
    let lab = speaking().await;
    let (stdout, _reader) = fifo(&lab, "stdout");
    let stdio = Stdio { stdout, ..Default::default() };
    lab.sandbox.create(CreateRequest { stdio, ..lab.request("c1", spec()) }).await.unwrap();
    lab.sandbox.start(init("c1")).await.unwrap();
    lab.kill(init("c1"), 9).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 137);
}

#[tokio::test]
async fn a_delete_is_the_end_of_the_wait_and_tells_the_exit_first() {
    let held = Held::new().await;
    let deleted = within(held.lab.sandbox.delete(init("c1"))).await.unwrap();
    assert_eq!(deleted.exit.status, 7);
    assert_eq!(held.lab.events().await, ["create", "start", "exit", "delete"]);
}

#[tokio::test]
async fn the_exit_of_an_exec_is_held_back_as_well_and_its_container_serves_on() {
    let lab = speaking().await;
    lab.run("c1").await;
    let (stdout, reader) = fifo(&lab, "stdout");
    let process = exec("c1", "e1");
    let stdio = Stdio { stdout, ..Default::default() };
    let request = ExecRequest { process: process.clone(), spec: Default::default(), stdio };
    lab.sandbox.exec(request).await.unwrap();
    lab.sandbox.start(process.clone()).await.unwrap();
    lab.guest().exit("c1", "e1", 3);
    let waits = tokio::time::timeout(std::time::Duration::from_secs(1), lab.sandbox.wait(process.clone()));
    assert!(waits.await.is_err(), "told with a reader that has no end");
    lab.sandbox.stats("c1".into()).await.unwrap();
    drop(reader);
    assert_eq!(lab.wait(process).await, 3);
}

#[tokio::test]
async fn an_exit_that_is_held_back_survives_a_pause() {
    let held = Held::new().await;
    let lab = &held.lab;
    within(lab.sandbox.pause("c1".into())).await.unwrap();
    assert_eq!(lab.sandbox.state(init("c1")).await.unwrap().status, Status::Paused);
    within(lab.sandbox.resume("c1".into())).await.unwrap();
    assert_eq!(lab.sandbox.state(init("c1")).await.unwrap().status, Status::Running);
    within(lab.sandbox.kill(kill(libc::SIGTERM, false))).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 7);
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed", "exit"]);
}

#[tokio::test]
async fn there_is_no_snapshot_rollback_or_exec_of_what_has_exited() {
    let held = Held::new().await;
    let lab = &held.lab;
    let refused = within(lab.sandbox.snapshot(SnapshotRequest::default())).await.unwrap_err();
    assert_eq!(refused.code(), Code::FAILED_PRECONDITION);
    assert!(refused.to_string().contains("its reader has not taken"), "{refused}");
    let process = exec("c1", "e1");
    let request = ExecRequest { process, spec: Default::default(), stdio: Stdio::default() };
    assert_eq!(lab.sandbox.exec(request).await.unwrap_err().code(), Code::FAILED_PRECONDITION);
    assert!(within(lab.sandbox.rollback("any".into())).await.is_err());
    held.is_held_still().await;
}

#[tokio::test]
async fn the_death_of_a_reader_or_of_the_vm_tells_the_exit_that_was() {
    let Held { lab, reader } = Held::new().await;
    lab.host.vmm.die();
    assert_eq!(lab.wait(init("c1")).await, 7);
    drop(reader);
    fs::remove_dir_all(lab.run_dir.path()).unwrap();
}
