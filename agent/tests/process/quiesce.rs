//! Quiesce and Thaw with real processes.

use std::{
    fs,
    os::fd::AsRawFd,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use containerd_shim_protos::{api::*, ttrpc::Code};
use cube_protocol::{
    frame::{Flags, Header, Kind},
    guest::*,
    stream::{ErrorCode, Stream},
};
use tokio::time::sleep;

use crate::{
    SLEEP,
    agent::{Agent, LIMIT, deadline},
    refused,
    streams::Host,
};

const ENTROPY: [u8; 32] = [7; 32];

/// Writes a byte to /tmp/count as often as it can.
const COUNT: &[&str] = &["/bin/sh", "-c", "while :; do echo -n x >>/tmp/count; done"];

impl Agent {
    pub(crate) async fn quiesce(&self, sync: bool) -> ttrpc::Result<QuiesceResponse> {
        let request = QuiesceRequest { sync, timeout_ms: 60_000, ..Default::default() };
        self.guest.quiesce(deadline(), &request).await
    }

    pub(crate) async fn quiesce_within(&self, limit: Duration) -> ttrpc::Result<QuiesceResponse> {
        let request = QuiesceRequest { timeout_ms: limit.as_millis() as u32, ..Default::default() };
        self.guest.quiesce(deadline(), &request).await
    }

    pub(crate) async fn thaw(&self) -> ttrpc::Result<ThawResponse> {
        self.guest.thaw(deadline(), &ThawRequest::new()).await
    }

    async fn is_quiesced(&self) -> bool {
        self.guest.info(deadline(), &InfoRequest::new()).await.unwrap().quiesced
    }

    pub(crate) async fn run(&self, id: &str, args: &[&str]) {
        self.create(id, args).await.unwrap();
        self.start_process(id, "").await.unwrap();
    }

    pub(crate) fn count(&self) -> u64 {
        fs::metadata(self.rootfs().join("tmp/count")).map_or(0, |file| file.len())
    }

    pub(crate) async fn counts_beyond(&self, before: u64) {
        until(async || self.count() > before).await;
    }
}

async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, holds).await.expect("this happens within a minute");
}

#[tokio::test]
async fn processes_and_execs_stand_still_until_they_are_thawed() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    agent.exec("c1", "e1", COUNT).await.unwrap();
    agent.start_process("c1", "e1").await.unwrap();
    for _ in 0..20 {
        agent.counts_beyond(agent.count()).await;
        let answer = agent.quiesce(false).await.unwrap();
        assert_eq!(answer.timeline, agent.timeline);
        assert!(agent.is_quiesced().await);
        let count = agent.count();
        sleep(Duration::from_millis(50)).await;
        assert_eq!(agent.count(), count);
        agent.quiesce(true).await.unwrap();
        agent.quiesce(false).await.unwrap();
        assert_eq!(agent.count(), count);
        agent.thaw().await.unwrap();
        assert!(!agent.is_quiesced().await);
    }
}

