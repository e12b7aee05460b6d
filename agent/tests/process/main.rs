//! The agent's services over a real socket, with real containers, in process mode. Needs root.

// Helpers of tests may panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod pause;
mod probe;
mod quiesce;
mod starts;
mod streams;

use agent::{Agent, deadline};
use containerd_shim_protos::{api::*, ttrpc::Code};
use cube_protocol::{guest::*, stream::Stream, version};
use protobuf::Message;
use streams::Host;

const SLEEP: &[&str] = &["/bin/sleep", "1000"];

/// Code and text of the status that a call must have failed with.
fn refused<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("no status: {other:?}"),
    }
}

#[tokio::test]
async fn a_container_runs_and_leaves_nothing() {
    let mut agent = Agent::start().await;
    let pid = agent.create("c1", &["/bin/sh", "-c", "exit 3"]).await.unwrap();
    assert_eq!(agent.status("c1", "").await.unwrap(), Status::CREATED);
    assert_eq!(agent.start_process("c1", "").await.unwrap(), pid);
    let exit = agent.exit("c1", "").await;
    assert_eq!((exit.exit_status, exit.pid), (3, pid));
    assert_eq!(agent.status("c1", "").await.unwrap(), Status::STOPPED);
    let deleted = agent.delete("c1", "").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (3, pid));
    let at = deleted.exited_at.unwrap();
    assert_eq!(at.seconds as u64 * 1_000_000_000 + at.nanos as u64, exit.exited_at_ns);
    assert_eq!(refused(agent.status("c1", "").await).0, Code::NOT_FOUND);
    assert_eq!(agent.leftovers(), [""; 0]);
    assert!(agent.shut_down().await.success());
}

#[tokio::test]
async fn three_hundred_processes_with_all_streams_run_at_once() {
    let agent = Agent::start().await;
    agent.create("c1", SLEEP).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    let ids: Vec<_> = (1..300).map(|n| format!("e{n}")).collect();
    let started = ids.iter().map(async |id| {
        agent.exec_with("c1", id, SLEEP, [true; 3]).await.map_err(|error| format!("{id}: {error}"))?;
        agent.start_process("c1", id).await.map_err(|error| format!("{id}: {error}"))
    });
    for started in futures::future::join_all(started).await {
        started.unwrap();
    }
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    agent.exit("c1", "").await;
}

#[tokio::test]
async fn a_container_without_rlimits_has_what_the_agent_may_have() {
    let agent = Agent::start().await;
    let hard = |resource| nix::sys::resource::getrlimit(resource).unwrap().1;
    let script = "ulimit -Sn; ulimit -Hn; ulimit -Su";
    agent.create("c1", &["/bin/sh", "-c", &format!("({script}) > /tmp/limits")]).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 0);
    let limits = std::fs::read_to_string(agent.rootfs().join("tmp/limits")).unwrap();
    let limits: Vec<u64> = limits.lines().map(|line| line.parse().unwrap_or(u64::MAX)).collect();
    let files = hard(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let processes = hard(nix::sys::resource::Resource::RLIMIT_NPROC);
    assert!(limits[0] == limits[1] && limits[1] >= files && limits[2] >= processes, "{limits:?}");
}

