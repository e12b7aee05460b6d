//! Pausing one container while the others run.

use std::time::Duration;

use containerd_shim_protos::{api::*, ttrpc::Code};
use cube_protocol::{
    guest::{ExecProbe, ProbeRequest, probe_request::Attempt},
    stream::Stream,
};
use tokio::time::sleep;

use crate::{
    SLEEP,
    agent::{Agent, deadline},
    refused,
    streams::Host,
};

/// Writes a byte to /tmp/count as often as it can.
const COUNT: &[&str] = &["/bin/sh", "-c", "while :; do echo -n x >>/tmp/count; done"];

/// Enough for a process that runs to write something.
const MOMENT: Duration = Duration::from_millis(200);

impl Agent {
    async fn pause(&self, id: &str) -> ttrpc::Result<Empty> {
        self.task.pause(deadline(), &PauseRequest { id: id.into(), ..Default::default() }).await
    }

    async fn resume(&self, id: &str) -> ttrpc::Result<Empty> {
        self.task.resume(deadline(), &ResumeRequest { id: id.into(), ..Default::default() }).await
    }

    async fn is(&self, id: &str, expected: Status) {
        assert_eq!(self.status(id, "").await.unwrap(), expected);
    }

    async fn stands_still(&self) {
        let before = self.count();
        sleep(MOMENT).await;
        assert_eq!(self.count(), before);
    }
}

#[tokio::test]
async fn a_paused_container_stands_still_and_another_runs_also_after_a_quiesce() {
    let agent = Agent::start().await;
    agent.run("c1", COUNT).await;
    agent.run("c2", SLEEP).await;
    agent.counts_beyond(0).await;
    for _ in 0..2 {
        agent.pause("c1").await.unwrap();
    }
    agent.is("c1", Status::PAUSED).await;
    agent.is("c2", Status::RUNNING).await;
    agent.stands_still().await;
    agent.exec("c2", "e1", &["/bin/true"]).await.unwrap();
    agent.start_process("c2", "e1").await.unwrap();
    assert_eq!(agent.exit("c2", "e1").await.exit_status, 0);

    agent.quiesce(false).await.unwrap();
    for refused_call in [agent.resume("c1").await, agent.pause("c2").await] {
        assert_eq!(refused(refused_call).0, Code::FAILED_PRECONDITION);
    }
    agent.thaw().await.unwrap();
    agent.is("c1", Status::PAUSED).await;
    agent.stands_still().await;

    for _ in 0..2 {
        agent.resume("c1").await.unwrap();
    }
    agent.is("c1", Status::RUNNING).await;
    agent.counts_beyond(agent.count()).await;
}

#[tokio::test]
async fn no_process_is_born_in_a_paused_container() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    agent.exec("c1", "early", &["/bin/true"]).await.unwrap();
    agent.pause("c1").await.unwrap();
    let probe = ProbeRequest {
        container_id: "c1".into(),
        timeout_ms: 1000,
        attempt: Some(Attempt::Exec(ExecProbe { args: vec!["/bin/true".into()], ..Default::default() })),
        ..Default::default()
    };
    let probe = agent.guest.probe(deadline(), &probe).await;
    for (code, text) in [
        refused(agent.exec("c1", "late", &["/bin/true"]).await),
        refused(agent.start_process("c1", "early").await),
        refused(probe),
    ] {
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(text.contains("\"c1\" is paused"), "{text}");
    }
    agent.resume("c1").await.unwrap();
    agent.start_process("c1", "early").await.unwrap();
    assert_eq!(agent.exit("c1", "early").await.exit_status, 0);
}

#[tokio::test]
async fn a_signal_comes_at_the_resume_and_sigkill_at_once() {
    let agent = Agent::start().await;
    agent.run("c1", &["/bin/sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]).await;
    agent.run("c2", SLEEP).await;
    sleep(MOMENT).await;
    for id in ["c1", "c2"] {
        agent.pause(id).await.unwrap();
    }
    agent.kill("c1", "", libc::SIGTERM).await.unwrap();
    sleep(MOMENT).await;
    agent.is("c1", Status::PAUSED).await;
    agent.kill("c2", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.exit("c2", "").await.exit_status, 137);
    agent.is("c2", Status::STOPPED).await;
    assert_eq!(refused(agent.pause("c2").await).0, Code::FAILED_PRECONDITION);
    agent.delete("c2", "").await.unwrap();
    agent.resume("c1").await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 3);
    agent.delete("c1", "").await.unwrap();
    assert_eq!(refused(agent.pause("c1").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn what_a_paused_container_has_written_still_arrives() {
    let agent = Agent::start().await;
    agent.run("c1", &["/bin/sh", "-c", "echo before; touch /tmp/count; exec sleep 1000"]).await;
    let written = agent.rootfs().join("tmp/count");
    while !written.exists() {
        sleep(Duration::from_millis(5)).await;
    }
    agent.pause("c1").await.unwrap();
    let mut host = Host::open(&agent, "c1", Stream::STDOUT, 1, 0).await;
    assert_eq!(host.receive().await.unwrap().body, &b"before\n"[..]);
    agent.resume("c1").await.unwrap();
}
