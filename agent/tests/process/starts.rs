//! Processes that do not come as far as to run their program, for the container's own files hold them up.

use std::{
    fs,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
    time::Duration,
};

use containerd_shim_protos::{api::*, ttrpc::Code};
use cube_protocol::{guest::CreateOptions, stream::Stream};
use nix::sys::stat::Mode;
use protobuf::Message;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    SLEEP,
    agent::{Agent, LIMIT},
    refused,
    streams::Host,
};

/// An exec that waits for a file is not slow, nor is one on a busy machine; longer than this it never was to
/// take.
const START_LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_fifo_in_the_place_of_passwd_holds_up_neither_an_exec_nor_a_pause() {
    let agent = Agent::start().await;
    agent.run("c1", SLEEP).await;
    let passwd = agent.rootfs().join("etc/passwd");
    nix::unistd::mkfifo(&passwd, Mode::S_IRWXU).unwrap();
    agent.exec("c1", "e1", &["/bin/sh", "-c", "echo home is $HOME"]).await.unwrap();
    let started = timeout(START_LIMIT / 2, agent.start_process("c1", "e1")).await;
    started.expect("the FIFO is not waited for").unwrap();
    let mut host = Host::open_exec(&agent, "c1", "e1", Stream::STDOUT, 1, 0).await;
    assert_eq!(host.drain().await, b"home is /\n");
    agent.quiesce(false).await.unwrap();
    agent.thaw().await.unwrap();
}

/// A container with a FUSE file system on /fuse that never answers, and with /proc.
async fn with_dead_file_system(agent: &Agent) {
    fs::create_dir(agent.rootfs().join("fuse")).unwrap();
    std::os::unix::fs::symlink("busybox", agent.rootfs().join("bin/mount")).unwrap();
    let script = "exec 3<>/dev/fuse
        mount -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none /fuse && : > /mounted && exec sleep 1000";
    let mut request = agent.create_request("c1", &["/bin/sh", "-c", script]);
    let options = request.options.as_mut().unwrap();
    let mut create = CreateOptions::parse_from_bytes(&options.value).unwrap();
    let mut spec: serde_json::Value = serde_json::from_slice(&create.spec).unwrap();
    let all = serde_json::json!(["CAP_SYS_ADMIN"]);
    spec["process"]["capabilities"] =
        serde_json::json!({"bounding": all, "effective": all, "permitted": all});
    spec["linux"]["devices"] =
        serde_json::json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    spec["linux"]["resources"] = serde_json::json!({"devices": [{"allow": true, "access": "rwm"}]});
    create.spec = spec.to_string().into_bytes();
    options.value = create.write_to_bytes().unwrap();
    agent.task.create(crate::deadline(), &request).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    until_exists(&agent.rootfs().join("mounted")).await;
}

async fn until_exists(path: &Path) {
    let exists = async {
        while !path.exists() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, exists).await.unwrap_or_else(|_| panic!("no {}", path.display()));
}

#[tokio::test]
async fn an_exec_that_hangs_in_a_file_system_of_the_container_ends_with_a_kill_a_pause_or_its_time() {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: this kernel has no /dev/fuse");
        return;
    }
    let agent = Agent::start().await;
    with_dead_file_system(&agent).await;
    for exec in ["killed", "at-a-quiesce", "at-a-pause", "too-slow"] {
        agent.exec("c1", exec, &["/fuse/program"]).await.unwrap();
    }

    let killed = async {
        // Until it has begun, there is nothing to kill.
        while let Err(error) = agent.kill("c1", "killed", libc::SIGKILL).await {
            assert_eq!(refused::<Empty>(Err(error)).0, Code::FAILED_PRECONDITION);
            sleep(Duration::from_millis(5)).await;
        }
    };
    let (started, ()) = tokio::join!(agent.start_process("c1", "killed"), killed);
    let (code, text) = refused(started);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    assert!(text.contains("was given up, for it was killed"), "{text}");
    agent.delete("c1", "killed").await.unwrap();

    // In a sandbox that hangs, these two end with an error of their own limit.
    let quiesced = async {
        sleep(Duration::from_millis(100)).await;
        agent.quiesce_within(Duration::from_secs(5)).await.unwrap();
        agent.thaw().await.unwrap();
    };
    let (started, ()) = tokio::join!(agent.start_process("c1", "at-a-quiesce"), quiesced);
    assert!(refused(started).1.contains("has to come to rest"));
    let paused = async {
        sleep(Duration::from_millis(100)).await;
        let request = PauseRequest { id: "c1".into(), ..Default::default() };
        agent.task.pause(crate::deadline(), &request).await.unwrap();
        let request = ResumeRequest { id: "c1".into(), ..Default::default() };
        agent.task.resume(crate::deadline(), &request).await.unwrap();
    };
    let (started, ()) = tokio::join!(agent.start_process("c1", "at-a-pause"), paused);
    assert!(refused(started).1.contains("has to come to rest"));

    let began = Instant::now();
    let (code, text) = refused(agent.start_process("c1", "too-slow").await);
    assert_eq!(code, Code::DEADLINE_EXCEEDED, "{text}");
    assert!(began.elapsed() >= START_LIMIT && text.contains("longer than 20s"), "{text}");

    // The container is none the worse for it.
    agent.exec("c1", "fine", &["/bin/true"]).await.unwrap();
    agent.start_process("c1", "fine").await.unwrap();
    assert_eq!(agent.exit("c1", "fine").await.exit_status, 0);
    agent.kill("c1", "", libc::SIGKILL).await.unwrap();
    agent.exit("c1", "").await;
    agent.delete("c1", "").await.unwrap();
    assert_eq!(agent.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_start_ends_with_its_container() {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: this kernel has no /dev/fuse");
        return;
    }
    let agent = Agent::start().await;
    with_dead_file_system(&agent).await;
    agent.exec("c1", "e1", &["/fuse/program"]).await.unwrap();
    let ended = async {
        sleep(Duration::from_millis(100)).await;
        agent.kill("c1", "", libc::SIGKILL).await.unwrap();
        agent.exit("c1", "").await;
    };
    let began = Instant::now();
    let (started, ()) = tokio::join!(agent.start_process("c1", "e1"), ended);
    match started {
        // Killed on its way into the program, which nobody can tell from killed right after.
        Ok(_) => assert_eq!(agent.exit("c1", "e1").await.exit_status, 128 + libc::SIGKILL as u32),
        started => drop(refused(started)),
    }
    agent.delete("c1", "").await.unwrap();
    assert!(began.elapsed() < START_LIMIT);
    assert_eq!(agent.leftovers(), [""; 0]);
}

