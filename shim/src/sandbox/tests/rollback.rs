//! Rollback to a snapshot of the sandbox's own.

use std::sync::atomic::Ordering;

use containerd_shim_protos::api;

use super::{restore::manifest, *};
use crate::{
    sandbox::{SnapshotRequest, fakes::Boot},
    snapshot::{Manifest, Store},
    state::PastTimeline,
};

impl Lab {
    /// A sandbox that runs, and has a snapshot "one" of itself.
    async fn with_own_snapshot() -> Lab {
        let lab = Lab::new().await;
        lab.run("c1").await;
        lab.take("one").await;
        lab
    }

    async fn take(&self, name: &str) {
        let request = SnapshotRequest { name: Some(name.into()), checkpoint: None, copy_to: None };
        within(self.sandbox.snapshot(request)).await.unwrap();
    }

    async fn roll_back(&self, name: &str) -> Result<(), Error> {
        within(self.sandbox.rollback(name.into())).await
    }

    /// A snapshot that somebody else has made.
    fn store_snapshot(&self, manifest: Manifest) {
        let draft = Store::at(&self.dir.path().join("snapshots")).begin(&manifest.name).unwrap();
        draft.finish(manifest, &[]).unwrap();
    }

    async fn exec(&self, id: &str) {
        let request =
            ExecRequest { process: exec("c1", id), spec: Default::default(), stdio: Stdio::default() };
        within(self.sandbox.exec(request)).await.unwrap();
    }

    /// What the guest of the snapshot has to say of an exec.
    fn then(&self, exec: &str, state: Option<(api::Status, u32)>) {
        self.guest().states.lock().unwrap().insert(super::exec("c1", exec), state);
    }

    /// The one that runs is the first that was booted.
    fn has_its_first_vm(&self) -> bool {
        self.host.vmm.is_alive() && self.host.chosen.lock().unwrap().len() == 1
    }

    async fn is_as_it_was(&self) {
        assert!(self.has_its_first_vm());
        assert_eq!((self.word().await, self.suspended_in_state()), ("running", None));
        let state = self.run_dir.load().unwrap().unwrap();
        assert_eq!((state.timeline, state.vmm_pid), (2, PID));
        within(self.sandbox.stats("c1".into())).await.unwrap();
        self.guest().exit("c1", "", 5);
        assert_eq!(self.wait(init("c1")).await, 5, "events are followed");
    }
}

fn refusal(result: Result<(), Error>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Code::FAILED_PRECONDITION, "{error}");
    chain(&error)
}

#[tokio::test]
async fn a_sandbox_goes_on_from_its_snapshot_in_another_vm_on_a_new_timeline() {
    let lab = Lab::with_own_snapshot().await;
    lab.roll_back("one").await.unwrap();
    assert_eq!((lab.word().await, lab.host.vmm.is_alive()), ("running", true));
    let thaw = lab.guest().thaw.lock().unwrap().clone();
    assert!(thaw.realtime_ns > 0 && thaw.entropy.len() >= 32 && ![0, 2].contains(&thaw.timeline));
    assert_eq!(thaw.hostname, "", "it keeps its name");
    let state = lab.run_dir.load().unwrap().unwrap();
    assert_eq!((state.timeline, state.vmm_pid, state.suspended), (thaw.timeline, PID + 1, None));
    assert_eq!(state.past_timelines, [PastTimeline { timeline: 2, until_ns: None }]);
    assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID + 1);
    assert_eq!(lab.stored(), [lab.dir.path().join("snapshots/one")], "the snapshot stays, and nothing else");
    lab.guest().exit("c1", "", 3);
    assert_eq!(lab.wait(init("c1")).await, 3, "events are followed again");
    assert_eq!(lab.events().await, ["create", "start", "exit"]);
}

#[tokio::test]
async fn it_can_go_back_and_forth_between_all_of_its_snapshots() {
    let lab = Lab::with_own_snapshot().await;
    lab.take("two").await;
    lab.roll_back("one").await.unwrap();
    lab.take("three").await;
    for name in ["two", "one", "three", "three"] {
        lab.roll_back(name).await.unwrap();
    }
    assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID + 5);
    lab.to_disk().await.unwrap();
    assert!(refusal(lab.roll_back("one").await).contains("resumed first"));
    lab.go_on().await.unwrap();
    lab.roll_back("one").await.unwrap();
}