#[tokio::test]
async fn what_would_change_the_sandbox_is_refused_and_what_only_looks_is_answered() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    agent.exec("c1", "e1", SLEEP).await.unwrap();
    agent.run("c2", &["/bin/true"]).await;
    agent.exit("c2", "").await;
    agent.quiesce(false).await.unwrap();

    let exec =
        |exec_id: &str| StartRequest { id: "c1".into(), exec_id: exec_id.into(), ..Default::default() };
    let resize = ResizePtyRequest { id: "c1".into(), width: 80, height: 24, ..Default::default() };
    let resources = protobuf::well_known_types::any::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: b"{}".to_vec(),
        ..Default::default()
    };
    let update =
        UpdateTaskRequest { id: "c1".into(), resources: Some(resources).into(), ..Default::default() };
    let prepare = PrepareSandboxRequest::new();
    let (task, guest) = (&agent.task, &agent.guest);
    let calls = [
        ("Create", refused(agent.create("c3", SLEEP).await)),
        ("Start", refused(task.start(deadline(), &exec("e1")).await)),
        ("Exec", refused(agent.exec("c1", "e2", SLEEP).await)),
        ("Delete", refused(agent.delete("c2", "").await)),
        ("Kill", refused(agent.kill("c1", "", libc::SIGTERM).await)),
        ("ResizePty", refused(task.resize_pty(deadline(), &resize).await)),
        ("Update", refused(task.update(deadline(), &update).await)),
        ("PrepareSandbox", refused(guest.prepare_sandbox(deadline(), &prepare).await)),
    ];
    for (call, (code, text)) in calls {
        assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
        assert_eq!(text, format!("the sandbox is quiesced: {call} has to wait until it is thawed"));
    }

    assert_eq!(agent.status("c1", "").await.unwrap(), Status::RUNNING);
    let pids = PidsRequest { id: "c1".into(), ..Default::default() };
    assert_eq!(task.pids(deadline(), &pids).await.unwrap().processes.len(), 1);
    let stats = StatsRequest { id: "c1".into(), ..Default::default() };
    task.stats(deadline(), &stats).await.unwrap();
    let hello =
        HelloRequest { protocol: Some(cube_protocol::version::CURRENT.into()).into(), ..Default::default() };
    assert!(guest.hello(deadline(), &hello).await.unwrap().quiesced);
    assert_eq!(agent.exit("c2", "").await.exit_status, 0);

    agent.thaw().await.unwrap();
    agent.delete("c2", "").await.unwrap();
    agent.start_process("c1", "e1").await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_under_way_is_awaited_or_was_refused() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    for round in 0..20 {
        let exec = round.to_string();
        agent.exec("c1", &exec, &["/bin/sh", "-c", "echo started; sleep 1000"]).await.unwrap();
        let (started, quiesced) = tokio::join!(agent.start_process("c1", &exec), agent.quiesce(false));
        quiesced.unwrap();
        let status = agent.status("c1", &exec).await.unwrap();
        match started {
            Ok(_) => assert_eq!(status, Status::RUNNING),
            Err(error) => {
                assert_eq!(refused::<u32>(Err(error)).0, Code::FAILED_PRECONDITION);
                assert_eq!(status, Status::CREATED);
            }
        }
        agent.thaw().await.unwrap();
    }
}

#[tokio::test]
async fn a_poll_for_events_does_not_outlast_the_quiesce() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    let poll = tokio::spawn({
        let guest = agent.guest.clone();
        let request = EventsRequest { timeout_ms: 30_000, ..Default::default() };
        async move { guest.events(deadline(), &request).await }
    });
    // It has come when a call that was made after it is answered.
    agent.is_quiesced().await;
    agent.quiesce(false).await.unwrap();
    assert!(poll.await.unwrap().unwrap().events.is_empty());
    agent.thaw().await.unwrap();
}

#[tokio::test]
async fn sigkill_reaches_a_frozen_process_and_a_quiesced_agent_can_be_shut_down() {
    let mut agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    agent.run("c2", SLEEP).await;
    agent.run("c3", COUNT).await;
    let last = agent.quiesce(false).await.unwrap().last_event;
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 137);
    let all = KillRequest { id: "c2".into(), signal: 9, all: true, ..Default::default() };
    agent.task.kill(deadline(), &all).await.unwrap();
    assert_eq!(agent.exit("c2", "").await.exit_status, 137);
    assert_eq!(agent.quiesce(false).await.unwrap().last_event, last + 2);
    assert!(agent.shut_down().await.success());
    assert_eq!(agent.leftovers(), [""; 0]);
}

/// A file system whose server never answers: who looks into it waits where only SIGKILL reaches him.
struct Hang {
    directory: tempfile::TempDir,
    _server: fs::File,
}

impl Hang {
    fn mount() -> Hang {
        let directory = tempfile::tempdir().unwrap();
        let server = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("hang"), directory.path(), Some("fuse"), flags, Some(data.as_str())).unwrap();
        Hang { directory, _server: server }
    }

    /// A process that looks into it, in the cgroup `cgroup`.
    fn victim(&self, cgroup: &Path) -> Victim {
        let script = format!("echo $$ >{}/cgroup.procs; exec cat {}/file", cgroup.display(), self.path());
        let child = Command::new("/bin/sh").args(["-c", &script]).stderr(Stdio::null()).spawn().unwrap();
        Victim(child)
    }

    fn path(&self) -> String {
        self.directory.path().display().to_string()
    }
}

