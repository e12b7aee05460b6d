//! The reaper with real children. In a process of its own, because it reaps every child.

// Of the tests: helpers may panic, and it is the reaper that waits for children.
#![allow(clippy::unwrap_used, clippy::zombie_processes)]

use std::{
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime},
};

use cube_agent::boot::reaper::{Exit, Reaper};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

async fn run(reaper: &Arc<Reaper>, script: &str) -> Exit {
    let spawning = reaper.spawning();
    let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
    let exit = spawning.watch(child.id() as i32);
    timeout(LIMIT, exit).await.unwrap().unwrap()
}

/// Whether `pid` is a process, or a zombie that nobody has reaped.
fn exists(pid: i32) -> bool {
    std::fs::metadata(format!("/proc/{pid}")).is_ok()
}

#[tokio::test]
async fn every_child_is_reaped_and_every_exit_told() {
    // SAFETY: no pointers. Orphans come to this process, as they come to PID 1.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0);
    let reaper = Reaper::start().unwrap();

    let before = SystemTime::now();
    assert_eq!(run(&reaper, "exit 3").await.status, 3);
    assert_eq!(run(&reaper, "kill -KILL $$").await.status, 137);
    assert_eq!(run(&reaper, "kill -TERM $$").await.status, 143);
    // A realtime signal, which nix cannot tell.
    assert_eq!(run(&reaper, "kill -40 $$").await.status, 168);
    let exit = run(&reaper, "exit 255").await;
    assert_eq!(exit.status, 255);
    assert!(before <= exit.at && exit.at <= SystemTime::now());

    a_child_that_ended_before_it_was_watched_is_told(&reaper).await;
    a_hundred_children_that_end_at_once_are_all_told(&reaper).await;
    orphans_do_not_stay_zombies(&reaper).await;
}

async fn a_child_that_ended_before_it_was_watched_is_told(reaper: &Arc<Reaper>) {
    let spawning = reaper.spawning();
    let child = Command::new("/bin/sh").args(["-c", "exit 7"]).spawn().unwrap();
    let pid = child.id() as i32;
    wait_until_gone(pid).await;
    let exit = timeout(LIMIT, spawning.watch(pid)).await.unwrap().unwrap();
    assert_eq!(exit.status, 7);
}

async fn a_hundred_children_that_end_at_once_are_all_told(reaper: &Arc<Reaper>) {
    let mut exits = Vec::new();
    for number in 0..100u8 {
        let spawning = reaper.spawning();
        let script = format!("exit {number}");
        let child = Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap();
        exits.push((number, spawning.watch(child.id() as i32)));
    }
    for (number, exit) in exits {
        assert_eq!(timeout(LIMIT, exit).await.unwrap().unwrap().status, number);
    }
}

async fn orphans_do_not_stay_zombies(reaper: &Arc<Reaper>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    // The parent of the sleeping process ends first, so that it becomes ours.
    let script = format!("sleep 0.2 & echo $! > {}", file.path().display());
    assert_eq!(run(reaper, &script).await.status, 0);
    let orphan: i32 = std::fs::read_to_string(file.path()).unwrap().trim().parse().unwrap();
    wait_until_gone(orphan).await;
}

async fn wait_until_gone(pid: i32) {
    let gone = async {
        while exists(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, gone).await.unwrap_or_else(|_| panic!("process {pid} is still there"));
}
