//! Pause and Resume of one member of a pod.

use tokio::time::sleep;

use super::{pause::state_error, *};

/// Enough for a call that is not held back.
const MOMENT: Duration = Duration::from_millis(100);

impl Lab {
    /// The pod `c1` with the member `c2`, which is paused.
    async fn paused_member() -> Lab {
        let lab = Lab::pod().await;
        lab.pauses("c2").await.unwrap();
        lab
    }

    async fn pod() -> Lab {
        let lab = Lab::new().await;
        lab.run("c1").await;
        lab.run("c2").await;
        lab
    }

    async fn pauses(&self, id: &str) -> Result<(), Error> {
        within(self.sandbox.pause(id.into())).await
    }

    async fn resumes(&self, id: &str) -> Result<(), Error> {
        within(self.sandbox.resume(id.into())).await
    }

    async fn are(&self, expected: [Status; 2]) {
        assert_eq!([self.status_of(init("c1")).await, self.status_of(init("c2")).await], expected);
    }

    fn exec_in(&self, container: &str, id: &str) -> ExecRequest {
        ExecRequest { process: exec(container, id), spec: Default::default(), stdio: Stdio::default() }
    }
}

#[tokio::test]
async fn a_member_is_paused_and_the_pod_runs_on() {
    let lab = Lab::paused_member().await;
    lab.are([Status::Running, Status::Paused]).await;
    assert!(!lab.host.vmm.is_paused());
    let status = within(lab.sandbox.status()).await.unwrap();
    assert_eq!(
        status.processes.iter().map(|process| process.state).collect::<Vec<_>>(),
        ["running", "paused"]
    );
    within(lab.sandbox.exec(lab.exec_in("c1", "e1"))).await.unwrap();
    within(lab.sandbox.stats("c2".into())).await.unwrap();
    lab.resumes("c2").await.unwrap();
    lab.are([Status::Running, Status::Running]).await;
    assert!(lab.calls().contains(&"Pause c2".into()) && lab.calls().ends_with(&["Resume c2".into()]));
    let expected = ["create", "start", "create", "start", "paused", "exec-added", "resumed"];
    assert_eq!(lab.events().await, expected);
}

#[tokio::test]
async fn what_a_paused_member_cannot_do_is_refused() {
    let lab = Lab::paused_member().await;
    let text = state_error(within(lab.sandbox.exec(lab.exec_in("c2", "e1"))).await);
    assert!(text.contains("\"c2\" is paused") && text.contains("resumed first"), "{text}");
    state_error(lab.pauses("c2").await);
    lab.resumes("c2").await.unwrap();
    state_error(lab.resumes("c2").await);
    within(lab.sandbox.exec(lab.exec_in("c2", "e1"))).await.unwrap();
}

#[tokio::test]
async fn the_start_of_an_exec_waits_for_the_resume_of_its_container_or_for_its_end() {
    for resumed in [true, false] {
        let lab = Lab::pod().await;
        within(lab.sandbox.exec(lab.exec_in("c2", "e1"))).await.unwrap();
        lab.pauses("c2").await.unwrap();
        let sandbox = lab.sandbox.clone();
        let start = tokio::spawn(async move { sandbox.start(exec("c2", "e1")).await });
        sleep(MOMENT).await;
        assert!(!start.is_finished());
        if resumed {
            lab.resumes("c2").await.unwrap();
            assert_eq!(within(start).await.unwrap().unwrap(), PID);
        } else {
            lab.refuse("Start", Code::FAILED_PRECONDITION);
            lab.kill(init("c2"), 9).await.unwrap();
            within(start).await.unwrap().unwrap_err();
        }
    }
}

#[tokio::test]
async fn a_pause_of_the_pod_is_on_top_of_that_of_its_member() {
    let lab = Lab::paused_member().await;
    lab.pauses("c1").await.unwrap();
    lab.are([Status::Paused, Status::Paused]).await;
    let text = state_error(lab.resumes("c2").await);
    assert!(text.contains("before the whole pod"), "{text}");
    lab.resumes("c1").await.unwrap();
    lab.are([Status::Running, Status::Paused]).await;
    lab.resumes("c2").await.unwrap();
    lab.are([Status::Running, Status::Running]).await;
}

#[tokio::test]
async fn every_signal_goes_to_the_guest_at_once_and_a_member_that_is_killed_can_be_deleted() {
    let lab = Lab::paused_member().await;
    // The fake process dies of any signal.
    lab.kill(init("c2"), 15).await.unwrap();
    assert_eq!(lab.wait(init("c2")).await, 143);
    lab.are([Status::Running, Status::Stopped]).await;
    let text = state_error(lab.resumes("c2").await);
    assert!(text.contains("\"c2\" is stopped"), "{text}");
    within(lab.sandbox.delete(init("c2"))).await.unwrap();
    lab.run("c2").await;
    lab.are([Status::Running, Status::Running]).await;
}

#[tokio::test]
async fn a_member_that_cannot_be_paused_or_resumed_is_as_it_was() {
    let lab = Lab::pod().await;
    lab.refuse("Pause", Code::DEADLINE_EXCEEDED);
    assert_eq!(lab.pauses("c2").await.unwrap_err().code(), Code::DEADLINE_EXCEEDED);
    lab.are([Status::Running, Status::Running]).await;
    lab.mend();
    lab.pauses("c2").await.unwrap();
    lab.refuse("Resume", Code::INTERNAL);
    lab.resumes("c2").await.unwrap_err();
    lab.are([Status::Running, Status::Paused]).await;
    lab.mend();
    lab.resumes("c2").await.unwrap();
    assert_eq!(lab.events().await[4..], ["paused", "resumed"]);
}

#[tokio::test]
async fn a_member_that_exits_while_it_is_being_paused_is_stopped() {
    let lab = Lab::pod().await;
    lab.guest().fault("Pause", Fault::ExitFirst(4));
    // Told before the answer or after it, by another connection or the same.
    let _ = lab.pauses("c2").await;
    assert_eq!(lab.wait(init("c2")).await, 4);
    lab.are([Status::Running, Status::Stopped]).await;
    within(lab.sandbox.delete(init("c2"))).await.unwrap();
}

#[tokio::test]
async fn containers_of_pods_have_logs_unless_the_configuration_says_no() {
    for pods in [true, false] {
        let lab = Lab::configured(Guest::new(), true, |config| config.log.pods = pods).await;
        let mut member = spec();
        member["annotations"] = serde_json::json!({"io.kubernetes.cri.sandbox-id": "c1"});
        lab.sandbox.create(lab.request("c1", member)).await.unwrap();
        assert_eq!(lab.dir.path().join("log/default/c1/stdout").exists(), pods);
    }
    let lab = Lab::configured(Guest::new(), true, |config| config.log.pods = false).await;
    let mut single = spec();
    single["annotations"] = serde_json::json!({});
    lab.sandbox.create(lab.request("c1", single)).await.unwrap();
    assert!(lab.dir.path().join("log/default/c1/stdout").exists());
}
