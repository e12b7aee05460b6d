//! A shim that is driven without containerd: with bundles that containerd would never write, and
//! with every event in the order in which it came.

pub mod exec;
mod fifos;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim_protos::{
    Client, TaskClient,
    api::{
        CloseIORequest, CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ForwardRequest, KillRequest,
        Mount, PauseRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest, StateResponse,
        WaitRequest,
    },
    shim::event::Envelope,
    shim_sync::{Events, create_events},
};
use protobuf::Message;
use serde_json::{Value, json};
use ttrpc::context::{self, Context};

use self::fifos::Fifos;
use crate::{
    command::{Finished, poll, start},
    guest::Guest,
    lab::{IMAGE, Lab},
    leftovers, paths,
};

/// One container, its bundle and its shim.
pub struct Direct<'lab> {
    lab: &'lab Lab,
    /// The container's id.
    pub id: String,
    /// The bundle directory: write `config.json` there before [`create`](Direct::create).
    pub bundle: PathBuf,
    /// What the shim gets on its standard input, as containerd sends runtime options.
    pub input: Vec<u8>,
    events: Arc<Recorder>,
    address: String,
    endpoint: ttrpc::Server,
    client: Option<TaskClient>,
    fifos: Fifos,
}

#[derive(Default)]
struct Recorder(Mutex<Vec<Envelope>>);

impl Events for Recorder {
    fn forward(&self, _: &ttrpc::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.lock().unwrap().push(request.envelope.unwrap());
        Ok(Empty::default())
    }
}

impl<'lab> Direct<'lab> {
    /// A bundle for `id` with a `config.json` that runs `argv`, and an endpoint for events.
    pub fn new(lab: &'lab Lab, id: &str, argv: &[&str]) -> Direct<'lab> {
        let base = lab.dir().join("direct");
        let bundle = base.join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let address = base.join("events.sock").display().to_string();
        let events = Arc::new(Recorder::default());
        let mut endpoint = ttrpc::Server::new()
            .bind(&format!("unix://{address}"))
            .unwrap()
            .register_service(create_events(events.clone()));
        endpoint.start().unwrap();
        lab.uses_sandbox(leftovers::key(&address, lab.namespace(), id));
        let direct = Direct {
            lab,
            id: id.into(),
            bundle,
            input: Vec::new(),
            events,
            address,
            endpoint,
            client: None,
            fifos: Fifos::default(),
        };
        direct.write_spec(&spec(argv));
        direct
    }

    /// The agent of its sandbox.
    pub fn guest(&self) -> Guest {
        let key = leftovers::key(&self.address, self.lab.namespace(), &self.id);
        Guest::at(self.lab.run_dir().join(key).join("vsock/vm.vsock"))
    }

    /// Replaces `config.json`.
    pub fn write_spec(&self, spec: &Value) {
        fs::write(self.bundle.join("config.json"), spec.to_string()).unwrap();
    }

    /// Key of the sandbox.
    pub fn key(&self) -> String {
        leftovers::key(&self.address, self.lab.namespace(), &self.id)
    }

    /// Runs the shim's `action` ("start", "delete") as containerd does.
    pub fn shim(&self, action: &str) -> Finished {
        let mut command = Command::new(paths::shim());
        command
            .args(["-namespace", self.lab.namespace(), "-id", &self.id, "-address"])
            .arg(self.lab.address());
        command
            .args(["-debug", "-publish-binary", "containerd"])
            .arg("-bundle")
            .arg(&self.bundle)
            .arg(action);
        command.current_dir(&self.bundle).env("TTRPC_ADDRESS", &self.address).env("MAX_SHIM_VERSION", "2");
        command.env("GRPC_ADDRESS", self.lab.address()).env("NAMESPACE", self.lab.namespace());
        let input = self.lab.dir().join("direct/input");
        fs::write(&input, &self.input).unwrap();
        command.env("CUBE_CONFIG", self.lab.config_file()).stdin(File::open(input).unwrap());
        start(&mut command).wait(Duration::from_secs(30))
    }

    /// Starts the shim and connects to it.
    pub fn start_shim(&mut self) {
        let reply = self.shim("start").succeeds();
        let address = reply.out();
        assert!(address.starts_with("unix://"), "the shim's address: {address:?}");
        assert_eq!(reply.err(), "", "more than the address would break it");
        let client = Client::connect(address.trim()).unwrap_or_else(|e| panic!("{address}: {e}"));
        self.client = Some(TaskClient::new(client));
    }

    /// The Task service of the shim.
    pub fn task(&self) -> &TaskClient {
        self.client.as_ref().expect("start_shim comes first")
    }

    /// Deadline of one call.
    pub fn context(&self) -> Context {
        context::with_timeout(self.lab.limit().as_nanos() as i64)
    }

    /// Creates the task with these mounts for its rootfs.
    pub fn create(&mut self, rootfs: Vec<Mount>) -> ttrpc::Result<u32> {
        let bundle = self.bundle.display().to_string();
        let [stdin, stdout, stderr] = self.fifos.paths.clone();
        let id = self.id.clone();
        let request = CreateTaskRequest { id, bundle, rootfs, stdin, stdout, stderr, ..Default::default() };
        let created = self.task().create(self.context(), &request);
        self.fifos.attached();
        Ok(created?.pid)
    }

    /// Makes FIFOs for stdout and stderr, and opens them for reading. `ctr` is no reader to compare
    /// with: 1.6 closes its ends as soon as it hears of the exit, and loses what is still in flight.
    pub fn read_fifos(&mut self) -> [File; 2] {
        [("stdout", 1), ("stderr", 2)].map(|(stream, n)| self.fifos.reader(n, &self.fifo(stream)))
    }

    /// Makes a FIFO for stdin, and opens it for writing.
    pub fn write_fifo(&mut self) -> File {
        let path = self.fifo("stdin");
        self.fifos.writer(&path)
    }

    /// Path of the FIFO of a stream of the init process.
    pub fn fifo(&self, stream: &str) -> PathBuf {
        self.bundle.with_file_name(format!("fifo.{stream}"))
    }

    /// No more will come to stdin, of the init process or of an exec.
    pub fn close_stdin(&self, exec: &str) -> ttrpc::Result<()> {
        let (id, exec_id) = (self.id.clone(), exec.to_owned());
        let request = CloseIORequest { id, exec_id, stdin: true, ..Default::default() };
        self.task().close_io(self.context(), &request).map(drop)
    }

    /// Run directory of the sandbox.
    pub fn run_dir(&self) -> PathBuf {
        self.lab.run_dir().join(leftovers::key(&self.address, self.lab.namespace(), &self.id))
    }

    /// The hybrid vsock socket of the sandbox.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("vsock/vm.vsock")
    }

