//! Pause to disk, and resume from there.

use std::{path::PathBuf, sync::atomic::Ordering};

use super::*;
use crate::sandbox::{SnapshotRequest, fakes::Boot};

impl Lab {
    async fn on_disk() -> Lab {
        let lab = Lab::new().await;
        lab.run("c1").await;
        lab.to_disk().await.unwrap();
        lab
    }

    pub(super) async fn to_disk(&self) -> Result<(), Error> {
        within(self.sandbox.pause_to_disk()).await
    }

    pub(super) async fn go_on(&self) -> Result<(), Error> {
        within(self.sandbox.resume_all()).await
    }

    pub(super) async fn word(&self) -> &'static str {
        within(self.sandbox.status()).await.unwrap().state
    }

    /// What is in the store, the hidden things included.
    pub(super) fn stored(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join("snapshots")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    pub(super) fn suspended_in_state(&self) -> Option<PathBuf> {
        self.run_dir.load().unwrap().unwrap().suspended
    }

    pub(super) fn restores(&self, fate: Boot) {
        *self.host.vmm.restores.lock().unwrap() = fate;
    }

    pub(super) async fn until(&self, condition: impl Fn() -> bool) {
        within(async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_sandbox_on_disk_has_no_vm_and_is_paused_for_containerd() {
    let lab = Lab::on_disk().await;
    assert!(!lab.host.vmm.is_alive());
    assert_eq!(lab.word().await, "suspended");
    let state = within(lab.sandbox.state(init("c1"))).await.unwrap();
    assert_eq!((state.status, state.pid), (Status::Paused, PID));
    assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID);
    assert_eq!(lab.stored(), [lab.suspended_in_state().unwrap()]);
    let memory = lab.suspended_in_state().unwrap().join("vm/memory-ranges");
    assert_eq!(fs::read(memory).unwrap(), b"memory");
    assert_eq!(lab.events().await, ["create", "start", "paused"]);
}

#[tokio::test]
async fn it_goes_on_in_another_vm_with_the_same_timeline_and_fresh_randomness() {
    let lab = Lab::on_disk().await;
    let (timeline, memory) =
        (lab.run_dir.load().unwrap().unwrap().timeline, lab.suspended_in_state().unwrap());
    lab.go_on().await.unwrap();
    assert_eq!((lab.word().await, lab.host.vmm.is_alive()), ("running", true));
    let chosen = lab.host.chosen.lock().unwrap().clone();
    assert_eq!(chosen[1].restore, Some(memory.join("vm")));
    assert_eq!((&chosen[1].run_dir, &chosen[1].cgroup), (&chosen[0].run_dir, &chosen[0].cgroup));
    let thaw = lab.guest().thaw.lock().unwrap().clone();
    assert!(thaw.realtime_ns > 0 && thaw.entropy.len() >= 32 && thaw.timeline == 0, "{thaw:?}");
    let state = lab.run_dir.load().unwrap().unwrap();
    assert_eq!((state.timeline, state.vmm_pid, state.suspended), (timeline, PID + 1, None));
    assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID + 1);
    assert!(lab.stored().is_empty());
    lab.guest().exit("c1", "", 3);
    assert_eq!(lab.wait(init("c1")).await, 3, "events are followed again");
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed", "exit"]);
}

#[tokio::test]
async fn containerds_own_resume_does_it_as_well_and_again_and_again() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    for round in 1..=3 {
        lab.to_disk().await.unwrap();
        within(lab.sandbox.resume("c1".into())).await.unwrap();
        assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID + round);
    }
    within(lab.sandbox.pause("c1".into())).await.unwrap();
    assert!(lab.host.vmm.is_paused());
}

#[tokio::test]
async fn a_paused_sandbox_is_written_to_disk_once_its_disks_are() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    within(lab.sandbox.pause_all()).await.unwrap();
    lab.to_disk().await.unwrap();
    assert_eq!(lab.word().await, "suspended");
    lab.go_on().await.unwrap();
    assert_eq!(lab.word().await, "running");
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed"]);
}

#[tokio::test]
async fn a_write_that_fails_leaves_the_sandbox_as_it_was_and_no_part_of_a_file() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.host.vmm.sticks_in_snapshots.store(true, Ordering::Relaxed);
    for state in ["running", "paused"] {
        if state == "paused" {
            within(lab.sandbox.pause_all()).await.unwrap();
        }
        let error = chain(&lab.to_disk().await.unwrap_err());
        assert!(error.contains("cannot write a snapshot"), "{error}");
        assert_eq!((lab.word().await, lab.host.vmm.is_paused()), (state, state == "paused"));
        assert_eq!((lab.stored(), lab.suspended_in_state()), (Vec::new(), None));
    }
    lab.host.vmm.sticks_in_snapshots.store(false, Ordering::Relaxed);
    lab.go_on().await.unwrap();
    lab.to_disk().await.unwrap();
}

#[tokio::test]
async fn a_store_that_cannot_be_written_costs_the_sandbox_nothing() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    fs::write(lab.dir.path().join("snapshots"), "no directory").unwrap();
    lab.to_disk().await.unwrap_err();
    assert_eq!((lab.word().await, lab.suspended_in_state()), ("running", None));
    lab.guest().exit("c1", "", 0);
    assert_eq!(lab.wait(init("c1")).await, 0);
}

#[tokio::test]
async fn a_vmm_that_dies_while_memory_is_written_is_the_end_and_no_part_stays() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.guest().fault("Quiesce", Fault::Hang);
    let death = async {
        lab.until(|| lab.guest().calls.lock().unwrap().iter().any(|call| call == "Quiesce")).await;
        lab.host.vmm.die();
    };
    let (result, ()) = tokio::join!(lab.to_disk(), death);
    result.unwrap_err();
    assert_eq!((lab.wait(init("c1")).await, lab.word().await), (137, "stopped"));
    lab.until(|| lab.stored().is_empty()).await;
}

