//! A VM and its agent, without shim, containerd or log: what the VMM backends do by themselves.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::api::{CreateTaskRequest, Mount, StartRequest};
use cube_protocol::guest::{CreateOptions, HelloResponse, QuiesceRequest, ThawRequest};
use cube_shim::{
    agent::{Agent, Link},
    cgroup::SandboxCgroup,
    config::{Config, Guest},
    vmm::{self, Disk, VmSpec, Vmm, VmmError},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::{
    command::{poll, start},
    direct,
    needs::Backend,
    paths,
};

/// What a nested or emulated VM may take for anything.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Files of some machines: disks, snapshots, run directories.
pub struct Bench {
    backend: Backend,
    dir: tempfile::TempDir,
    runtime: Runtime,
}

/// A VM. Dropping it kills it and removes its cgroup.
pub struct Machine<'bench> {
    bench: &'bench Bench,
    name: String,
    cgroup: SandboxCgroup,
    /// As the shim would have it.
    pub vmm: Box<dyn Vmm>,
    guest: Option<(Agent, Link)>,
}

impl Bench {
    /// Short paths, for sockets are in them.
    pub fn new(backend: Backend) -> Bench {
        let dir = tempfile::Builder::new().prefix("cube.").tempdir_in("/tmp").unwrap();
        // The VMM's output and its end are looked after while a test does something else.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Bench { backend, dir, runtime: runtime.unwrap() }
    }

    /// Where a file of this bench is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An empty directory for a snapshot.
    pub fn snapshot_dir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        DirBuilder::new().mode(0o700).create(&dir).unwrap();
        dir
    }

    /// A disk with the tests' image on it.
    pub fn rootfs(&self, serial: &str) -> Disk {
        let (layout, tree) = (self.path("layout"), self.path("tree"));
        fs::create_dir_all(&layout).unwrap();
        fs::create_dir_all(&tree).unwrap();
        run(Command::new("tar").arg("-xf").arg(paths::image()).arg("-C").arg(&layout));
        let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|blob| blob.unwrap());
        let layer = blobs.max_by_key(|blob| blob.metadata().unwrap().len()).unwrap().path();
        run(Command::new("tar").arg("-xf").arg(layer).arg("-C").arg(&tree));
        let disk = self.empty(serial);
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&disk.path).arg("32M"));
        disk
    }

    /// A disk with nothing on it.
    pub fn empty(&self, serial: &str) -> Disk {
        let disk = Disk { path: self.path(serial), serial: serial.into(), read_only: false };
        File::create_new(&disk.path).unwrap().set_len(8 << 20).unwrap();
        disk
    }

    /// A copy of a disk under the same serial, for a clone.
    pub fn copy(&self, disk: &Disk, name: &str) -> Disk {
        let path = self.path(name);
        fs::copy(&disk.path, &path).unwrap();
        Disk { path, ..disk.clone() }
    }

    /// A machine that has not been booted yet.
    pub fn machine(&self, name: &str, disks: Vec<Disk>, restore: Option<PathBuf>) -> Machine<'_> {
        let run_dir = self.path(name);
        DirBuilder::new().mode(0o700).create(&run_dir).unwrap();
        let cgroup = SandboxCgroup::for_key(&format!("{name}-{}", std::process::id())).unwrap();
        cgroup.create().unwrap();
        let guest = paths::guest_dir();
        let config = Config {
            vmm: self.backend.choice(),
            guest: Guest {
                kernel: guest.join("vmlinuz"),
                vmlinux: guest.join("vmlinux"),
                initrd: guest.join("initrd.img"),
                cmdline: String::new(),
            },
            ..Config::default()
        };
        let spec = VmSpec {
            sandbox_id: name.into(),
            run_dir,
            cgroup: cgroup.dir().into(),
            user: USER,
            group: USER - 1,
            vcpus: 1,
            memory_mib: 256,
            share: None,
            disks,
            cmdline: String::new(),
            restore,
        };
        let (vmm, _) = vmm::select(&config, spec);
        Machine { bench: self, name: name.into(), cgroup, vmm, guest: None }
    }
}

/// Who the VMM is; nobody else is.
pub const USER: u32 = 1_900_300_001;