#[tokio::test]
async fn an_exec_that_ends_its_container_was_started() {
    let agent = Agent::start().await;
    for round in 0..300 {
        let stop = agent.rootfs().join("stop");
        agent.run("c1", &["/bin/sh", "-c", "until [ -e /stop ]; do :; done"]).await;
        agent.exec("c1", "e1", &["/bin/sh", "-c", ": > /stop"]).await.unwrap();
        let started = agent.start_process("c1", "e1").await;
        assert!(started.is_ok(), "round {round}: {started:?}");
        assert_eq!(agent.exit("c1", "").await.exit_status, 0);
        agent.exit("c1", "e1").await;
        agent.delete("c1", "").await.unwrap();
        fs::remove_file(stop).unwrap();
    }
}

/// CVE-2019-5736 and its like: the file must stay out of reach when no agent runs any more, too.
#[tokio::test]
async fn the_agents_binary_cannot_be_written_to_by_who_finds_it() {
    // A binary of its own, which nobody executes any more once this agent has ended.
    let directory = tempfile::tempdir().unwrap();
    let binary = directory.path().join("cube-agent");
    fs::copy(env!("CARGO_BIN_EXE_cube-agent"), &binary).unwrap();
    let agent = Agent::start_program(&binary, &["env"]).await;
    let pid = agent.create("c1", SLEEP).await.unwrap();
    agent.start_process("c1", "").await.unwrap();
    // A stage that stands in front of its execve, in sight of a process that may trace it.
    let mut request = agent.create_request("c2", SLEEP);
    join_pid_namespace(&mut request, pid);
    let waiting = agent.task.create(crate::deadline(), &request).await.unwrap().pid;
    let found = fs::File::open(format!("/proc/{}/root/proc/{waiting}/exe", agent.pid())).unwrap();
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());

    // What calls itself its own interpreter runs the agent, which does nothing for it.
    fs::write(agent.rootfs().join("bin/itself"), "#!/proc/self/exe\n").unwrap();
    std::os::unix::fs::chown(agent.rootfs().join("bin/itself"), Some(0), Some(0)).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(agent.rootfs().join("bin/itself"), mode).unwrap();
    agent.exec("c1", "e1", &["/bin/itself"]).await.unwrap();
    match agent.start_process("c1", "e1").await {
        Ok(_) => assert_eq!(agent.exit("c1", "e1").await.exit_status, 2),
        // A binary for tests needs libraries, which this container does not have.
        started => assert_eq!(refused(started).0, Code::NOT_FOUND),
    }

    drop(agent);
    assert_eq!(found.metadata().unwrap().ino(), fs::metadata(&binary).unwrap().ino());
    let error = fs::File::options().append(true).open(&again).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    fs::File::options().append(true).open(&binary).expect("nobody executes it");
}

fn join_pid_namespace(request: &mut CreateTaskRequest, pid: u32) {
    let options = request.options.as_mut().unwrap();
    let mut create = CreateOptions::parse_from_bytes(&options.value).unwrap();
    let mut spec: serde_json::Value = serde_json::from_slice(&create.spec).unwrap();
    spec["linux"]["namespaces"][0]["path"] = format!("/proc/{pid}/ns/pid").into();
    create.spec = spec.to_string().into_bytes();
    options.value = create.write_to_bytes().unwrap();
}

/// Nobody but root, in no namespace of a container, has anything to look for in it.
#[tokio::test]
async fn the_agent_is_not_dumpable() {
    // Both without it: the one may not have more than the other.
    const WITHOUT_PTRACE: [&str; 3] = ["setpriv", "--inh-caps=-all", "--bounding-set=-sys_ptrace"];
    let agent = Agent::start_by(&WITHOUT_PTRACE).await;
    let readable = |pid: u32| {
        let [program, arguments @ ..] = WITHOUT_PTRACE;
        let mut command = std::process::Command::new(program);
        command.args(arguments).arg("readlink").arg(format!("/proc/{pid}/exe"));
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.status().unwrap().success()
    };
    assert!(readable(agent.parent()), "unshare is dumpable");
    assert!(!readable(agent.pid()));
}
