//! Create from a snapshot.

use std::sync::atomic::Ordering;

use super::*;
use crate::snapshot::{Container, Manifest, Origin, Store, WrittenBy};

pub(super) fn manifest(containers: &[(&str, bool)]) -> Manifest {
    Manifest {
        format: Manifest::FORMAT,
        name: "one".into(),
        created_ns: 7,
        cubebox: "0.1.0".into(),
        agent: "0.1.0".into(),
        protocol: version::CURRENT.to_string(),
        vmm: WrittenBy::default(),
        origin: Origin { namespace: "ns".into(), sandbox: "old".into(), timeline: 2, backend: "fake".into() },
        owner: None,
        template: None,
        containers: containers
            .iter()
            .map(|(id, terminal)| Container {
                id: (*id).into(),
                pid: 17,
                terminal: *terminal,
                execs: Vec::new(),
                spec: json!({}),
            })
            .collect(),
        last_event: 0,
        streams: Vec::new(),
        disks: Vec::new(),
        files: Vec::new(),
    }
}

impl Lab {
    /// A store with a snapshot of these containers, and a guest that is at rest.
    pub(super) async fn with_snapshot(containers: &[(&str, bool)]) -> Lab {
        let lab = Lab::new().await;
        lab.guest().quiesced.store(true, Ordering::Relaxed);
        let draft = Store::at(&lab.dir.path().join("snapshots")).begin("one").unwrap();
        draft.finish(manifest(containers), &[]).unwrap();
        lab
    }

    pub(super) async fn restore(&self, snapshot: &str) -> Result<u32, Error> {
        let request = CreateRequest { restore: Some(snapshot.into()), ..self.request("c1", spec()) };
        within(self.sandbox.create(request)).await
    }

    fn asked(&self) -> Vec<String> {
        self.guest().calls.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn a_restored_sandbox_runs_from_its_start_on_with_a_present_of_its_own() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    assert_eq!(lab.restore("one").await.unwrap(), PID);
    assert_eq!(lab.asked(), ["Quiesce", "State old"], "nothing runs, and nothing is made");
    assert_eq!(lab.sandbox.state(init("c1")).await.unwrap().status, Status::Created);
    assert_eq!(lab.sandbox.start(init("c1")).await.unwrap(), PID);
    let thaw = lab.guest().thaw.lock().unwrap().clone();
    assert!(thaw.realtime_ns > 0 && thaw.entropy.len() >= 32 && ![0, 2].contains(&thaw.timeline));
    assert_eq!(thaw.hostname, "box");
    let state = lab.run_dir.load().unwrap().unwrap();
    assert_eq!(state.timeline, thaw.timeline);
    assert_eq!(state.containers["c1"].guest_id("c1"), "old");
    assert_eq!(lab.events().await, ["create", "start"]);
}

#[tokio::test]
async fn the_guest_knows_the_container_by_its_old_name_and_containerd_by_the_new_one() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    lab.restore("one").await.unwrap();
    lab.sandbox.start(init("c1")).await.unwrap();
    let request =
        ExecRequest { process: exec("c1", "e1"), spec: Default::default(), stdio: Stdio::default() };
    within(lab.sandbox.exec(request)).await.unwrap();
    lab.sandbox.start(exec("c1", "e1")).await.unwrap();
    within(lab.sandbox.stats("c1".into())).await.unwrap();
    lab.kill(exec("c1", "e1"), 9).await.unwrap();
    assert_eq!(lab.wait(exec("c1", "e1")).await, 137);
    within(lab.sandbox.delete(exec("c1", "e1"))).await.unwrap();
    lab.guest().exit("old", "", 5);
    assert_eq!(lab.wait(init("c1")).await, 5);
    let asked = lab.asked();
    let expected = ["Thaw", "Exec old e1", "Start old e1", "Stats old", "Kill old e1", "Delete old e1"];
    assert_eq!(asked[2..], expected);
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(!lab.run_dir.path().exists());
}

