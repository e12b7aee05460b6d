//! Template builds.

use tokio::{task::JoinHandle, time::sleep};

use super::*;
use crate::{
    config::Policy,
    sandbox::SnapshotRequest,
    snapshot::{Listed, Store},
};

/// Enough for a snapshot that does not wait to be under way.
const MOMENT: Duration = Duration::from_millis(100);

type Snapshot = JoinHandle<Result<Listed, Error>>;

fn build() -> Value {
    let mut spec = spec();
    spec["annotations"] = json!({"cube.template.id": "py", "cube.ready.http": "8080/healthz"});
    spec["process"] = json!({"args": ["serve", "-p", "8080"], "env": ["TOKEN=hunter2"]});
    spec
}

impl Lab {
    /// A build that runs, and is not ready for `reason`.
    async fn building(reason: &str) -> Lab {
        let lab = Lab::new().await;
        *lab.guest().unready.lock().unwrap() = Some(reason.into());
        lab.sandbox.create(lab.request("c1", build())).await.unwrap();
        lab.sandbox.start(init("c1")).await.unwrap();
        lab
    }

    /// A snapshot that somebody waits for.
    async fn asks_for_snapshot(&self) -> Snapshot {
        let sandbox = self.sandbox.clone();
        let asked = tokio::spawn(async move { sandbox.snapshot(SnapshotRequest::default()).await });
        sleep(MOMENT).await;
        asked
    }

    fn becomes_ready(&self) {
        *self.guest().unready.lock().unwrap() = None;
    }

    fn quiesces(&self) -> usize {
        self.guest().calls.lock().unwrap().iter().filter(|call| *call == "Quiesce").count()
    }

    async fn state_is(&self, state: &str) {
        assert_eq!(within(self.sandbox.status()).await.unwrap().state, state);
    }
}

async fn error_of(snapshot: Snapshot) -> String {
    chain(&within(snapshot).await.unwrap().unwrap_err())
}

#[tokio::test]
async fn the_snapshot_of_a_template_waits_until_it_is_ready_and_has_its_name() {
    let lab = Lab::building("connection refused").await;
    let snapshot = lab.asks_for_snapshot().await;
    lab.state_is("running").await;
    assert_eq!((snapshot.is_finished(), lab.quiesces()), (false, 0), "nothing is frozen meanwhile");
    lab.becomes_ready();
    let manifest = within(snapshot).await.unwrap().unwrap().manifest;
    assert_eq!(manifest.name, "py");
    let template = manifest.template.unwrap();
    assert_eq!(
        (template.id.as_str(), template.args),
        ("py", ["serve", "-p", "8080"].map(String::from).to_vec())
    );
    lab.state_is("running").await;
    let (_, dir) = Store::at(&lab.dir.path().join("snapshots")).open("py").unwrap();
    let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
    assert!(!text.contains("hunter2"), "the environment is in the memory image alone: {text}");
}

#[tokio::test]
async fn a_build_that_is_paused_is_not_waited_for() {
    let lab = Lab::building("connection refused").await;
    within(lab.sandbox.pause("c1".into())).await.unwrap();
    let error = error_of(lab.asks_for_snapshot().await).await;
    assert!(error.contains("\"py\" is not ready: it is paused"), "{error}");
    lab.state_is("paused").await;
}

#[tokio::test]
async fn a_pause_of_a_build_that_is_waited_for_is_waited_out() {
    let lab = Lab::building("connection refused").await;
    let snapshot = lab.asks_for_snapshot().await;
    within(lab.sandbox.pause("c1".into())).await.unwrap();
    within(lab.sandbox.resume("c1".into())).await.unwrap();
    assert!(!snapshot.is_finished());
    lab.becomes_ready();
    within(snapshot).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_build_that_exits_or_is_killed_or_dies_is_an_error_at_once() {
    for end in ["exit", "kill", "die"] {
        let lab = Lab::building("connection refused").await;
        let snapshot = lab.asks_for_snapshot().await;
        let status = match end {
            "exit" => {
                lab.guest().exit("c1", "", 3);
                3
            }
            "kill" => {
                lab.kill(init("c1"), 9).await.unwrap();
                137
            }
            _ => {
                lab.host.vmm.die();
                137
            }
        };
        let error = error_of(snapshot).await;
        assert!(error.contains(&format!("\"c1\" has exited with status {status}")), "{end}: {error}");
        let deleted = within(lab.sandbox.delete(init("c1"))).await.unwrap();
        assert_eq!(deleted.exit.status, status);
    }
}

#[tokio::test]
async fn a_build_that_never_becomes_ready_is_told_with_its_last_failure() {
    let lab = Lab::building("HTTP 503").await;
    let snapshot = lab.asks_for_snapshot().await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(601)).await;
    tokio::time::resume();
    let error = error_of(snapshot).await;
    for part in ["\"py\" is not ready after 600s", "container \"c1\"", "127.0.0.1:8080/healthz", "HTTP 503"] {
        assert!(error.contains(part), "{error}");
    }
    lab.state_is("running").await;
}

#[tokio::test]
async fn a_snapshot_that_nobody_waits_for_any_more_is_not_taken() {
    let lab = Lab::building("connection refused").await;
    let snapshot = lab.asks_for_snapshot().await;
    snapshot.abort();
    lab.becomes_ready();
    within(lab.sandbox.wait_ready(LIMIT)).await.unwrap();
    sleep(MOMENT).await;
    assert_eq!(lab.quiesces(), 0);
}

#[tokio::test]
async fn a_template_is_built_alone_and_with_a_log() {
    let policy = Policy { pod_annotations: vec!["cube.*".into()], ..Default::default() };
    let lab = Lab::with_policy(Guest::new(), true, policy).await;
    let mut pod = build();
    pod["annotations"]["io.kubernetes.cri.sandbox-id"] = "c1".into();
    let error = lab.sandbox.create(lab.request("c1", pod)).await.unwrap_err();
    assert!(error.to_string().contains("cube.template.id for a pod"), "{error}");
    let mut request = lab.request("c1", build());
    request.stdio.terminal = true;
    let error = lab.sandbox.create(request).await.unwrap_err();
    assert!(error.to_string().contains("with a terminal"), "{error}");

    lab.sandbox.create(lab.request("c1", build())).await.unwrap();
    assert!(lab.dir.path().join("templates/py/stdout").exists());
    let error = lab.create("c2").await.unwrap_err();
    assert!(error.to_string().contains("for a pod"), "{error}");
}

#[tokio::test]
async fn two_builds_of_one_template_do_not_run_at_a_time() {
    let lab = Lab::new().await;
    let log = lab.dir.path().join("templates/py");
    let other = crate::log::dir::LogDir::create_alone(&log).unwrap();
    let error = lab.sandbox.create(lab.request("c1", build())).await.unwrap_err();
    assert_eq!(error.code(), Code::FAILED_PRECONDITION);
    assert!(chain(&error).contains("another sandbox writes its log to"), "{}", chain(&error));
    drop(other);
    assert!(!lab.run_dir.path().exists(), "nothing of the second is left");
}