    /// Starts the init process.
    pub fn start(&self) -> ttrpc::Result<u32> {
        let request = StartRequest { id: self.id.clone(), ..Default::default() };
        Ok(self.task().start(self.context(), &request)?.pid)
    }

    /// Waits for the init process and gives its exit status.
    pub fn wait(&self) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: self.id.clone(), ..Default::default() };
        Ok(self.task().wait(self.context(), &request)?.exit_status)
    }

    /// The state of the init process.
    pub fn state(&self) -> ttrpc::Result<StateResponse> {
        let request = StateRequest { id: self.id.clone(), ..Default::default() };
        self.task().state(self.context(), &request)
    }

    /// Signals the init process.
    pub fn kill(&self, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest { id: self.id.clone(), signal, ..Default::default() };
        self.task().kill(self.context(), &request).map(drop)
    }

    /// Pauses the sandbox.
    pub fn pause(&self) -> ttrpc::Result<()> {
        let request = PauseRequest { id: self.id.clone(), ..Default::default() };
        self.task().pause(self.context(), &request).map(drop)
    }

    /// Sets the paused sandbox going again.
    pub fn resume(&self) -> ttrpc::Result<()> {
        let request = ResumeRequest { id: self.id.clone(), ..Default::default() };
        self.task().resume(self.context(), &request).map(drop)
    }

    /// Deletes the task.
    pub fn delete(&self) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: self.id.clone(), ..Default::default() };
        self.task().delete(self.context(), &request)
    }

    /// Ends the shim, as containerd does after Delete, and removes the bundle.
    pub fn finish(mut self) {
        if self.client.is_some() {
            let request = ShutdownRequest { id: self.id.clone(), ..Default::default() };
            // The shim may close the connection before it has answered.
            self.task().shutdown(self.context(), &request).ok();
        }
        self.client = None;
        self.shim("delete").succeeds();
        self.endpoint.stop_listen();
        fs::remove_dir_all(self.bundle.parent().unwrap()).unwrap();
    }

    /// Topics of the events so far, in the order in which they came.
    pub fn topics(&self) -> Vec<String> {
        self.events.0.lock().unwrap().iter().map(|event| event.topic.clone()).collect()
    }

    /// All events with this topic so far.
    pub fn events<Event: Message>(&self, topic: &str) -> Vec<Event> {
        let events = self.events.0.lock().unwrap();
        let found = events.iter().filter(|event| event.topic == topic);
        found.map(|event| Event::parse_from_bytes(&event.event.value).unwrap()).collect()
    }

    /// Waits for an event with this topic and gives it.
    pub fn event<Event: Message>(&self, topic: &str) -> Event {
        let find = || self.events.0.lock().unwrap().iter().find(|e| e.topic == topic).cloned();
        assert!(poll(self.lab.limit(), || find().is_some()), "no {topic} among {:?}", self.topics());
        Event::parse_from_bytes(&find().unwrap().event.value).unwrap()
    }

    /// A copy of the image's root file system as a directory of this host.
    pub fn unpack_image(&self) -> PathBuf {
        let (mounted, copy) = (self.lab.dir().join("mounted"), self.lab.dir().join("direct/image"));
        fs::create_dir_all(&mounted).unwrap();
        let target = mounted.to_str().unwrap();
        self.lab.ctr(&["image", "mount", "--snapshotter", self.lab.snapshotter(), IMAGE, target]).succeeds();
        let mut copying = Command::new("cp");
        start(copying.arg("-a").arg(&mounted).arg(&copy)).wait(self.lab.limit()).succeeds();
        let unmount = ["image", "unmount", "--rm", "--snapshotter", self.lab.snapshotter(), target];
        self.lab.ctr(&unmount).succeeds();
        copy
    }
}

/// The rootfs as a directory of the host.
pub fn bind_mount(source: &Path) -> Vec<Mount> {
    let options = vec!["rbind".to_owned(), "rw".to_owned()];
    let source = source.display().to_string();
    vec![Mount { type_: "bind".into(), source, options, ..Default::default() }]
}

/// The rootfs as an ext4 file system in a file.
pub fn ext4_mount(source: &Path) -> Vec<Mount> {
    let source = source.display().to_string();
    vec![Mount { type_: "ext4".into(), source, options: vec!["rw".to_owned()], ..Default::default() }]
}

/// A `config.json` like that of `ctr run`, as far as it matters.
pub fn spec(argv: &[&str]) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"];
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": argv,
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        ],
        "linux": { "namespaces": namespaces },
    })
}
