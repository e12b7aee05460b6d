//! Ready probes of real containers.

use std::{fs, time::Duration};

use containerd_shim_protos::ttrpc::Code;
use cube_protocol::guest::{probe_request::Attempt, probe_response::Outcome, *};
use tokio::time::sleep;

use crate::{
    SLEEP,
    agent::{Agent, LIMIT, deadline},
    refused,
};

/// Hands each connection to port `port` to the shell script `answer`, once its request has been read.
fn serve(port: u16, answer: &str) -> String {
    let request = "while read -r line && [ ${#line} -gt 1 ]; do :; done";
    let script = format!("#!/bin/sh\n{request}\n{answer}\n");
    format!("cat >/tmp/answer <<'END'\n{script}END\nexec busybox nc -ll -p {port} -e /bin/sh /tmp/answer")
}

fn http(port: u16, path: &str) -> Attempt {
    let address = format!("127.0.0.1:{port}");
    Attempt::Http(HttpProbe { address, path: path.into(), ..Default::default() })
}

fn tcp(port: u16) -> Attempt {
    Attempt::Tcp(TcpProbe { address: format!("127.0.0.1:{port}"), ..Default::default() })
}

fn exec(args: &[&str]) -> Attempt {
    let args = args.iter().map(|arg| (*arg).to_owned()).collect();
    Attempt::Exec(ExecProbe { args, ..Default::default() })
}

fn shell(script: &str) -> Attempt {
    exec(&["/bin/sh", "-c", script])
}

/// Much longer than any answer takes.
const PATIENT: Duration = Duration::from_secs(50);

impl Agent {
    async fn probe_within(
        &self,
        id: &str,
        limit: Duration,
        attempt: Attempt,
    ) -> ttrpc::Result<Option<String>> {
        let request = ProbeRequest {
            container_id: id.into(),
            timeout_ms: limit.as_millis() as u32,
            attempt: Some(attempt),
            ..Default::default()
        };
        match self.guest.probe(deadline(), &request).await?.outcome.expect("an outcome") {
            Outcome::Ready(_) => Ok(None),
            Outcome::NotReady(not) => Ok(Some(not.reason)),
            _ => panic!("an outcome of another version"),
        }
    }

    /// Why the container is not ready, or `None` if it is.
    async fn probe(&self, id: &str, attempt: Attempt) -> ttrpc::Result<Option<String>> {
        self.probe_within(id, PATIENT, attempt).await
    }

    async fn started(id: &str, args: &[&str]) -> Agent {
        let agent = Agent::start().await;
        agent.create(id, args).await.unwrap();
        agent.start_process(id, "").await.unwrap();
        agent
    }