impl Drop for Hang {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.directory.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

struct Victim(Child);

impl Victim {
    fn waits_in_the_kernel(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        stat.contains("(cat) D")
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_process_that_cannot_be_frozen_is_an_error_that_names_its_container_and_all_run_on() {
    let agent = Agent::start().await;
    agent.run("c1", COUNT).await;
    agent.run("c2", SLEEP).await;
    let hang = Hang::mount();
    let victim = hang.victim(&agent.cgroup.join("c2/init"));
    until(async || victim.waits_in_the_kernel()).await;

    let request = QuiesceRequest { timeout_ms: 300, ..Default::default() };
    let (code, text) = refused(agent.guest.quiesce(deadline(), &request).await);
    assert_eq!(code, Code::DEADLINE_EXCEEDED, "{text}");
    assert!(text.starts_with("container \"c2\" cannot be frozen within"), "{text}");
    assert!(!agent.is_quiesced().await);
    agent.counts_beyond(agent.count()).await;
    agent.create("c3", SLEEP).await.unwrap();

    drop(victim);
    agent.quiesce(false).await.unwrap();
}

#[tokio::test]
async fn a_time_limit_that_makes_no_sense_is_refused() {
    let agent = Agent::start().await;
    for timeout_ms in [0, 60_001] {
        let request = QuiesceRequest { timeout_ms, ..Default::default() };
        let (code, text) = refused(agent.guest.quiesce(deadline(), &request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    }
    assert!(!agent.is_quiesced().await);
}

#[tokio::test]
async fn output_is_exact_across_pauses_at_full_speed() {
    const LINES: usize = 200_000;
    let agent = Agent::start().await;
    let script = format!("i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo $i; done");
    agent.run("c1", &["/bin/sh", "-c", &script]).await;
    let (mut output, mut attempt, mut pauses) = (Vec::new(), 0, 0);
    'relay: loop {
        attempt += 1;
        let mut host = Host::open(&agent, "c1", Stream::STDOUT, attempt, output.len() as u64).await;
        for _ in 0..10 {
            let frame = host.receive().await.expect("EOF comes before the end");
            match frame.header.kind {
                Kind::Data => {
                    output.extend_from_slice(&frame.body);
                    host.acknowledge(output.len() as u64, Flags::NONE).await;
                }
                Kind::Eof => break 'relay,
                kind => panic!("{kind:?}"),
            }
        }
        agent.quiesce(false).await.unwrap();
        host.send(Header::new(Kind::Stop, 0)).await;
        let mut taken = Vec::new();
        loop {
            let frame = host.receive().await.expect("STOPPED comes before the end");
            match frame.header.kind {
                Kind::Data => taken.extend_from_slice(&frame.body),
                Kind::Stopped => break,
                kind => assert_eq!(kind, Kind::Eof),
            }
        }
        // A sink that takes half without waiting.
        output.extend_from_slice(&taken[..taken.len() / 2]);
        host.acknowledge(output.len() as u64, Flags::LAST).await;
        assert!(host.receive().await.is_none());
        let streams = agent.quiesce(true).await.unwrap().streams;
        let stdout = streams.iter().find(|stream| stream.stream == "stdout").unwrap();
        assert_eq!((stdout.acked_offset, stdout.attempt), (output.len() as u64, attempt));
        assert!(stdout.end_offset >= stdout.acked_offset && stdout.epoch != 0);
        agent.thaw().await.unwrap();
        pauses += 1;
    }
    let expected: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    assert!(output == expected.as_bytes(), "{} of {} bytes", output.len(), expected.len());
    assert!(pauses > 3, "{pauses}");
}

#[tokio::test]
async fn the_time_of_a_process_that_keeps_the_pipe_stands_still() {
    let agent = Agent::start().await;
    // The survivor is an orphan in the container, whose pid namespace lives on with its init process.
    agent.run("c1", SLEEP).await;
    agent.exec("c1", "e1", &["/bin/sh", "-c", "sleep 1000 & echo main"]).await.unwrap();
    agent.start_process("c1", "e1").await.unwrap();
    agent.exit("c1", "e1").await;
    agent.quiesce(false).await.unwrap();
    sleep(Duration::from_millis(2500)).await;
    let mut host = Host::open_exec(&agent, "c1", "e1", Stream::STDOUT, 1, 0).await;
    assert_eq!(host.receive().await.unwrap().body, &b"main\n"[..]);
    host.send(Header::new(Kind::Stop, 0)).await;
    assert_eq!(host.receive().await.unwrap().header, Header::new(Kind::Stopped, 5), "no EOF before it");
    agent.thaw().await.unwrap();
    let mut host = Host::open_exec(&agent, "c1", "e1", Stream::STDOUT, 2, 5).await;
    let eof = host.receive().await.unwrap().header;
    assert_eq!(eof, Header::new(Kind::Eof, 5).with_flags(Flags::TRUNCATED));
}

#[tokio::test]
async fn a_thaw_may_be_repeated_and_begins_a_timeline_only_at_rest() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    let (old, new) = (agent.timeline, agent.timeline ^ 1);
    let clone = ThawRequest { timeline: new, entropy: ENTROPY.to_vec(), ..Default::default() };
    assert_eq!(agent.thaw().await.unwrap().timeline, old);
    let (code, text) = refused(agent.guest.thaw(deadline(), &clone).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");

    let mut host = Host::open(&agent, "c1", Stream::STDOUT, 1, 0).await;
    agent.quiesce(false).await.unwrap();
    let polled = agent.guest.clone();
    let poll = tokio::spawn(async move {
        let request = EventsRequest { timeout_ms: 30_000, timeline: old, ..Default::default() };
        polled.events(deadline(), &request).await
    });
    let weak = ThawRequest { entropy: vec![1; 31], ..clone.clone() };
    assert_eq!(refused(agent.guest.thaw(deadline(), &weak).await).0, Code::INVALID_ARGUMENT);
    assert!(agent.is_quiesced().await);
    for _ in 0..2 {
        assert_eq!(agent.guest.thaw(deadline(), &clone).await.unwrap().timeline, new);
    }
    assert_eq!(host.error().await, ErrorCode::OTHER_TIMELINE);

    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.exit("c1", "").await.exit_status, 137);
    assert_eq!(refused(poll.await.unwrap()).0, Code::FAILED_PRECONDITION, "the cursor is another run's");
    let stale = EventsRequest { timeline: old, ..Default::default() };
    assert_eq!(refused(agent.guest.events(deadline(), &stale).await).0, Code::FAILED_PRECONDITION);
    let current = EventsRequest { timeline: new, ..Default::default() };
    assert_eq!(agent.guest.events(deadline(), &current).await.unwrap().events.len(), 1);
}

#[tokio::test]
async fn a_clone_wakes_up_with_its_own_name_network_and_environment_and_the_host_s_clock_is_left_alone() {
    let agent = Agent::start().await;
    let prepare = PrepareSandboxRequest { hostname: "template".into(), ..Default::default() };
    agent.guest.prepare_sandbox(deadline(), &prepare).await.unwrap();
    agent.run("c1", SLEEP).await;
    let mac = agent.add_interface(&["10.7.0.2/24", "10.7.0.3/24"]);
    agent.quiesce(false).await.unwrap();
    let interface = Interface {
        name: "eth0".into(),
        mac,
        addresses: vec!["10.8.0.2/24".into()],
        mtu: 1400,
        ..Default::default()
    };
    let route = Route { gateway: "10.8.0.1".into(), ..Default::default() };
    let request = ThawRequest {
        realtime_ns: 1_000_000_000,
        entropy: ENTROPY.to_vec(),
        hostname: "clone".into(),
        interfaces: vec![interface],
        routes: vec![route],
        environment: vec!["TOKEN=t1".into(), "PATH=/nowhere".into()],
        ..Default::default()
    };
    let mut bad = request.clone();
    bad.interfaces[0].mac = "02:ff:ff:ff:ff:ff".into();
    assert_eq!(refused(agent.guest.thaw(deadline(), &bad).await).0, Code::NOT_FOUND);
    assert!(agent.is_quiesced().await, "a thaw that failed may be repeated");
    agent.guest.thaw(deadline(), &request).await.unwrap();

    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(now.as_secs() > 1_000_000_000, "the clock is the host's");
    agent.exec("c1", "e1", &["/bin/sh", "-c", "busybox hostname; echo $TOKEN $PATH"]).await.unwrap();
    agent.start_process("c1", "e1").await.unwrap();
    let output = Host::open_exec(&agent, "c1", "e1", Stream::STDOUT, 1, 0).await.drain().await;
    assert_eq!(String::from_utf8(output).unwrap(), "clone\nt1 /bin\n");
    let addresses = agent.in_network(&["ip", "-4", "-o", "address", "show", "eth0"]);
    assert!(addresses.contains("10.8.0.2/24") && !addresses.contains("10.7.0"), "{addresses}");
    let routes = agent.in_network(&["ip", "-4", "route"]);
    assert!(routes.contains("default via 10.8.0.1") && !routes.contains("10.7.0"), "{routes}");
}