impl Machine<'_> {
    /// Pid of the VMM itself.
    pub fn vmm_pid(&self) -> i32 {
        let procs = fs::read_to_string(self.cgroup.helpers().join("cgroup.procs")).unwrap();
        let is_vmm = |pid: &&str| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = line.split('\0').next().unwrap_or_default();
            program.contains("qemu") || program.contains("cloud-hypervisor")
        };
        procs.lines().find(is_vmm).expect("no VMM").parse().unwrap()
    }

    /// Boots or restores it, and says Hello.
    pub fn boot(&mut self) -> HelloResponse {
        let runtime = &self.bench.runtime;
        let begin = Instant::now();
        runtime.block_on(self.vmm.boot()).unwrap_or_else(|e| panic!("{}: {}", self.name, chain(&e)));
        let runs = begin.elapsed();
        let connected = runtime.block_on(Agent::connect(Arc::new(self.vmm.vsock()), LIMIT));
        let (agent, link, hello) = connected.unwrap_or_else(|e| panic!("{}: {}", self.name, chain(&e)));
        self.guest = Some((agent, link));
        println!(
            "{}: virtual CPUs run after {runs:?}, the agent answers after {:?}",
            self.name,
            begin.elapsed()
        );
        hello
    }

    fn agent(&self) -> &Agent {
        &self.guest.as_ref().expect("boot comes first").0
    }

    /// Says Hello again, on a new connection.
    pub fn hello(&self) -> HelloResponse {
        let connected = self.bench.runtime.block_on(Agent::connect(Arc::new(self.vmm.vsock()), LIMIT));
        connected.unwrap_or_else(|e| panic!("{}: {}", self.name, chain(&e))).2
    }

    /// Pauses the virtual CPUs.
    pub fn pause(&self) {
        self.bench.runtime.block_on(self.vmm.pause()).unwrap();
    }

    /// Lets the virtual CPUs run.
    pub fn resume(&self) {
        self.bench.runtime.block_on(self.vmm.resume()).unwrap();
    }

    /// `Vmm::snapshot`.
    pub fn snapshot(&self, dir: &Path) -> Result<(), VmmError> {
        let begin = Instant::now();
        let result = self.bench.runtime.block_on(self.vmm.snapshot(dir));
        println!("{}: a snapshot after {:?}: {result:?}", self.name, begin.elapsed());
        result
    }

    /// `Vmm::snapshot`, with something that happens meanwhile.
    pub fn snapshot_while(
        &self,
        dir: &Path,
        meanwhile: impl FnOnce() + Send + 'static,
    ) -> Result<(), VmmError> {
        let meanwhile = self.bench.runtime.spawn_blocking(meanwhile);
        let result = self.bench.runtime.block_on(self.vmm.snapshot(dir));
        self.bench.runtime.block_on(meanwhile).unwrap();
        result
    }

    /// `Vmm::add_disk`.
    pub fn add_disk(&self, disk: &Disk) {
        self.bench.runtime.block_on(self.vmm.add_disk(disk)).unwrap();
    }

    /// `Guest.Quiesce`, for a snapshot.
    pub fn quiesce(&self) {
        let request = QuiesceRequest { sync: true, timeout_ms: 15_000, ..Default::default() };
        let answer = self.agent().call_once("Quiesce", LIMIT, |clients, context| async move {
            clients.guest.quiesce(context, &request).await
        });
        self.bench.runtime.block_on(answer).unwrap();
    }

    /// `Guest.Thaw`.
    pub fn thaw(&self, request: ThawRequest) {
        let answer = self.agent().call_once("Thaw", LIMIT, |clients, context| async move {
            clients.guest.thaw(context, &request).await
        });
        self.bench.runtime.block_on(answer).unwrap();
    }

    /// Runs `argv` in the container `id`, whose rootfs is the disk, without any stdio.
    pub fn run(&self, id: &str, disk: &Disk, argv: &[&str]) {
        let mut spec = direct::spec(argv);
        spec["linux"]["cgroupsPath"] = json!(format!("/{id}"));
        let options = CreateOptions { spec: spec.to_string().into_bytes(), ..Default::default() };
        let options = Any {
            type_url: "cube.agent.v1.CreateOptions".into(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let source = format!("serial:{}", disk.serial);
        let call = CreateTaskRequest {
            id: id.into(),
            rootfs: vec![Mount { type_: "ext4".into(), source, ..Default::default() }],
            options: MessageField::some(options),
            ..Default::default()
        };
        let start = StartRequest { id: id.into(), ..Default::default() };
        let answer = self.agent().call_once("Create", LIMIT, |clients, context| async move {
            clients.task.create(context.clone(), &call).await?;
            clients.task.start(context, &start).await
        });
        self.bench.runtime.block_on(answer).unwrap();
    }

    /// How the VMM ended.
    pub fn wait(&self) -> vmm::VmmExit {
        self.bench.runtime.block_on(async { tokio::time::timeout(LIMIT, self.vmm.wait()).await }).unwrap()
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let ended = self.bench.runtime.block_on(self.vmm.kill());
        let removed = self.cgroup.destroy(Duration::from_secs(20), None);
        if !std::thread::panicking() {
            ended.unwrap();
            removed.unwrap();
        }
    }
}

fn run(command: &mut Command) {
    start(command).wait(LIMIT).succeeds();
}

/// The text of an error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    cube_shim::errors::chain(error)
}

/// What the guest has written to the file `path` of an ext4 disk, as far as it is on the disk.
pub fn content(disk: &Disk, path: &str) -> String {
    let mut debugfs = Command::new("debugfs");
    start(debugfs.arg("-R").arg(format!("cat {path}")).arg(&disk.path)).wait(LIMIT).succeeds().out()
}

/// Waits until the file has more than `lines` lines.
pub fn grows(disk: &Disk, path: &str, lines: usize) -> String {
    let longer = || content(disk, path).lines().count() > lines;
    assert!(poll(LIMIT, longer), "{path} on {disk:?} stays at {:?}", content(disk, path));
    content(disk, path)
}
