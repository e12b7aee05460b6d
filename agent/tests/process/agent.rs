//! An agent in process mode, as the `process` backend starts it, and clients for it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use containerd_shim_protos::{api::*, shim_async::TaskClient};
use cube_protocol::{guest::*, guest_ttrpc::GuestClient, hybrid, ports, version};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{net::UnixStream, time::sleep};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};

/// Generous: for the slowest machine that tests run on.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Ended, with everything that it made, when dropped.
pub(crate) struct Agent {
    process: Child,
    pub(crate) cgroup: PathBuf,
    /// Holds `agent.sock`, `state/` and whatever a test puts there.
    pub(crate) directory: tempfile::TempDir,
    pub(crate) guest: GuestClient,
    pub(crate) task: TaskClient,
    pub(crate) timeline: u64,
}

impl Agent {
    /// Starts an agent and says hello.
    pub(crate) async fn start() -> Agent {
        Agent::start_by(&["env"]).await
    }

    /// The same, by a command that executes what its last arguments say.
    pub(crate) async fn start_by(command: &[&str]) -> Agent {
        Agent::start_program(env!("CARGO_BIN_EXE_cube-agent").as_ref(), command).await
    }

    /// The same, of another file.
    pub(crate) async fn start_program(program: &Path, command: &[&str]) -> Agent {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = cgroup2().join(format!("cube-test-{}", directory.path().file_name().unwrap().display()));
        fs::create_dir(&cgroup).unwrap();
        let process = Command::new(command[0])
            .args(&command[1..])
            .args(["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "unchanged"])
            .args(["--uts", "--ipc", "--net", "--cgroup"])
            // As a shim that has 1024 open files would start it.
            .args(["prlimit", "--nofile=1024:"])
            .arg(program)
            .args(["process", "--listen"])
            .arg(directory.path().join("agent.sock"))
            .arg("--cgroup")
            .arg(&cgroup)
            .arg("--state")
            .arg(directory.path().join("state"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let client = Client::new(Socket::new(connect(directory.path(), ports::CONTROL).await));
        let guest = GuestClient::new(client.clone());
        let hello = HelloRequest { protocol: Some(version::CURRENT.into()).into(), ..Default::default() };
        let timeline = guest.hello(deadline(), &hello).await.unwrap().timeline;
        Agent { process, cgroup, directory, guest, task: TaskClient::new(client), timeline }
    }

    /// A connection to the stream port.
    pub(crate) async fn stream(&self) -> UnixStream {
        connect(self.directory.path(), ports::STREAM).await
    }

    /// A root file system with a static busybox.
    pub(crate) fn rootfs(&self) -> PathBuf {
        let rootfs = self.directory.path().join("rootfs");
        if rootfs.exists() {
            return rootfs;
        }
        for directory in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
        for applet in ["sh", "sleep", "cat", "true"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        rootfs
    }

    /// Creates container `id` that runs `args`, with stdout.
    pub(crate) async fn create(&self, id: &str, args: &[&str]) -> ttrpc::Result<u32> {
        let request = self.create_request(id, args);
        self.task.create(deadline(), &request).await.map(|response| response.pid)
    }

    pub(crate) fn create_request(&self, id: &str, args: &[&str]) -> CreateTaskRequest {
        let options = CreateOptions { spec: spec(args).to_string().into_bytes(), ..Default::default() };
        let rootfs = containerd_shim_protos::api::Mount {
            type_: "bind".into(),
            source: self.rootfs().to_str().unwrap().into(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        };
        CreateTaskRequest {
            id: id.into(),
            rootfs: vec![rootfs],
            stdout: "stream".into(),
            options: any("cube.agent.v1.CreateOptions", options.write_to_bytes().unwrap()),
            ..Default::default()
        }
    }

    /// Registers an exec that runs `args`, with stdout.
    pub(crate) async fn exec(&self, id: &str, exec_id: &str, args: &[&str]) -> ttrpc::Result<Empty> {
        self.exec_with(id, exec_id, args, [false, true, false]).await
    }

    /// Registers an exec that runs `args`, with those of stdin, stdout and stderr that are `wanted`.
    pub(crate) async fn exec_with(
        &self,
        id: &str,
        exec_id: &str,
        args: &[&str],
        wanted: [bool; 3],
    ) -> ttrpc::Result<Empty> {
        let [stdin, stdout, stderr] =
            wanted.map(|wanted| if wanted { "stream".to_owned() } else { String::new() });
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin,
            stdout,
            stderr,
            spec: any(
                "types.containerd.io/opencontainers/runtime-spec/1/Process",
                process(args).to_string().into_bytes(),
            ),
            ..Default::default()
        };
        self.task.exec(deadline(), &request).await
    }

    pub(crate) async fn start_process(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.start(deadline(), &request).await.map(|response| response.pid)
    }

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<Empty> {
        let signal = signal as u32;
        let request = KillRequest { id: id.into(), exec_id: exec_id.into(), signal, ..Default::default() };
        self.task.kill(deadline(), &request).await
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.delete(deadline(), &request).await
    }

    pub(crate) async fn status(&self, id: &str, exec_id: &str) -> ttrpc::Result<Status> {
        let request = StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.state(deadline(), &request).await.map(|response| response.status())
    }

    /// The exit of a process, from the events. Waits for it.
    pub(crate) async fn exit(&self, id: &str, exec_id: &str) -> TaskExit {
        let mut after = 0;
        loop {
            let request = EventsRequest { after, timeout_ms: 30_000, ..Default::default() };
            let events = self.guest.events(deadline(), &request).await.unwrap().events;
            assert!(!events.is_empty(), "no exit of {id} {exec_id:?}");
            for event in events {
                after = event.sequence;
                match event.kind {
                    Some(event::Kind::Exit(exit)) if exit.container_id == id && exit.exec_id == exec_id => {
                        return exit;
                    }
                    _ => {}
                }
            }
        }
    }

    /// What a container leaves behind: its directory and its cgroup, by name.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let directories = |path: &Path| {
            let entries = fs::read_dir(path).unwrap().map(Result::unwrap);
            let directories = entries.filter(|entry| entry.file_type().unwrap().is_dir());
            directories.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
        };
        [directories(&self.directory.path().join("state")), directories(&self.cgroup)].concat()
    }

    /// Gives the agent's network a device with `addresses`; its MAC address.
    pub(crate) fn add_interface(&self, addresses: &[&str]) -> String {
        self.in_network(&["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "peer0"]);
        for address in addresses {
            self.in_network(&["ip", "address", "add", address, "dev", "veth0"]);
        }
        for device in ["veth0", "peer0"] {
            self.in_network(&["ip", "link", "set", device, "up"]);
        }
        let link = self.in_network(&["ip", "-o", "link", "show", "veth0"]);
        link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
    }

    /// The output of a command in the agent's network namespace.
    pub(crate) fn in_network(&self, command: &[&str]) -> String {
        let network = format!("--net=/proc/{}/ns/net", self.pid());
        let output = Command::new("nsenter").arg(network).args(command).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Its pid on the host.
    pub(crate) fn pid(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.parent());
        fs::read_to_string(children).unwrap().trim().parse().unwrap()
    }

    /// That of unshare(1), which has started it.
    pub(crate) fn parent(&self) -> u32 {
        self.process.id()
    }

    /// Ends the agent as the shim does.
    pub(crate) async fn shut_down(&mut self) -> ExitStatus {
        self.task.shutdown(deadline(), &ShutdownRequest::new()).await.unwrap();
        let ended = async {
            loop {
                match self.process.try_wait().unwrap() {
                    Some(status) => return status,
                    None => sleep(Duration::from_millis(5)).await,
                }
            }
        };
        tokio::time::timeout(LIMIT, ended).await.expect("the agent ends")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // unshare takes the agent along, and that the pid namespace.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        remove_cgroup(&self.cgroup);
    }
}

/// Killed processes leave their cgroup a little later.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let started = std::time::Instant::now();
    while fs::remove_dir(path).is_err() && path.exists() && started.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn cgroup2() -> PathBuf {
    // Other tests may mount on paths that are not UTF-8.
    let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
    let mount =
        mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[2] == "cgroup2");
    mount.expect("cgroup2 is mounted")[1].into()
}

async fn connect(directory: &Path, port: u32) -> UnixStream {
    let path = directory.join("agent.sock");
    let connected = async {
        loop {
            if let Ok(mut stream) = UnixStream::connect(&path).await {
                hybrid::connect(&mut stream, port).await.unwrap();
                return stream;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, connected).await.expect("the agent listens")
}

pub(crate) fn deadline() -> Context {
    context::with_timeout(LIMIT.as_nanos() as i64)
}

fn any(type_url: &str, value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any { type_url: type_url.into(), value, ..Default::default() })
}

fn process(args: &[&str]) -> serde_json::Value {
    serde_json::json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    })
}

fn spec(args: &[&str]) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.1.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "cgroup"},
        ]},
    })
}
