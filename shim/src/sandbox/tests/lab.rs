//! What the tests of the owner have around it.

use std::{fs, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::timeout};
use ttrpc::asynchronous::Server;

use crate::{
    config::{self, Config},
    errors::Error,
    events::{Publisher, tests as containerd},
    sandbox::{
        CreateRequest, Identity, KillRequest, ProcessId, Sandbox, Stdio,
        fakes::{FakeHost, Guest, PID},
    },
    state::RunDir,
};

/// Longer than anything takes that works.
pub(super) const LIMIT: Duration = Duration::from_secs(30);

/// A sandbox with a containerd, a host and a guest that are all fake.
pub(super) struct Lab {
    pub(super) dir: TempDir,
    pub(super) host: Arc<FakeHost>,
    pub(super) sandbox: Sandbox,
    pub(super) over: JoinHandle<()>,
    pub(super) run_dir: RunDir,
    pub(super) publisher: Publisher,
    pub(super) containerd: Arc<containerd::Containerd>,
    _server: Server,
}

impl Lab {
    pub(super) async fn new() -> Lab {
        Lab::with(Guest::new(), true).await
    }

    pub(super) async fn with(guest: Guest, boots: bool) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(FakeHost::new(guest, dir.path().join("vm.vsock"), boots));
        let socket = dir.path().join("events");
        let containerd = Arc::new(containerd::Containerd::default());
        let server = containerd::serve(containerd.clone(), &socket).await;
        let publisher = Publisher::new(socket.to_str().unwrap(), "default");
        let run_dir = RunDir::of(dir.path(), "/c", "default", "c1");
        let identity = Identity { namespace: "default".into(), id: "c1".into(), run_dir: run_dir.clone() };
        let snapshot = config::Snapshot { dir: dir.path().join("snapshots"), ..Default::default() };
        let log = config::Log {
            dir: dir.path().join("log"),
            template_dir: dir.path().join("templates"),
            ..Default::default()
        };
        let config = Config { snapshot, log, ..Default::default() };
        let (sandbox, over) = Sandbox::spawn(identity, config, host.clone(), publisher.clone());
        Lab { dir, host, sandbox, over, run_dir, publisher, containerd, _server: server }
    }

    pub(super) fn request(&self, id: &str, spec: Value) -> CreateRequest {
        let bundle = self.dir.path().join("bundles").join(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        CreateRequest { id: id.into(), bundle, rootfs: Vec::new(), stdio: Stdio::default(), restore: None }
    }

    pub(super) async fn create(&self, id: &str) -> Result<u32, Error> {
        self.sandbox.create(self.request(id, spec())).await
    }

    pub(super) async fn run(&self, id: &str) {
        assert_eq!(self.create(id).await.unwrap(), PID);
        assert_eq!(self.sandbox.start(init(id)).await.unwrap(), PID);
    }

    pub(super) async fn kill(&self, process: ProcessId, signal: u32) -> Result<(), Error> {
        within(self.sandbox.kill(KillRequest { process, signal, all: false })).await
    }

    pub(super) async fn wait(&self, process: ProcessId) -> u32 {
        within(self.sandbox.wait(process)).await.unwrap().status
    }

    /// Topics of all events so far, with the id that an exit names.
    pub(super) async fn events(&self) -> Vec<String> {
        assert!(self.publisher.flush(LIMIT).await);
        let seen = self.containerd.seen.lock().unwrap();
        seen.iter().map(|envelope| envelope.topic.trim_start_matches("/tasks/").to_owned()).collect()
    }

    pub(super) fn guest(&self) -> &Guest {
        &self.host.guest
    }
}

pub(super) fn spec() -> Value {
    json!({
        "hostname": "box",
        "annotations": {"cube.container.log_forwarding": "false"},
        "linux": {"namespaces": [{"type": "network"}, {"type": "pid"}]}
    })
}

pub(super) fn init(id: &str) -> ProcessId {
    ProcessId { container: id.into(), exec: String::new() }
}

pub(super) fn exec(id: &str, exec: &str) -> ProcessId {
    ProcessId { container: id.into(), exec: exec.into() }
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(LIMIT, future).await.expect("this takes too long")
}
