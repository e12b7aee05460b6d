//! Snapshots of a sandbox.

use std::sync::atomic::Ordering;

use super::*;
use crate::{
    sandbox::SnapshotRequest,
    snapshot::{Import, Listed, Store},
};

impl Lab {
    async fn running() -> Lab {
        let lab = Lab::new().await;
        lab.run("c1").await;
        lab
    }

    fn store(&self) -> Store {
        Store::at(&self.dir.path().join("snapshots"))
    }

    async fn snapshot(&self, name: &str) -> Result<Listed, Error> {
        let name = Some(name.to_owned()).filter(|name| !name.is_empty());
        within(self.sandbox.snapshot(SnapshotRequest { name, ..Default::default() })).await
    }

    async fn state(&self) -> &'static str {
        within(self.sandbox.status()).await.unwrap().state
    }

    fn called(&self) -> Vec<String> {
        let calls = self.guest().calls.lock().unwrap();
        calls.iter().filter(|call| ["Quiesce", "Thaw"].contains(&call.as_str())).cloned().collect()
    }
}

#[tokio::test]
async fn a_sandbox_runs_on_after_a_snapshot_which_is_in_the_store() {
    let lab = Lab::running().await;
    let taken = lab.snapshot("one").await.unwrap();
    assert_eq!((lab.state().await, lab.host.vmm.is_paused()), ("running", false));
    // The second one writes out the disks, once the streams are at rest.
    assert_eq!(lab.called(), ["Quiesce", "Quiesce", "Thaw"]);
    let (manifest, dir) = lab.store().open("one").unwrap();
    assert_eq!(manifest, taken.manifest);
    assert_eq!((manifest.containers[0].id.as_str(), manifest.containers[0].pid), ("c1", 17));
    assert_eq!((manifest.origin.sandbox.as_str(), manifest.origin.timeline), ("c1", 2));
    assert_eq!(fs::read(dir.join("vm/memory-ranges")).unwrap(), b"memory");
    lab.guest().exit("c1", "", 3);
    assert_eq!(lab.wait(init("c1")).await, 3, "events are followed again");
}

#[tokio::test]
async fn a_snapshot_without_a_name_gets_one_and_each_another() {
    let lab = Lab::running().await;
    let (first, second) = (lab.snapshot("").await.unwrap(), lab.snapshot("").await.unwrap());
    assert!(first.manifest.name.starts_with("c1-20") && first.manifest.name != second.manifest.name);
    assert_eq!(lab.store().list().unwrap().len(), 2);
}