    async fn comes_to(&self, attempt: Attempt, wanted: Option<&str>) {
        let reached = async {
            while self.probe("c1", attempt.clone()).await.unwrap().as_deref() != wanted {
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, reached).await.expect("it comes to that");
    }

    /// Processes of container c1.
    fn processes(&self) -> usize {
        let procs = fs::read_to_string(self.cgroup.join("c1/init/cgroup.procs"));
        procs.expect("the container has a leaf").lines().count()
    }

    async fn comes_to_processes(&self, count: usize) {
        let reached = async {
            while self.processes() != count {
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, reached).await.expect("the processes of probes end");
    }
}

#[tokio::test]
async fn a_port_that_takes_connections_is_ready() {
    let agent = Agent::started("c1", &["/bin/sh", "-c", &serve(7001, "")]).await;
    agent.comes_to(tcp(7001), None).await;
    assert_eq!(agent.probe("c1", tcp(7002)).await.unwrap().as_deref(), Some("connection refused"));
}

#[tokio::test]
async fn the_status_of_an_http_server_tells() {
    for (status, wanted) in
        [("200 OK", None), ("302 Found", None), ("503 No", Some("HTTP 503")), ("404 No", Some("HTTP 404"))]
    {
        let answer = format!("printf 'HTTP/1.1 {status}\\r\\nContent-Length: 0\\r\\n\\r\\n'");
        let agent = Agent::started("c1", &["/bin/sh", "-c", &serve(7003, &answer)]).await;
        agent.comes_to(http(7003, "/healthz"), wanted).await;
    }
}

#[tokio::test]
async fn a_program_that_ends_with_0_is_ready() {
    let agent = Agent::started("c1", SLEEP).await;
    assert_eq!(agent.probe("c1", shell("exit 0")).await.unwrap(), None);
    assert_eq!(agent.probe("c1", shell("exit 7")).await.unwrap().as_deref(), Some("exit status 7"));
    assert_eq!(agent.probe("c1", shell("kill -9 $$")).await.unwrap().as_deref(), Some("exit status 137"));
    let missing = agent.probe("c1", exec(&["/bin/nosuch"])).await.unwrap().unwrap();
    assert_eq!(missing, "exec /bin/nosuch: no such file or directory");
    agent.comes_to_processes(1).await;
    // Nobody was told, and it counts among the container's processes for nobody.
    let events = EventsRequest { timeout_ms: 0, ..Default::default() };
    assert_eq!(agent.guest.events(deadline(), &events).await.unwrap().events, []);
    assert_eq!(agent.guest.info(deadline(), &InfoRequest::new()).await.unwrap().processes, 1);
}

#[tokio::test]
async fn a_program_runs_as_the_init_process_does_and_sees_its_files() {
    let agent = Agent::started("c1", &["/bin/sh", "-c", "echo up >/tmp/up; exec /bin/sleep 1000"]).await;
    agent
        .comes_to(shell("[ \"$(cat /tmp/up)\" = up ] && [ \"$PATH\" = /bin ] && [ \"$PWD\" = / ]"), None)
        .await;
    assert_eq!(agent.probe("c1", shell("[ -z \"$(cat)\" ]")).await.unwrap(), None, "stdin is empty");
}

#[tokio::test]
async fn what_takes_too_long_is_not_ready_and_its_processes_are_gone() {
    let agent = Agent::started("c1", SLEEP).await;
    let short = Duration::from_millis(300);
    let hangs = shell("trap '' TERM; sleep 1000 & sleep 1000");
    let reason = agent.probe_within("c1", short, hangs).await.unwrap().unwrap();
    assert_eq!(reason, "no answer within 300ms");
    agent.comes_to_processes(1).await;

    let silent = Agent::started("c1", &["/bin/sh", "-c", &serve(7004, "exec sleep 1000")]).await;
    silent.comes_to(tcp(7004), None).await;
    let reason = silent.probe_within("c1", short, http(7004, "/")).await.unwrap().unwrap();
    assert_eq!(reason, "no answer within 300ms");
}

#[tokio::test]
async fn a_server_that_answers_without_end_is_not_ready() {
    let answer = "printf 'HTTP/1.1 200 OK\\r\\nX: '; while :; do echo -n xxxxxxxxxxxxxxxx; done";
    let agent = Agent::started("c1", &["/bin/sh", "-c", &serve(7005, answer)]).await;
    agent.comes_to(http(7005, "/"), Some("the head of the HTTP response is longer than 16 KiB")).await;
}

#[tokio::test]
async fn what_cannot_be_probed_is_an_error() {
    let agent = Agent::start().await;
    assert_eq!(refused(agent.probe("c1", tcp(1)).await).0, Code::NOT_FOUND);
    agent.create("c1", SLEEP).await.unwrap();
    for attempt in [tcp(1), exec(&["/bin/true"])] {
        let (code, text) = refused(agent.probe("c1", attempt).await);
        assert!(code == Code::FAILED_PRECONDITION && text.contains("created"), "{text}");
    }
    agent.start_process("c1", "").await.unwrap();
    let bad_address = Attempt::Tcp(TcpProbe { address: "localhost:1".into(), ..Default::default() });
    for attempt in [exec(&[]), http(80, "healthz"), http(80, "/\r\nX: y"), bad_address, tcp(0)] {
        assert_eq!(refused(agent.probe("c1", attempt).await).0, Code::INVALID_ARGUMENT);
    }
    for limit in [Duration::ZERO, Duration::from_secs(61)] {
        let (code, text) = refused(agent.probe_within("c1", limit, tcp(1)).await);
        assert!(code == Code::INVALID_ARGUMENT && text.contains("timeout_ms"), "{text}");
    }
    let nothing = ProbeRequest { container_id: "c1".into(), timeout_ms: 1, ..Default::default() };
    assert_eq!(refused(agent.guest.probe(deadline(), &nothing).await).0, Code::INVALID_ARGUMENT);
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    agent.exit("c1", "").await;
    assert_eq!(refused(agent.probe("c1", tcp(1)).await).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_guest_at_rest_is_not_probed_and_a_probe_does_not_keep_it_from_rest() {
    let agent = Agent::started("c1", SLEEP).await;
    let begun = async {
        agent.comes_to_processes(2).await;
        let request = QuiesceRequest { timeout_ms: 60_000, ..Default::default() };
        agent.guest.quiesce(deadline(), &request).await.unwrap();
    };
    let (probed, ()) = tokio::join!(agent.probe("c1", exec(&["/bin/sleep", "1000"])), begun);
    let (code, text) = refused(probed);
    assert!(code == Code::FAILED_PRECONDITION && text.contains("quiesced"), "{text}");
    agent.comes_to_processes(1).await;
    for attempt in [tcp(1), exec(&["/bin/true"])] {
        assert_eq!(refused(agent.probe("c1", attempt).await).0, Code::FAILED_PRECONDITION);
    }
    agent.guest.thaw(deadline(), &ThawRequest::new()).await.unwrap();
    assert_eq!(agent.probe("c1", exec(&["/bin/true"])).await.unwrap(), None);
}

#[tokio::test]
async fn an_exec_probe_needs_a_place_among_the_processes() {
    let agent = Agent::started("c1", SLEEP).await;
    // 300 in all; the init process has one.
    for n in 1..300 {
        agent.exec("c1", &format!("e{n}"), SLEEP).await.unwrap();
    }
    assert_eq!(refused(agent.probe("c1", exec(&["/bin/true"])).await).0, Code::RESOURCE_EXHAUSTED);
    agent.delete("c1", "e1").await.unwrap();
    // And gives it back.
    for _ in 0..3 {
        assert_eq!(agent.probe("c1", exec(&["/bin/true"])).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_container_that_is_deleted_takes_its_probe_along() {
    let agent = Agent::started("c1", SLEEP).await;
    let end = async {
        agent.comes_to_processes(2).await;
        agent.kill("c1", "", libc::SIGKILL).await.unwrap();
        agent.exit("c1", "").await;
        agent.delete("c1", "").await.unwrap();
    };
    let (probed, ()) = tokio::join!(agent.probe("c1", exec(&["/bin/sleep", "1000"])), end);
    // However far it had come.
    assert!(probed.unwrap().is_some());
    assert_eq!(agent.leftovers(), [""; 0]);
}