#[tokio::test]
async fn what_cannot_be_restored_leaves_nothing() {
    let refused = async |containers: &[(&str, bool)], name: &str, words: &str, code: Code| {
        let lab = Lab::with_snapshot(containers).await;
        let error = lab.restore(name).await.unwrap_err();
        assert!(chain(&error).contains(words), "{}", chain(&error));
        assert_eq!(error.code(), code);
        assert!(!lab.run_dir.path().exists());
    };
    refused(&[("old", false)], "two", "no snapshot \"two\"", Code::NOT_FOUND).await;
    refused(&[("old", false)], "/etc/passwd", "is no snapshot", Code::INVALID_ARGUMENT).await;
    refused(&[("old", true)], "one", "with a terminal", Code::FAILED_PRECONDITION).await;
    refused(&[("a", false), ("b", false)], "one", "2 containers", Code::UNIMPLEMENTED).await;
    refused(&[], "one", "0 containers", Code::UNIMPLEMENTED).await;
}

#[tokio::test]
async fn a_guest_that_was_not_at_rest_is_not_gone_on_with() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    lab.guest().quiesced.store(false, Ordering::Relaxed);
    let error = chain(&lab.restore("one").await.unwrap_err());
    assert!(error.contains("was not at rest"), "{error}");
    assert!(!lab.host.vmm.is_alive() && !lab.run_dir.path().exists());
}

#[tokio::test]
async fn a_start_that_fails_can_be_repeated() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    lab.restore("one").await.unwrap();
    lab.guest().fault("Thaw", Fault::Refuse(ttrpc::get_status(Code::INTERNAL, "no")));
    lab.sandbox.start(init("c1")).await.unwrap_err();
    lab.guest().faults.lock().unwrap().clear();
    lab.sandbox.start(init("c1")).await.unwrap();
    lab.guest().exit("old", "", 0);
    assert_eq!(lab.wait(init("c1")).await, 0);
}

#[tokio::test]
async fn a_restored_container_is_probed_from_its_start_on_by_its_old_name() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    let mut spec = spec();
    spec["annotations"]["cube.ready.tcp"] = "5432".into();
    let request = CreateRequest { restore: Some("one".into()), ..lab.request("c1", spec) };
    within(lab.sandbox.create(request)).await.unwrap();
    lab.sandbox.start(init("c1")).await.unwrap();
    let readiness = within(lab.sandbox.wait_ready(LIMIT)).await.unwrap();
    assert_eq!(readiness, crate::sandbox::SandboxReadiness::Ready);
    assert_eq!(lab.asked().last().unwrap(), "Probe old");
}

#[tokio::test]
async fn the_environment_of_the_create_is_delivered_and_its_limits_are_set() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    let mut spec = spec();
    spec["process"] = json!({"args": ["x"], "env": ["TOKEN=t1"]});
    spec["linux"]["resources"] = json!({"devices": [{"allow": false}], "pids": {"limit": 7}});
    let request = CreateRequest { restore: Some("one".into()), ..lab.request("c1", spec) };
    within(lab.sandbox.create(request)).await.unwrap();
    lab.guest().fault("Update", Fault::Refuse(ttrpc::get_status(Code::INVALID_ARGUMENT, "no such limit")));
    let error = lab.sandbox.start(init("c1")).await.unwrap_err();
    assert!(chain(&error).contains("no such limit"), "{}", chain(&error));
    lab.guest().faults.lock().unwrap().clear();
    lab.sandbox.start(init("c1")).await.unwrap();
    assert_eq!(lab.guest().thaw.lock().unwrap().environment, ["TOKEN=t1"]);
    assert_eq!(lab.asked()[2..], ["Thaw", "Update old", "Thaw", "Update old"]);
    let state = fs::read_to_string(lab.run_dir.path().join("state.json")).unwrap();
    assert!(!state.contains("TOKEN"), "{state}");
}

#[tokio::test]
async fn a_spec_that_cannot_take_effect_is_refused_before_anything_is_made() {
    let lab = Lab::with_snapshot(&[("old", false)]).await;
    let mut spec = spec();
    spec["mounts"] = json!([{"destination": "/data", "type": "bind", "source": "/srv"}]);
    let request = CreateRequest { restore: Some("one".into()), ..lab.request("c1", spec) };
    let error = within(lab.sandbox.create(request)).await.unwrap_err();
    assert!(error.to_string().contains("\"/srv\" on \"/data\""), "{error}");
    assert_eq!(error.code(), Code::FAILED_PRECONDITION);
    assert!(lab.asked().is_empty() && !lab.run_dir.path().exists());
}