#[tokio::test]
async fn calls_that_the_state_forbids_are_refused_as_containerd_expects() {
    let agent = Agent::start().await;
    agent.create("c1", SLEEP).await.unwrap();
    assert_eq!(refused(agent.create("c1", SLEEP).await).0, Code::ALREADY_EXISTS);
    agent.start_process("c1", "").await.unwrap();
    assert_eq!(refused(agent.start_process("c1", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refused(agent.delete("c1", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refused(agent.kill("c2", "", 9).await).0, Code::NOT_FOUND);
    assert_eq!(refused(agent.kill("c1", "e1", 9).await).0, Code::NOT_FOUND);
    assert_eq!(refused(agent.kill("c1", "", 1000).await).0, Code::INVALID_ARGUMENT);
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 137);
    assert_eq!(refused(agent.kill("c1", "", libc::SIGKILL).await).0, Code::NOT_FOUND);
    assert_eq!(refused(agent.exec("c1", "e1", SLEEP).await).0, Code::FAILED_PRECONDITION);
    agent.delete("c1", "").await.unwrap();
    assert_eq!(refused(agent.delete("c1", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_deleted() {
    let agent = Agent::start().await;
    agent.create("c1", SLEEP).await.unwrap();
    assert_eq!(agent.delete("c1", "").await.unwrap().exit_status, 137);
    assert_eq!(agent.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_created_container_can_be_killed() {
    let agent = Agent::start().await;
    agent.create("c1", SLEEP).await.unwrap();
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 137);
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn execs_have_a_life_of_their_own() {
    let agent = Agent::start().await;
    agent.create("c1", SLEEP).await.unwrap();
    agent.start_process("c1", "").await.unwrap();

    agent.exec("c1", "e1", &["/bin/sh", "-c", "exit 5"]).await.unwrap();
    assert_eq!(refused(agent.exec("c1", "e1", SLEEP).await).0, Code::ALREADY_EXISTS);
    assert_eq!(refused(agent.exec("c1", "../e", SLEEP).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(agent.status("c1", "e1").await.unwrap(), Status::CREATED);
    assert_eq!(refused(agent.kill("c1", "e1", 9).await).0, Code::FAILED_PRECONDITION);
    agent.start_process("c1", "e1").await.unwrap();
    assert_eq!(agent.exit("c1", "e1").await.exit_status, 5);
    assert_eq!(agent.delete("c1", "e1").await.unwrap().exit_status, 5);
    assert_eq!(refused(agent.status("c1", "e1").await).0, Code::NOT_FOUND);

    agent.exec("c1", "never-started", SLEEP).await.unwrap();
    agent.delete("c1", "never-started").await.unwrap();

    agent.exec("c1", "e2", SLEEP).await.unwrap();
    agent.start_process("c1", "e2").await.unwrap();
    assert_eq!(refused(agent.delete("c1", "e2").await).0, Code::FAILED_PRECONDITION);
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 137);
    assert_eq!(agent.exit("c1", "e2").await.exit_status, 137, "execs end with the init process");
    agent.delete("c1", "").await.unwrap();
    assert_eq!(agent.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_command_that_does_not_exist_fails_at_once_with_its_path() {
    let agent = Agent::start().await;
    let created = agent.create("c1", &["/bin/nosuch"]).await;
    let failed = match created {
        Ok(_) => agent.start_process("c1", "").await,
        failed => failed,
    };
    let (code, text) = refused(failed);
    assert_eq!(code, Code::NOT_FOUND, "{text}");
    assert!(text.contains("/bin/nosuch") && text.contains("no such file or directory"), "{text}");

    agent.create("c2", SLEEP).await.unwrap();
    agent.start_process("c2", "").await.unwrap();
    agent.exec("c2", "e1", &["/bin/nosuch"]).await.unwrap();
    let (code, text) = refused(agent.start_process("c2", "e1").await);
    assert_eq!(code, Code::NOT_FOUND, "{text}");
    assert!(text.contains("/bin/nosuch") && text.contains("no such file or directory"), "{text}");
    agent.delete("c2", "e1").await.unwrap();
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing_and_frees_the_id() {
    let agent = Agent::start().await;
    let mut request = agent.create_request("c1", SLEEP);
    request.rootfs[0].source = "/nonexistent/rootfs".into();
    let (code, text) = refused(agent.task.create(deadline(), &request).await);
    assert_eq!(code, Code::NOT_FOUND, "{text}");
    assert!(text.contains("/nonexistent/rootfs"), "{text}");

    let mut request = agent.create_request("c1", SLEEP);
    request.rootfs.clear();
    assert_eq!(refused(agent.task.create(deadline(), &request).await).0, Code::INVALID_ARGUMENT);

    let mut request = agent.create_request("c1", SLEEP);
    request.rootfs[0].options.push("lowerdir=/".into());
    assert_eq!(refused(agent.task.create(deadline(), &request).await).0, Code::INVALID_ARGUMENT);

    for bad in ["", "..", "../c1", "a/b"] {
        let (code, text) = refused(agent.create(bad, SLEEP).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    }
    assert_eq!(agent.leftovers(), [""; 0]);
    agent.create("c1", SLEEP).await.unwrap();
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn output_and_its_end_arrive_on_the_stream_port() {
    let agent = Agent::start().await;
    agent.create("c1", &["/bin/sh", "-c", "echo hello; echo world"]).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    let mut host = Host::open(&agent, "c1", Stream::STDOUT, 1, 0).await;
    assert_eq!(host.drain().await, b"hello\nworld\n");
}

#[tokio::test]
async fn an_unknown_protocol_is_refused_with_both_versions() {
    let agent = Agent::start().await;
    let theirs = Version { major: version::CURRENT.major + 1, minor: 7, ..Default::default() };
    let hello = HelloRequest { protocol: Some(theirs).into(), ..Default::default() };
    let (code, text) = refused(agent.guest.hello(deadline(), &hello).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains(&version::CURRENT.to_string()) && text.contains(".7"), "{text}");
}

#[tokio::test]
async fn a_sandbox_is_prepared_once() {
    let agent = Agent::start().await;
    let source = agent.directory.path().join("shared");
    std::fs::create_dir_all(source.join("c1")).unwrap();
    let shared = SharedMount {
        fs_type: "bind".into(),
        source: source.to_str().unwrap().into(),
        target: "/run/cube/shared".into(),
        ..Default::default()
    };
    let request =
        PrepareSandboxRequest { hostname: "box".into(), shared_mounts: vec![shared], ..Default::default() };
    let mut outside = request.clone();
    outside.shared_mounts[0].target = "/run/cube/../../etc".into();
    assert_eq!(refused(agent.guest.prepare_sandbox(deadline(), &outside).await).0, Code::INVALID_ARGUMENT);

    agent.guest.prepare_sandbox(deadline(), &request).await.unwrap();
    agent.guest.prepare_sandbox(deadline(), &request).await.unwrap();
    let other = PrepareSandboxRequest { hostname: "other".into(), ..request };
    assert_eq!(refused(agent.guest.prepare_sandbox(deadline(), &other).await).0, Code::FAILED_PRECONDITION);
    assert!(!std::path::Path::new("/run/cube/shared").exists(), "nothing is made on the host");

    // A rootfs below the shared directory.
    std::fs::rename(agent.rootfs(), source.join("c1/rootfs")).unwrap();
    let mut create = agent.create_request("c1", &["/bin/true"]);
    create.rootfs[0].source = "/run/cube/shared/c1/rootfs".into();
    agent.task.create(deadline(), &create).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 0);
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn info_tells_of_containers_and_streams_and_pids_and_stats_of_processes() {
    let agent = Agent::start().await;
    let pid = agent.create("c1", SLEEP).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    let info = agent.guest.info(deadline(), &InfoRequest::new()).await.unwrap();
    assert_eq!((info.containers, info.processes, info.timeline), (1, 1, agent.timeline));
    assert!(
        info.streams.iter().any(|stream| stream.container_id == "c1" && stream.stream == "stdout"),
        "{info:?}"
    );
    assert!(info.ring_budget_bytes >= 8 << 20 && info.agent_rss_bytes > 0);

    let request = PidsRequest { id: "c1".into(), ..Default::default() };
    let pids = agent.task.pids(deadline(), &request).await.unwrap().processes;
    assert_eq!(pids.iter().map(|process| process.pid).collect::<Vec<_>>(), [pid]);

    let request = StatsRequest { id: "c1".into(), ..Default::default() };
    let stats = agent.task.stats(deadline(), &request).await.unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&stats.value).unwrap();

    let request = CheckpointTaskRequest { id: "c1".into(), ..Default::default() };
    let (code, text) = refused(agent.task.checkpoint(deadline(), &request).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.starts_with("Checkpoint"), "{text}");
}

#[tokio::test]
async fn an_agent_that_is_told_to_ends_with_its_containers() {
    let mut agent = Agent::start().await;
    agent.create("c1", SLEEP).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    agent.create("c2", SLEEP).await.unwrap();
    assert!(agent.shut_down().await.success());
    assert_eq!(agent.leftovers(), [""; 0]);
}
