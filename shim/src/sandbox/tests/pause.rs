//! Pause and Resume.

use super::*;

const QUIESCED: &str = "the sandbox is quiesced";

impl Lab {
    async fn paused() -> Lab {
        let lab = Lab::new().await;
        lab.run("c1").await;
        lab.pause().await.unwrap();
        lab
    }

    async fn pause(&self) -> Result<(), Error> {
        within(self.sandbox.pause("c1".into())).await
    }

    async fn resume(&self) -> Result<(), Error> {
        within(self.sandbox.resume("c1".into())).await
    }

    pub(super) async fn status_of(&self, process: ProcessId) -> Status {
        within(self.sandbox.state(process)).await.unwrap().status
    }

    async fn label(&self) -> &'static str {
        within(self.sandbox.status()).await.unwrap().state
    }

    pub(super) fn refuse(&self, method: &'static str, code: Code) {
        self.guest().fault(method, Fault::Refuse(ttrpc::get_status(code, QUIESCED)));
    }

    pub(super) fn mend(&self) {
        self.guest().faults.lock().unwrap().clear();
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.guest().calls.lock().unwrap().clone()
    }

    fn exec_request(&self, id: &str) -> ExecRequest {
        ExecRequest { process: exec("c1", id), spec: Default::default(), stdio: Stdio::default() }
    }
}

pub(super) fn state_error(result: Result<(), Error>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Code::FAILED_PRECONDITION, "{error}");
    chain(&error)
}

#[tokio::test]
async fn a_sandbox_is_paused_and_resumed_and_containerd_is_told() {
    let lab = Lab::paused().await;
    assert!(lab.host.vmm.is_paused());
    assert_eq!((lab.status_of(init("c1")).await, lab.label().await), (Status::Paused, "paused"));
    lab.resume().await.unwrap();
    assert!(!lab.host.vmm.is_paused());
    assert_eq!((lab.status_of(init("c1")).await, lab.label().await), (Status::Running, "running"));
    assert!(lab.calls().ends_with(&["Quiesce".into(), "Thaw".into()]));
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed"]);
}

#[tokio::test]
async fn what_is_known_is_answered_while_paused_and_the_guest_is_asked_nothing() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.sandbox.stats("c1".into()).await.unwrap();
    lab.pause().await.unwrap();
    let before = lab.calls();
    assert_eq!(within(lab.sandbox.pid("c1".into())).await.unwrap(), PID);
    within(lab.sandbox.stats("c1".into())).await.unwrap();
    assert!(within(lab.sandbox.status()).await.unwrap().agent.is_none());
    within(lab.sandbox.close_stdin(init("c1"))).await.unwrap();
    assert_eq!(lab.calls(), before);
}

#[tokio::test]
async fn what_would_change_a_paused_sandbox_is_refused() {
    let lab = Lab::paused().await;
    let text = state_error(within(lab.sandbox.exec(lab.exec_request("e1"))).await);
    assert!(text.contains("\"c1\" is paused") && text.contains("resumed first"), "{text}");
    state_error(within(lab.sandbox.update("c1".into(), Default::default())).await);
    state_error(within(lab.sandbox.resize(init("c1"), 80, 24)).await);
    state_error(lab.create("c2").await.map(drop));
    state_error(lab.pause().await);
    lab.resume().await.unwrap();
    within(lab.sandbox.exec(lab.exec_request("e1"))).await.unwrap();
}

#[tokio::test]
async fn what_does_not_run_cannot_be_paused_and_what_is_not_paused_not_resumed() {
    let lab = Lab::new().await;
    let missing = lab.pause().await.unwrap_err();
    assert_eq!(missing.code(), Code::NOT_FOUND);
    lab.create("c1").await.unwrap();
    let text = state_error(lab.pause().await);
    assert!(text.contains("\"c1\" is created"), "{text}");
    lab.sandbox.start(init("c1")).await.unwrap();
    let text = state_error(lab.resume().await);
    assert!(text.contains("\"c1\" is running"), "{text}");
    lab.guest().exit("c1", "", 0);
    lab.wait(init("c1")).await;
    state_error(lab.pause().await);
}

#[tokio::test]
async fn a_pause_that_the_guest_refuses_leaves_everything_running() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.refuse("Quiesce", Code::DEADLINE_EXCEEDED);
    assert_eq!(lab.pause().await.unwrap_err().code(), Code::DEADLINE_EXCEEDED);
    assert_eq!((lab.label().await, lab.host.vmm.is_paused()), ("running", false));
    lab.mend();
    within(lab.sandbox.exec(lab.exec_request("e1"))).await.unwrap();
    lab.guest().exit("c1", "", 5);
    assert_eq!(lab.wait(init("c1")).await, 5, "events are followed again");
    assert_eq!(lab.events().await, ["create", "start", "exec-added", "exit"]);
}

#[tokio::test]
async fn a_vmm_that_does_not_pause_leaves_everything_running() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.host.vmm.sticks.store(true, std::sync::atomic::Ordering::Relaxed);
    lab.pause().await.unwrap_err();
    assert_eq!(lab.label().await, "running");
    assert!(lab.calls().ends_with(&["Quiesce".into(), "Thaw".into()]));
    lab.host.vmm.sticks.store(false, std::sync::atomic::Ordering::Relaxed);
    lab.pause().await.unwrap();
}