#[tokio::test]
async fn a_paused_sandbox_stays_paused() {
    let lab = Lab::running().await;
    within(lab.sandbox.pause("c1".into())).await.unwrap();
    lab.snapshot("one").await.unwrap();
    assert_eq!((lab.state().await, lab.host.vmm.is_paused()), ("paused", true));
    assert_eq!(lab.called(), ["Quiesce"]);
    within(lab.sandbox.resume("c1".into())).await.unwrap();
    lab.snapshot("two").await.unwrap();
    assert_eq!(lab.state().await, "running");
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_the_sandbox_as_it_was_and_no_part_of_itself() {
    let lab = Lab::running().await;
    lab.host.vmm.sticks_in_snapshots.store(true, Ordering::Relaxed);
    for state in ["running", "paused"] {
        if state == "paused" {
            within(lab.sandbox.pause("c1".into())).await.unwrap();
        }
        let error = chain(&lab.snapshot("one").await.unwrap_err());
        assert!(error.contains("cannot write a snapshot"), "{error}");
        assert_eq!((lab.state().await, lab.host.vmm.is_paused()), (state, state == "paused"));
        let left: Vec<_> = fs::read_dir(lab.dir.path().join("snapshots")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    lab.host.vmm.sticks_in_snapshots.store(false, Ordering::Relaxed);
    lab.snapshot("one").await.unwrap();
}

#[tokio::test]
async fn a_log_that_cannot_be_written_out_fails_the_snapshot_and_is_named() {
    let lab = Lab::new().await;
    let mut logged = spec();
    logged["annotations"] = serde_json::json!({});
    lab.sandbox.create(lab.request("c1", logged)).await.unwrap();
    lab.sandbox.start(init("c1")).await.unwrap();
    let dir = lab.dir.path().join("log/default/c1");
    // What is no file cannot be synced as one.
    fs::create_dir(dir.join("stdout.1")).unwrap();
    for state in ["running", "paused"] {
        if state == "paused" {
            within(lab.sandbox.pause("c1".into())).await.unwrap();
        }
        let error = chain(&lab.snapshot("one").await.unwrap_err());
        assert!(error.contains("log/default/c1/stdout.1"), "{error}");
        assert_eq!((lab.state().await, lab.host.vmm.is_paused()), (state, state == "paused"));
    }
    fs::remove_dir(dir.join("stdout.1")).unwrap();
    lab.snapshot("one").await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_set_going_again_is_paused_and_can_be_resumed() {
    let lab = Lab::running().await;
    lab.guest().fault("Thaw", Fault::Refuse(ttrpc::get_status(Code::INTERNAL, "no")));
    lab.snapshot("one").await.unwrap_err();
    assert_eq!(lab.state().await, "paused");
    lab.guest().faults.lock().unwrap().clear();
    within(lab.sandbox.resume("c1".into())).await.unwrap();
    lab.snapshot("two").await.unwrap();
    assert_eq!(lab.state().await, "running");
}

#[tokio::test]
async fn a_vmm_that_is_busy_beyond_all_limits_is_asked_again_until_the_sandbox_is_as_it_was() {
    let lab = Lab::running().await;
    lab.host.vmm.sticks_in_snapshots.store(true, Ordering::Relaxed);
    for state in ["running", "paused"] {
        if state == "paused" {
            within(lab.sandbox.pause("c1".into())).await.unwrap();
        }
        lab.host.vmm.busy_then.store(3, Ordering::Relaxed);
        let error = chain(&lab.snapshot("one").await.unwrap_err());
        assert!(error.contains("cannot write a snapshot"), "{error}");
        assert_eq!((lab.state().await, lab.host.vmm.is_paused()), (state, state == "paused"));
        assert_eq!(lab.host.vmm.busy.load(Ordering::Relaxed), 0);
        lab.host.vmm.busy_then.store(0, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_sandbox_whose_vmm_stays_busy_can_be_killed() {
    let lab = Lab::running().await;
    lab.host.vmm.sticks_in_snapshots.store(true, Ordering::Relaxed);
    lab.host.vmm.busy.store(u32::MAX, Ordering::Relaxed);
    // The VMM stops, and answers nothing after that.
    let stopping = async {
        while !lab.called().contains(&"Quiesce".to_owned()) {
            tokio::task::yield_now().await;
        }
        lab.kill(init("c1"), 9).await.unwrap();
        lab.wait(init("c1")).await
    };
    let (snapshot, status) = tokio::join!(lab.snapshot("one"), stopping);
    assert!(snapshot.is_err() && status == 137);
    assert_eq!(lab.state().await, "stopped");
}

#[tokio::test]
async fn a_name_that_cannot_be_had_costs_the_sandbox_nothing() {
    let lab = Lab::running().await;
    lab.snapshot("one").await.unwrap();
    let before = lab.called();
    assert_eq!(lab.snapshot("one").await.unwrap_err().code(), Code::ALREADY_EXISTS);
    assert_eq!(lab.snapshot("../one").await.unwrap_err().code(), Code::INVALID_ARGUMENT);
    assert_eq!((lab.state().await, lab.called()), ("running", before));
}

#[tokio::test]
async fn what_does_not_run_has_no_snapshot() {
    let lab = Lab::new().await;
    assert_eq!(lab.snapshot("one").await.unwrap_err().code(), Code::FAILED_PRECONDITION);
    lab.run("c1").await;
    lab.host.vmm.die();
    lab.wait(init("c1")).await;
    assert_eq!(lab.snapshot("one").await.unwrap_err().code(), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_copy_is_made_with_the_snapshot_or_there_is_none() {
    let lab = Lab::running().await;
    let copy = lab.dir.path().join("copy");
    let request = |name: &str, copy: &std::path::Path| SnapshotRequest {
        name: Some(name.into()),
        copy_to: Some(copy.into()),
        ..Default::default()
    };
    within(lab.sandbox.snapshot(request("one", &copy))).await.unwrap();
    assert_eq!(fs::read(copy.join("vm/memory-ranges")).unwrap(), b"memory");
    let import = Import { name: Some("two"), namespace: "default", pod_namespace: None, limit: 1 << 30 };
    let imported = lab.store().import_dir(&copy, import, &mut crate::snapshot::untold).unwrap();
    assert_eq!(imported.manifest.containers[0].spec["hostname"], "box");
    within(lab.sandbox.snapshot(request("three", &copy))).await.unwrap_err();
    lab.store().open("three").unwrap_err();
    assert_eq!(lab.state().await, "running");
}

/// The second is refused while the first is written, and finds the sandbox as it was afterwards.
#[tokio::test]
async fn two_snapshots_upon_each_other_are_one_or_two_and_never_half_a_one() {
    let lab = Lab::running().await;
    let (first, second) = tokio::join!(lab.snapshot("one"), lab.snapshot("two"));
    first.unwrap();
    if let Err(e) = &second {
        assert_eq!(e.code(), Code::FAILED_PRECONDITION, "{}", chain(e));
    }
    let expected = 1 + usize::from(second.is_ok());
    assert_eq!(lab.store().list().unwrap().len(), expected);
    assert_eq!(lab.state().await, "running");
    lab.snapshot("three").await.unwrap();
}