#[tokio::test]
async fn execs_go_on_if_the_snapshot_has_them_and_end_with_137_if_not() {
    let lab = Lab::with_own_snapshot().await;
    for id in ["same", "new", "reused", "started", "waiting", "made"] {
        lab.exec(id).await;
        if !["waiting", "made"].contains(&id) {
            lab.sandbox.start(exec("c1", id)).await.unwrap();
        }
    }
    lab.then("new", None);
    lab.then("reused", Some((api::Status::RUNNING, 18)));
    lab.then("started", Some((api::Status::CREATED, 0)));
    lab.then("waiting", Some((api::Status::CREATED, 0)));
    lab.then("made", None);
    lab.roll_back("one").await.unwrap();
    for id in ["new", "reused", "started", "made"] {
        assert_eq!(lab.wait(exec("c1", id)).await, 137, "{id}");
    }
    let status = async |id| within(lab.sandbox.state(exec("c1", id))).await.unwrap().status;
    assert_eq!((status("same").await, status("waiting").await), (Status::Running, Status::Created));
    lab.sandbox.start(exec("c1", "waiting")).await.unwrap();
    lab.guest().exit("c1", "same", 7);
    assert_eq!(lab.wait(exec("c1", "same")).await, 7);
    within(lab.sandbox.delete(exec("c1", "new"))).await.unwrap();
    let events = lab.events().await;
    assert_eq!(events.iter().filter(|topic| *topic == "exit").count(), 5, "{events:?}");
}

#[tokio::test]
async fn an_exec_that_has_exited_since_stays_so_whatever_the_snapshot_has() {
    let lab = Lab::with_own_snapshot().await;
    lab.exec("e1").await;
    lab.sandbox.start(exec("c1", "e1")).await.unwrap();
    lab.guest().exit("c1", "e1", 3);
    assert_eq!(lab.wait(exec("c1", "e1")).await, 3);
    lab.roll_back("one").await.unwrap();
    assert_eq!(lab.wait(exec("c1", "e1")).await, 3);
    within(lab.sandbox.delete(exec("c1", "e1"))).await.unwrap();
    assert_eq!(lab.word().await, "running");
}

#[tokio::test]
async fn the_snapshot_of_another_sandbox_is_refused_and_nothing_has_happened() {
    let lab = Lab::with_own_snapshot().await;
    let mut foreign = manifest(&[("c1", false)]);
    foreign.name = "foreign".into();
    foreign.origin.timeline = 99;
    lab.store_snapshot(foreign);
    let text = refusal(lab.roll_back("foreign").await);
    assert!(text.contains("of another sandbox, ns/old") && text.contains("restore=foreign"), "{text}");
    assert_eq!(lab.roll_back("nosuch").await.unwrap_err().code(), Code::NOT_FOUND);
    assert_eq!(lab.roll_back("/etc").await.unwrap_err().code(), Code::INVALID_ARGUMENT);
    lab.is_as_it_was().await;
}

#[tokio::test]
async fn a_snapshot_with_other_containers_or_disks_is_refused() {
    let lab = Lab::with_own_snapshot().await;
    let variant = |name: &str, change: fn(&mut Manifest)| {
        let mut manifest = manifest(&[("c1", false)]);
        manifest.name = name.into();
        change(&mut manifest);
        lab.store_snapshot(manifest);
    };
    variant("other-init", |manifest| manifest.containers[0].pid = 18);
    variant("no-container", |manifest| manifest.containers.clear());
    variant("another", |manifest| {
        let more = crate::snapshot::Container { id: "c2".into(), ..manifest.containers[0].clone() };
        manifest.containers.push(more);
    });
    for (name, words) in [
        ("other-init", "\"c1\" was not running then"),
        ("no-container", "\"c1\" was not running then"),
        ("another", "has been deleted"),
    ] {
        let text = refusal(lab.roll_back(name).await);
        assert!(text.contains(words), "{text}");
    }
    lab.is_as_it_was().await;
}

#[tokio::test]
async fn what_has_exited_or_not_begun_does_not_go_back() {
    let lab = Lab::new().await;
    assert_eq!(lab.roll_back("one").await.unwrap_err().code(), Code::NOT_FOUND);
    lab.create("c1").await.unwrap();
    assert!(refusal(lab.roll_back("one").await).contains("is created"));
    lab.sandbox.start(init("c1")).await.unwrap();
    lab.take("one").await;
    lab.guest().exit("c1", "", 0);
    lab.wait(init("c1")).await;
    assert!(refusal(lab.roll_back("one").await).contains("is stopped"));
}

#[tokio::test]
async fn a_guest_that_does_not_come_to_rest_goes_on_as_it_was() {
    let lab = Lab::with_own_snapshot().await;
    lab.guest().fault("Quiesce", Fault::Refuse(ttrpc::get_status(Code::DEADLINE_EXCEEDED, "no")));
    assert_eq!(lab.roll_back("one").await.unwrap_err().code(), Code::DEADLINE_EXCEEDED);
    assert_eq!(lab.stored().len(), 1);
    lab.guest().faults.lock().unwrap().clear();
    lab.is_as_it_was().await;
}