#[tokio::test]
async fn a_resume_that_fails_leaves_it_paused_and_can_be_repeated() {
    let lab = Lab::paused().await;
    lab.refuse("Thaw", Code::INTERNAL);
    lab.resume().await.unwrap_err();
    assert_eq!((lab.label().await, lab.host.vmm.is_paused()), ("paused", true));
    lab.mend();
    lab.resume().await.unwrap();
    assert_eq!(lab.events().await, ["create", "start", "paused", "resumed"]);
}

#[tokio::test]
async fn sigkill_of_a_paused_sandbox_kills_its_vm() {
    let lab = Lab::paused().await;
    lab.kill(init("c1"), 9).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 137);
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(!lab.run_dir.path().exists());
    assert_eq!(lab.events().await, ["create", "start", "paused", "exit", "delete"]);
}

#[tokio::test]
async fn other_kills_wait_for_the_resume() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    within(lab.sandbox.exec(lab.exec_request("e1"))).await.unwrap();
    lab.sandbox.start(exec("c1", "e1")).await.unwrap();
    lab.pause().await.unwrap();
    let (term, kill) = (lab.kill(init("c1"), 15), lab.kill(exec("c1", "e1"), 9));
    let (mut term, mut kill) = (Box::pin(term), Box::pin(kill));
    assert!(timeout(Duration::from_millis(20), &mut term).await.is_err());
    assert!(timeout(Duration::from_millis(20), &mut kill).await.is_err());
    lab.resume().await.unwrap();
    term.await.unwrap();
    kill.await.unwrap();
    assert_eq!((lab.wait(init("c1")).await, lab.wait(exec("c1", "e1")).await), (143, 137));
}

#[tokio::test]
async fn an_exec_that_is_there_is_started_with_the_resume() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    within(lab.sandbox.exec(lab.exec_request("e1"))).await.unwrap();
    lab.pause().await.unwrap();
    let mut start = Box::pin(lab.sandbox.start(exec("c1", "e1")));
    assert!(timeout(Duration::from_millis(20), &mut start).await.is_err());
    lab.resume().await.unwrap();
    within(start).await.unwrap();
    assert_eq!(lab.status_of(exec("c1", "e1")).await, Status::Running);
}

#[tokio::test]
async fn an_exec_that_has_exited_is_deleted_with_the_resume() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    for id in ["e1", "e2"] {
        within(lab.sandbox.exec(lab.exec_request(id))).await.unwrap();
        lab.sandbox.start(exec("c1", id)).await.unwrap();
        lab.guest().exit("c1", id, 3);
        assert_eq!(lab.wait(exec("c1", id)).await, 3);
    }
    lab.pause().await.unwrap();
    let mut patient = Box::pin(lab.sandbox.delete(exec("c1", "e1")));
    assert!(timeout(Duration::from_millis(20), &mut patient).await.is_err());
    let impatient = timeout(Duration::from_millis(20), lab.sandbox.delete(exec("c1", "e2"))).await;
    assert!(impatient.is_err());
    lab.resume().await.unwrap();
    assert_eq!(patient.await.unwrap().exit.status, 3);
    while lab.sandbox.state(exec("c1", "e2")).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn kills_that_wait_are_answered_when_the_vm_dies() {
    let lab = Lab::paused().await;
    let mut term = Box::pin(lab.kill(init("c1"), 15));
    assert!(timeout(Duration::from_millis(20), &mut term).await.is_err());
    lab.host.vmm.die();
    assert_eq!(term.await.unwrap_err().code(), Code::NOT_FOUND);
    assert_eq!(lab.wait(init("c1")).await, 137);
    state_error(lab.resume().await);
}

#[tokio::test]
async fn a_vm_that_dies_while_it_is_paused_or_resumed_ends_the_call() {
    for method in ["Quiesce", "Thaw"] {
        let lab = Lab::new().await;
        lab.run("c1").await;
        if method == "Thaw" {
            lab.pause().await.unwrap();
        }
        lab.guest().fault(method, Fault::Hang);
        let call = async { if method == "Thaw" { lab.resume().await } else { lab.pause().await } };
        let death = async {
            while !lab.calls().iter().any(|call| call == method) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            lab.host.vmm.die();
        };
        let (result, ()) = tokio::join!(call, death);
        result.unwrap_err();
        assert_eq!((lab.wait(init("c1")).await, lab.label().await), (137, "stopped"));
    }
}

#[tokio::test]
async fn a_pause_waits_for_what_is_under_way_and_refuses_what_comes_after() {
    let lab = Lab::new().await;
    lab.create("c1").await.unwrap();
    lab.sandbox.start(init("c1")).await.unwrap();
    let (exec_result, pause, late) = within(async {
        // In this order.
        tokio::join!(biased;
            lab.sandbox.exec(lab.exec_request("e1")),
            lab.sandbox.pause("c1".into()),
            lab.sandbox.exec(lab.exec_request("e2")))
    })
    .await;
    exec_result.unwrap();
    pause.unwrap();
    state_error(late);
    assert!(lab.calls().ends_with(&["Exec c1 e1".into(), "Quiesce".into()]));
}

#[tokio::test]
async fn a_container_that_exits_while_it_is_paused_can_be_deleted() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.guest().fault("Quiesce", Fault::ExitFirst(4));
    lab.pause().await.unwrap();
    assert_eq!((lab.wait(init("c1")).await, lab.label().await), (4, "paused"));
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(!lab.run_dir.path().exists() && !lab.host.vmm.is_alive());
}
