//! Ready probes.

use tokio::time::sleep;

use super::*;
use crate::sandbox::{Readiness, ReadyStatus, SandboxReadiness};

/// Less than an attempt of the probe takes to come, once its pauses have grown.
const MOMENT: Duration = Duration::from_millis(50);

impl Lab {
    /// `c1` with a probe that fails with `reason`.
    async fn unready(reason: &str) -> Lab {
        let lab = Lab::new().await;
        lab.be_unready(reason);
        lab.run_probed("c1").await;
        lab
    }

    fn be_unready(&self, reason: &str) {
        *self.guest().unready.lock().unwrap() = Some(reason.into());
    }

    fn be_ready(&self) {
        *self.guest().unready.lock().unwrap() = None;
    }

    async fn run_probed(&self, id: &str) {
        let mut spec = spec();
        spec["annotations"]["cube.ready.http"] = "8080/healthz".into();
        self.sandbox.create(self.request(id, spec)).await.unwrap();
        self.sandbox.start(init(id)).await.unwrap();
    }

    async fn wait_ready(&self, limit: Duration) -> Result<SandboxReadiness, Error> {
        within(self.sandbox.wait_ready(limit)).await
    }

    async fn is_ready(&self) {
        assert_eq!(self.wait_ready(LIMIT).await.unwrap(), SandboxReadiness::Ready);
    }

    async fn waits_for(&self) -> String {
        match self.wait_ready(Duration::ZERO).await.unwrap() {
            SandboxReadiness::Waiting(what) => what,
            SandboxReadiness::Ready => panic!("it is ready"),
        }
    }

    async fn comes_to_wait_for(&self, what: &str) {
        within(async {
            while !self.waits_for().await.contains(what) {
                sleep(MOMENT).await;
            }
        })
        .await;
    }

    fn attempts(&self) -> usize {
        self.guest().calls.lock().unwrap().iter().filter(|call| call.starts_with("Probe")).count()
    }

    async fn attempts_beyond(&self, before: usize) {
        within(async {
            while self.attempts() <= before {
                sleep(MOMENT).await;
            }
        })
        .await;
    }

    async fn probe_of(&self, container: &str) -> Option<ReadyStatus> {
        let processes = self.sandbox.status().await.unwrap().processes;
        processes.into_iter().find(|process| process.container == container).unwrap().ready
    }
}

fn not_ready(result: Result<SandboxReadiness, Error>) -> (String, u32) {
    match result {
        Err(Error::NotReady { id, status }) => (id, status),
        other => panic!("not NotReady: {other:?}"),
    }
}

#[tokio::test]
async fn without_a_probe_a_container_is_ready_when_it_runs() {
    let lab = Lab::new().await;
    assert_eq!(lab.waits_for().await, "it has no container yet");
    lab.create("c1").await.unwrap();
    assert_eq!(lab.waits_for().await, "container \"c1\": it has not been started");
    let waiting = lab.sandbox.clone();
    let waiting = tokio::spawn(async move { waiting.wait_ready(LIMIT).await });
    lab.sandbox.start(init("c1")).await.unwrap();
    assert_eq!(within(waiting).await.unwrap().unwrap(), SandboxReadiness::Ready);
    lab.is_ready().await;
    assert!(lab.probe_of("c1").await.is_none() && lab.attempts() == 0);
}

#[tokio::test]
async fn a_probe_is_tried_until_it_succeeds_once() {
    let lab = Lab::unready("connection refused").await;
    lab.comes_to_wait_for("container \"c1\", http 127.0.0.1:8080/healthz: connection refused").await;
    let status = lab.probe_of("c1").await.unwrap();
    assert_eq!(status.probe, "http 127.0.0.1:8080/healthz");
    assert_eq!(status.state, Readiness::Waiting("connection refused".into()));
    lab.be_unready("HTTP 503");
    lab.comes_to_wait_for(": HTTP 503").await;
    lab.be_ready();
    lab.is_ready().await;
    assert!(matches!(lab.probe_of("c1").await.unwrap().state, Readiness::Since(at) if at > 0));
    let attempts = lab.attempts();
    lab.be_unready("never asked again");
    sleep(MOMENT * 10).await;
    assert_eq!(lab.attempts(), attempts);
    lab.is_ready().await;
}