#[tokio::test]
async fn a_resume_that_fails_leaves_it_on_disk_and_can_be_repeated() {
    let lab = Lab::on_disk().await;
    lab.restores(Boot::Fails);
    for _ in 0..2 {
        lab.go_on().await.unwrap_err();
        assert_eq!((lab.word().await, lab.host.vmm.is_alive()), ("suspended", false));
        assert_eq!(lab.stored(), [lab.suspended_in_state().unwrap()]);
    }
    lab.restores(Boot::Works);
    lab.go_on().await.unwrap();
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed"]);
}

#[tokio::test]
async fn a_guest_that_does_not_thaw_is_paused_in_memory() {
    let lab = Lab::on_disk().await;
    lab.guest().fault("Thaw", Fault::Refuse(ttrpc::get_status(Code::INTERNAL, "no")));
    lab.go_on().await.unwrap_err();
    assert_eq!((lab.word().await, lab.host.vmm.is_paused()), ("paused", true));
    assert!(lab.stored().is_empty(), "the guest may have run");
    lab.guest().faults.lock().unwrap().clear();
    lab.go_on().await.unwrap();
    assert_eq!(lab.word().await, "running");
}

#[tokio::test]
async fn sigkill_ends_a_sandbox_on_disk_at_once() {
    let lab = Lab::on_disk().await;
    lab.kill(init("c1"), 9).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 137);
    lab.until(|| lab.stored().is_empty()).await;
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(!lab.run_dir.path().exists());
    assert_eq!(lab.events().await, ["create", "start", "paused", "exit", "delete"]);
}

#[tokio::test]
async fn sigkill_ends_a_resume_that_hangs() {
    let lab = Lab::on_disk().await;
    lab.restores(Boot::Hangs);
    let kill = async {
        lab.until(|| lab.host.chosen.lock().unwrap().len() == 2).await;
        lab.kill(init("c1"), 9).await.unwrap();
    };
    let (result, ()) = tokio::join!(lab.go_on(), kill);
    result.unwrap_err();
    assert_eq!((lab.wait(init("c1")).await, lab.word().await), (137, "stopped"));
    lab.until(|| lab.stored().is_empty()).await;
}

#[tokio::test]
async fn other_kills_wait_for_the_resume() {
    let lab = Lab::on_disk().await;
    let mut term = Box::pin(lab.kill(init("c1"), 15));
    assert!(timeout(Duration::from_millis(20), &mut term).await.is_err());
    lab.go_on().await.unwrap();
    term.await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 143);
}

#[tokio::test]
async fn what_needs_a_guest_is_refused_with_what_to_do() {
    let lab = Lab::on_disk().await;
    for error in [
        within(lab.sandbox.snapshot(SnapshotRequest::default())).await.map(drop).unwrap_err(),
        within(lab.sandbox.pause("c1".into())).await.unwrap_err(),
        within(lab.sandbox.update("c1".into(), Default::default())).await.unwrap_err(),
        lab.create("c2").await.map(drop).unwrap_err(),
        lab.to_disk().await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        assert!(chain(&error).contains("paused to disk"), "{}", chain(&error));
    }
}

#[tokio::test]
async fn what_does_not_run_is_not_written_to_disk() {
    let lab = Lab::new().await;
    assert_eq!(lab.to_disk().await.unwrap_err().code(), Code::NOT_FOUND);
    lab.create("c1").await.unwrap();
    assert_eq!(lab.to_disk().await.unwrap_err().code(), Code::FAILED_PRECONDITION);
    lab.sandbox.start(init("c1")).await.unwrap();
    lab.guest().exit("c1", "", 0);
    lab.wait(init("c1")).await;
    assert_eq!(lab.to_disk().await.unwrap_err().code(), Code::FAILED_PRECONDITION);
}

/// Its exit came while it was brought to rest. What it has written last is in the memory on disk.
#[tokio::test]
async fn one_that_has_exited_goes_on_once_more_to_be_deleted_and_leaves_nothing() {
    for fate in [Boot::Works, Boot::Fails] {
        let lab = Lab::new().await;
        lab.run("c1").await;
        lab.guest().fault("Quiesce", Fault::ExitFirst(4));
        lab.to_disk().await.unwrap();
        assert_eq!((lab.wait(init("c1")).await, lab.word().await), (4, "suspended"));
        lab.restores(fate);
        within(lab.sandbox.delete(init("c1"))).await.unwrap();
        let thawed = lab.guest().calls.lock().unwrap().iter().any(|call| call == "Thaw");
        assert_eq!(thawed, fate == Boot::Works);
        assert!(!lab.run_dir.path().exists() && !lab.host.vmm.is_alive());
        assert!(lab.stored().is_empty());
    }
}

#[tokio::test]
async fn clean_up_knows_of_the_memory_before_it_is_there() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.guest().fault("Quiesce", Fault::Hang);
    let pause = tokio::spawn({
        let sandbox = lab.sandbox.clone();
        async move { sandbox.pause_to_disk().await }
    });
    lab.until(|| lab.guest().calls.lock().unwrap().iter().any(|call| call == "Quiesce")).await;
    assert_eq!(lab.word().await, "suspending");
    assert_eq!(lab.stored(), [lab.suspended_in_state().unwrap()]);
    lab.host.vmm.die();
    within(pause).await.unwrap().unwrap_err();
}