#[tokio::test]
async fn if_no_vm_comes_up_the_sandbox_has_ended() {
    for fault in ["boot", "Thaw", "State"] {
        let lab = Lab::with_own_snapshot().await;
        lab.exec("e1").await;
        lab.sandbox.start(exec("c1", "e1")).await.unwrap();
        match fault {
            "boot" => lab.restores(Boot::Fails),
            method => lab.guest().fault(method, Fault::Refuse(ttrpc::get_status(Code::INTERNAL, "no"))),
        }
        let error = chain(&lab.roll_back("one").await.unwrap_err());
        assert!(fault == "Thaw" || error.contains("the sandbox has ended"), "{error}");
        assert_eq!((lab.wait(init("c1")).await, lab.wait(exec("c1", "e1")).await), (137, 137), "{fault}");
        assert_eq!((lab.word().await, lab.host.vmm.is_alive()), ("stopped", false));
        lab.until(|| lab.stored() == [lab.dir.path().join("snapshots/one")]).await;
        within(lab.sandbox.delete(init("c1"))).await.unwrap();
        assert!(!lab.run_dir.path().exists());
    }
}

#[tokio::test]
async fn sigkill_ends_a_rollback_that_hangs() {
    let lab = Lab::with_own_snapshot().await;
    lab.restores(Boot::Hangs);
    let kill = async {
        lab.until(|| lab.host.chosen.lock().unwrap().len() == 2).await;
        assert_eq!(lab.word().await, "rolling-back");
        assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID);
        lab.kill(init("c1"), 9).await.unwrap();
    };
    let (result, ()) = tokio::join!(lab.roll_back("one"), kill);
    result.unwrap_err();
    assert_eq!((lab.wait(init("c1")).await, lab.word().await), (137, "stopped"));
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert_eq!(lab.stored().len(), 1);
}

#[tokio::test]
async fn a_paused_sandbox_runs_after_it() {
    let lab = Lab::with_own_snapshot().await;
    within(lab.sandbox.pause_all()).await.unwrap();
    assert_eq!(lab.roll_back("nosuch").await.unwrap_err().code(), Code::NOT_FOUND);
    assert_eq!(lab.word().await, "paused");
    lab.roll_back("one").await.unwrap();
    assert_eq!((lab.word().await, lab.host.vmm.is_paused()), ("running", false));
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed"]);
}

/// But to none that its origin has had since.
#[tokio::test]
async fn a_clone_may_go_back_to_what_it_was_made_from() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    lab.restore("one").await.unwrap();
    lab.sandbox.start(init("c1")).await.unwrap();
    lab.roll_back("one").await.unwrap();
    assert_eq!(lab.guest().thaw.lock().unwrap().hostname, "box", "it has its own name again");
    lab.guest().quiesced.store(false, Ordering::Relaxed);
    let mut later = manifest(&[("old", false)]);
    (later.name, later.created_ns) = ("later".into(), later.created_ns + 1);
    lab.store_snapshot(later);
    assert!(refusal(lab.roll_back("later").await).contains("of another sandbox"));
    lab.guest().exit("old", "", 4);
    assert_eq!(lab.wait(init("c1")).await, 4);
}

/// It is not known before the end whether it is of a timeline that is no more.
#[tokio::test]
async fn what_the_guest_tells_during_a_rollback_counts_if_that_fails() {
    let lab = Lab::with_own_snapshot().await;
    lab.exec("e1").await;
    lab.sandbox.start(exec("c1", "e1")).await.unwrap();
    lab.guest().fault("Quiesce", Fault::Hang);
    let asked =
        |lab: &Lab| lab.guest().calls.lock().unwrap().iter().filter(|call| *call == "Quiesce").count();
    let before = asked(&lab);
    let exit = async {
        lab.until(|| asked(&lab) > before).await;
        lab.guest().exit("c1", "e1", 3);
        let waits = timeout(Duration::from_millis(200), lab.sandbox.wait(exec("c1", "e1"))).await;
        assert!(waits.is_err(), "it is held back");
    };
    let (result, ()) = tokio::join!(lab.roll_back("one"), exit);
    assert_eq!(result.unwrap_err().code(), Code::DEADLINE_EXCEEDED);
    assert_eq!(lab.wait(exec("c1", "e1")).await, 3);
    lab.guest().faults.lock().unwrap().clear();
    lab.is_as_it_was().await;
}