#[tokio::test]
async fn what_the_guest_says_is_printable_and_short() {
    let lab = Lab::unready(&"\u{1b}[31m".repeat(10_000)).await;
    lab.comes_to_wait_for("[31m").await;
    let what = lab.waits_for().await;
    assert!(!what.contains('\u{1b}') && what.len() < 10_000, "{what}");
}

#[tokio::test]
async fn a_pause_holds_the_probe_and_fails_nothing() {
    let lab = Lab::unready("connection refused").await;
    lab.comes_to_wait_for("connection refused").await;
    within(lab.sandbox.pause("c1".into())).await.unwrap();
    assert_eq!(lab.waits_for().await, "the sandbox is paused");
    let before = lab.attempts();
    lab.be_ready();
    // In this time there would be several.
    sleep(MOMENT * 20).await;
    // One may have been on its way when the pause began.
    assert!(lab.attempts() <= before + 1);
    within(lab.sandbox.resume("c1".into())).await.unwrap();
    lab.is_ready().await;
}

#[tokio::test]
async fn a_guest_at_rest_and_a_lost_connection_are_no_reasons() {
    let lab = Lab::unready("connection refused").await;
    lab.comes_to_wait_for("connection refused").await;
    let quiesced = ttrpc::get_status(Code::FAILED_PRECONDITION, "the sandbox is quiesced");
    lab.guest().fault("Probe", Fault::Refuse(quiesced));
    lab.attempts_beyond(lab.attempts() + 1).await;
    lab.guest().cut_connections();
    lab.attempts_beyond(lab.attempts() + 1).await;
    assert!(lab.waits_for().await.contains("connection refused"));
    lab.guest().faults.lock().unwrap().clear();
    lab.be_ready();
    lab.is_ready().await;
}

#[tokio::test]
async fn a_guest_that_cannot_probe_says_why() {
    let lab = Lab::new().await;
    let full = ttrpc::get_status(Code::RESOURCE_EXHAUSTED, "too many processes");
    lab.guest().fault("Probe", Fault::Refuse(full));
    lab.run_probed("c1").await;
    lab.comes_to_wait_for("too many processes").await;
}

#[tokio::test]
async fn a_container_that_exits_before_it_is_ready_ends_the_wait() {
    let lab = Lab::unready("connection refused").await;
    lab.comes_to_wait_for("connection refused").await;
    let waiting = lab.sandbox.clone();
    let waiting = tokio::spawn(async move { waiting.wait_ready(LIMIT).await });
    lab.guest().exit("c1", "", 3);
    assert_eq!(not_ready(within(waiting).await.unwrap()), ("c1".into(), 3));
    assert_eq!(not_ready(lab.wait_ready(LIMIT).await), ("c1".into(), 3));
    let attempts = lab.attempts();
    sleep(MOMENT * 10).await;
    assert!(lab.attempts() <= attempts + 1, "nobody probes what has ended");
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(lab.wait_ready(LIMIT).await.is_err());
}

#[tokio::test]
async fn a_main_container_that_has_exited_is_not_ready_any_more() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.is_ready().await;
    lab.guest().exit("c1", "", 0);
    lab.wait(init("c1")).await;
    assert_eq!(not_ready(lab.wait_ready(LIMIT).await), ("c1".into(), 0));
}

#[tokio::test]
async fn a_pod_is_ready_when_every_member_is() {
    let lab = Lab::unready("connection refused").await;
    lab.run("helper").await;
    lab.run_probed("late").await;
    lab.be_ready();
    lab.is_ready().await;
    // It has done its work.
    lab.guest().exit("helper", "", 0);
    lab.wait(init("helper")).await;
    lab.is_ready().await;
    lab.be_unready("HTTP 500");
    lab.run_probed("later").await;
    lab.comes_to_wait_for("container \"later\", http 127.0.0.1:8080/healthz: HTTP 500").await;
    lab.guest().exit("later", "", 1);
    lab.wait(init("later")).await;
    assert_eq!(not_ready(lab.wait_ready(LIMIT).await), ("later".into(), 1));
}

#[tokio::test]
async fn a_vm_that_dies_ends_the_wait() {
    let lab = Lab::unready("connection refused").await;
    lab.comes_to_wait_for("connection refused").await;
    lab.host.vmm.die();
    assert_eq!(not_ready(lab.wait_ready(LIMIT).await), ("c1".into(), 137));
}
