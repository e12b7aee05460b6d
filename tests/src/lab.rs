//! A private containerd in a directory of its own, with an image, a configuration file, and our shim.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount, umount},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    command::{self, Finished, Running, poll, start},
    diagnostics, leftovers,
    needs::Backend,
    paths,
};

/// Name of the image of every lab: busybox and `cube-test-writer`.
pub const IMAGE: &str = "localhost/cube-test:latest";

/// Runtime of every lab that does not say. The variable shows what containerd's own runtime does in
/// the same test: `CUBE_TEST_RUNTIME=io.containerd.runc.v2`.
fn default_runtime() -> String {
    std::env::var("CUBE_TEST_RUNTIME").unwrap_or_else(|_| "io.containerd.cube.v2".to_owned())
}

/// How a lab differs from the default one.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What runs the sandboxes.
    pub backend: Backend,
    /// containerd's name of the runtime.
    pub runtime: String,
    /// The `[log]` table without `dir`, as TOML.
    pub log: String,
    /// Whether logs are in the bundle.
    pub log_in_bundle: bool,
    /// The `[rootfs]` table without `cache_dir`, as TOML.
    pub rootfs: String,
    /// The program that packs a rootfs.
    pub packer: PathBuf,
    /// Directory in which containerd finds the shim.
    pub shim_dir: PathBuf,
    /// The agent of the process backend.
    pub agent: PathBuf,
    /// Whether every configured directory is named by way of a link and `..`, as `/var/run/cube` is.
    pub through_links: bool,
}

impl From<Backend> for Setup {
    fn from(backend: Backend) -> Setup {
        Setup {
            backend,
            runtime: default_runtime(),
            log: String::new(),
            log_in_bundle: false,
            rootfs: String::new(),
            packer: "mkfs.erofs".into(),
            shim_dir: paths::shim().parent().unwrap().into(),
            agent: paths::agent(),
            through_links: false,
        }
    }
}

/// The containerd and its directory. Dropping it removes everything, whatever state it is in.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    setup: Setup,
    snapshotter: &'static str,
    containerd: RefCell<Option<Child>>,
    keys: RefCell<BTreeSet<String>>,
    baseline: RefCell<BTreeSet<String>>,
    execs: Cell<u32>,
}

impl Lab {
    /// A lab whose sandboxes run on `backend`.
    pub fn new(backend: Backend) -> Lab {
        Lab::with(backend.into())
    }

    /// A lab with other settings.
    pub fn with(setup: Setup) -> Lab {
        let dir = short_directory();
        diagnostics::register(&dir);
        let lab = Lab {
            snapshotter: if overlay_works(&dir) { "overlayfs" } else { "native" },
            dir,
            setup,
            containerd: RefCell::default(),
            keys: RefCell::default(),
            baseline: RefCell::default(),
            execs: Cell::default(),
        };
        fs::write(lab.dir.join("containerd.toml"), lab.containerd_config()).unwrap();
        lab.configure("");
        lab.start_containerd();
        let image = paths::image();
        let snapshotter = lab.snapshotter;
        let import = ["image", "import", "--snapshotter", snapshotter, image.to_str().unwrap()];
        lab.ctr(&import).succeeds();
        lab.disown_what_exists();
        lab
    }

    /// What exists now was there before the product did anything: see [`leftovers`](Lab::leftovers).
    pub fn disown_what_exists(&self) {
        *self.baseline.borrow_mut() = leftovers::take(&self.dir, &[]);
    }

    /// The lab's directory: short, for socket paths are limited to 107 bytes.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// containerd namespace, another one for each lab: runc has one directory and one cgroup per
    /// namespace on the whole host.
    pub fn namespace(&self) -> &str {
        self.dir.file_name().unwrap().to_str().unwrap()
    }

    /// What runs the sandboxes.
    pub fn backend(&self) -> Backend {
        self.setup.backend
    }

    /// containerd's snapshotter for the image.
    pub fn snapshotter(&self) -> &str {
        self.snapshotter
    }

    /// Generous bound for one step: a `ctr` command that may boot a VM.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(if self.setup.backend.is_vm() { 150 } else { 40 })
    }

    /// The configuration file of shim and cubecli.
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// `run_dir` of the configuration.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// `rootfs.cache_dir` of the configuration.
    pub fn cache_dir(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// containerd's gRPC socket.
    pub fn address(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Where containerd takes events from shims.
    pub fn ttrpc_address(&self) -> PathBuf {
        self.dir.join("c.sock.ttrpc")
    }

    /// Where containerd keeps the bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.dir.join("state/io.containerd.runtime.v2.task").join(self.namespace()).join(id)
    }

    /// Where the log of a container is.
    pub fn log_dir(&self, id: &str) -> PathBuf {
        if self.setup.log_in_bundle {
            self.bundle(id)
        } else {
            self.dir.join("log").join(self.namespace()).join(id)
        }
    }

    /// Where the log of the build of a template is.
    pub fn template_log_dir(&self, template: &str) -> PathBuf {
        self.dir.join("templates").join(template)
    }

    /// Writes the configuration file; `extra` are tables beside those that every lab needs.
    pub fn configure(&self, extra: &str) {
        let dir = match self.setup.through_links {
            true => self.dir_through_links(),
            false => self.dir.clone(),
        };
        let dir = dir.display();
        let guest = paths::guest_dir();
        let guest = guest.canonicalize().unwrap_or(guest);
        let guest = guest.display();
        let log_dir = if self.setup.log_in_bundle { "bundle".into() } else { format!("{dir}/log") };
        let text = format!(
            "vmm = '{}'\nrun_dir = '{dir}/run'\n\
             [guest]\nkernel = '{guest}/vmlinuz'\nvmlinux = '{guest}/vmlinux'\ninitrd = '{guest}/initrd.img'\n\
             [tools]\nagent = '{}'\nmkfs_erofs = '{}'\n\
             [rootfs]\ncache_dir = '{dir}/cache'\n{}\n\
             [snapshot]\ndir = '{dir}/snapshots'\n\
             [log]\ndir = '{log_dir}'\ntemplate_dir = '{dir}/templates'\n{}\n{extra}\n",
            self.setup.backend.name(),
            self.setup.agent.display(),
            self.setup.packer.display(),
            self.setup.rootfs,
            self.setup.log,
        );
        fs::write(self.config_file(), text).unwrap();
    }

    /// Another name of the lab's directory. Whoever leaves the `..` out by looking at the text gets nowhere.
    fn dir_through_links(&self) -> PathBuf {
        let link = self.dir.join("link");
        if !link.is_symlink() {
            fs::create_dir_all(self.dir.join("far/away")).unwrap();
            std::os::unix::fs::symlink(self.dir.join("far/away"), &link).unwrap();
            std::os::unix::fs::symlink(&self.dir, self.dir.join("far/lab")).unwrap();
        }
        link.join("../lab")
    }

    fn containerd_config(&self) -> String {
        let dir = self.dir.display();
        // The opt plugin would make /opt/containerd, and CRI would listen for streams.
        format!(
            "version = 2\nroot = '{dir}/root'\nstate = '{dir}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt']\n\
             [grpc]\naddress = '{dir}/c.sock'\n[ttrpc]\naddress = '{dir}/c.sock.ttrpc'\n\
             [debug]\nlevel = 'debug'\n"
        )
    }

    /// Starts containerd, again if it was stopped, and waits until it answers.
    pub fn start_containerd(&self) {
        let log = File::options().create(true).append(true).open(self.dir.join("containerd.log")).unwrap();
        let mut path = self.setup.shim_dir.as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let child = Command::new("containerd")
            .arg("--config")
            .arg(self.dir.join("containerd.toml"))
            .env("PATH", path)
            .env("CUBE_CONFIG", self.config_file())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("cannot start containerd");
        *self.containerd.borrow_mut() = Some(child);
        let up = || self.ctr(&["version"]).status.success();
        assert!(poll(Duration::from_secs(30), up), "containerd does not answer");
    }

    /// Ends containerd as systemd would; shims and sandboxes stay.
    pub fn stop_containerd(&self) {
        let Some(mut child) = self.containerd.borrow_mut().take() else { return };
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).ok();
        if command::wait_child(&mut child, Duration::from_secs(20)).is_none() {
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// Ends containerd as a crash would.
    pub fn kill_containerd(&self) {
        let Some(mut child) = self.containerd.borrow_mut().take() else { return };
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// A `ctr` command for this containerd and namespace, to be started by the caller.
    pub fn ctr_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.address()).args(["--namespace", self.namespace()]).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// Runs `ctr` to its end.
    pub fn ctr(&self, args: &[&str]) -> Finished {
        start(&mut self.ctr_command(args)).wait(self.limit())
    }

    /// `ctr run` with `flags` of container `id`, to be started by the caller.
    pub fn run_command(&self, flags: &[&str], id: &str, argv: &[&str]) -> Command {
        self.uses_sandbox(self.key(id));
        let fifos = self.dir.join("fifo");
        let mut command = self.ctr_command(&["run", "--runtime", &self.setup.runtime]);
        command.args(["--snapshotter", self.snapshotter, "--fifo-dir"]).arg(fifos);
        command.args(flags).args([IMAGE, id]).args(argv);
        command
    }

    /// `ctr run` of a container whose rootfs is the directory `rootfs`, to be started by the caller.
    pub fn rootfs_command(&self, flags: &[&str], rootfs: &Path, id: &str, argv: &[&str]) -> Command {
        self.uses_sandbox(self.key(id));
        let mut command = self.ctr_command(&["run", "--runtime", &self.setup.runtime, "--fifo-dir"]);
        command.arg(self.dir.join("fifo")).args(flags).arg("--rootfs").arg(rootfs).arg(id).args(argv);
        command
    }

    /// Makes `dir`, with the files of [`IMAGE`] in it.
    pub fn unpack(&self, dir: &Path) {
        let view = self.dir.join("view");
        fs::create_dir_all(&view).unwrap();
        let view_text = view.to_str().unwrap();
        self.ctr(&["image", "mount", "--snapshotter", self.snapshotter, IMAGE, view_text]).succeeds();
        let copied = Command::new("cp").arg("-a").arg(&view).arg(dir).status().unwrap();
        self.ctr(&["image", "unmount", "--rm", "--snapshotter", self.snapshotter, view_text]).succeeds();
        fs::remove_dir(&view).unwrap();
        assert!(copied.success());
    }

    /// Runs container `id` to its end, and removes it.
    pub fn run(&self, id: &str, argv: &[&str]) -> Finished {
        self.run_with(&[], id, argv)
    }

    /// Like [`run`](Lab::run), with flags of `ctr run`.
    pub fn run_with(&self, flags: &[&str], id: &str, argv: &[&str]) -> Finished {
        start(&mut self.run_command(&[&["--rm"], flags].concat(), id, argv)).wait(self.limit())
    }

    /// Starts container `id` under a `ctr run` that stays and relays its output.
    pub fn attached(&self, id: &str, argv: &[&str]) -> Running {
        start(&mut self.run_command(&["--rm"], id, argv))
    }

    /// Starts container `id`; its output goes to the log only.
    pub fn detached(&self, id: &str, argv: &[&str]) {
        self.detached_with(&[], id, argv);
    }

    /// Like [`detached`](Lab::detached), with flags of `ctr run`.
    pub fn detached_with(&self, flags: &[&str], id: &str, argv: &[&str]) {
        let mut command = self.run_command(&[&["--detach", "--null-io"], flags].concat(), id, argv);
        start(&mut command).wait(self.limit()).succeeds();
    }

    /// Starts container `id` with a log URI in place of FIFOs.
    pub fn detached_with_log(&self, uri: &str, id: &str, argv: &[&str]) {
        let mut command = self.run_command(&["--detach", "--log-uri", uri], id, argv);
        start(&mut command).wait(self.limit()).succeeds();
    }

    /// `ctr task exec` with `flags`, to be started by the caller.
    pub fn exec_command(&self, flags: &[&str], id: &str, argv: &[&str]) -> Command {
        self.execs.set(self.execs.get() + 1);
        let exec = format!("exec-{}", self.execs.get());
        let mut command = self.ctr_command(&["task", "exec", "--exec-id", &exec, "--fifo-dir"]);
        command.arg(self.dir.join("fifo")).args(flags).arg(id).args(argv);
        command
    }

    /// Runs another process in container `id` to its end.
    pub fn exec(&self, id: &str, argv: &[&str]) -> Finished {
        start(&mut self.exec_command(&[], id, argv)).wait(self.limit())
    }

    /// Kills and deletes container `id` and its task.
    pub fn remove(&self, id: &str) {
        self.ctr(&["task", "delete", "--force", id]).succeeds();
        self.ctr(&["container", "delete", id]).succeeds();
    }

    /// Deletes container `id` and its task, which has ended with `code`.
    #[track_caller]
    pub fn delete_stopped(&self, id: &str, code: i32) {
        let deleted = self.ctr(&["task", "delete", id]);
        // 1.6 and later tell the status in a warning, earlier ones pass it on.
        let told = deleted.err().contains(&format!("exit code {code}")) || deleted.code() == code;
        assert!(told, "exit code {code} expected: {deleted}");
        self.ctr(&["container", "delete", id]).succeeds();
    }

    /// State and pid of a task as `ctr task ls` shows them.
    pub fn task(&self, id: &str) -> Option<(String, i32)> {
        let list = self.ctr(&["task", "ls"]).succeeds().out();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id))?.to_owned();
        let mut words = line.split_whitespace().skip(1);
        let pid = words.next()?.parse().unwrap();
        Some((words.next()?.to_owned(), pid))
    }

    /// Waits for `task` to be what `wanted` says.
    pub fn wait_for_state(&self, id: &str, wanted: Option<&str>) {
        let mut seen = None;
        let reached = poll(self.limit(), || {
            seen = self.task(id);
            seen.as_ref().map(|(state, _)| state.as_str()) == wanted
        });
        assert!(reached, "task {id} is {seen:?}, expected {wanted:?}");
    }

    /// `cubecli` with this lab's configuration, to be started by the caller.
    pub fn cubecli_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(paths::cubecli());
        command.args(args).env("CUBE_CONFIG", self.config_file()).stdin(Stdio::null());
        command.env("CONTAINERD_ADDRESS", self.address());
        command
    }

    /// Runs `cubecli` to its end.
    pub fn cubecli(&self, args: &[&str]) -> Finished {
        start(&mut self.cubecli_command(args)).wait(self.limit())
    }

    /// Key of a container's sandbox.
    pub fn key(&self, id: &str) -> String {
        leftovers::key(self.ttrpc_address().to_str().unwrap(), self.namespace(), id)
    }

    /// The shim of a container's sandbox.
    pub fn shim_pid(&self, id: &str) -> Pid {
        let shims: Vec<_> = leftovers::processes(&self.dir)
            .into_iter()
            .filter(|process| {
                let words: Vec<&str> = process.line.split(' ').collect();
                words[0].contains("containerd-shim-") && words.contains(&id)
            })
            .collect();
        assert_eq!(shims.len(), 1, "shims of {id}: {shims:?}");
        Pid::from_raw(shims[0].pid)
    }

    /// Notes the key of a sandbox, whose cgroup [`nothing_is_left`](Lab::nothing_is_left) looks for.
    pub fn uses_sandbox(&self, key: String) {
        self.keys.borrow_mut().insert(key);
    }

    /// What exists beside what existed when the lab was new, or has disowned what exists.
    pub fn leftovers(&self) -> BTreeSet<String> {
        let now = leftovers::take(&self.dir, &self.keys());
        now.difference(&self.baseline.borrow()).cloned().collect()
    }

    /// Panics unless everything that containers brought with them goes away soon.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        self.nothing_is_left_but("");
    }

    /// Like [`nothing_is_left`](Lab::nothing_is_left), without the FIFOs that `ctr run --detach` makes
    /// and never removes.
    #[track_caller]
    pub fn nothing_is_left_but_fifos(&self) {
        self.nothing_is_left_but(&format!("file {}/fifo/", self.dir.display()));
    }

    #[track_caller]
    fn nothing_is_left_but(&self, expected: &str) {
        let product = |line: &String| expected.is_empty() || !line.starts_with(expected);
        let mut left = BTreeSet::new();
        let gone = poll(Duration::from_secs(15), || {
            // containerd is not the product: it may have been restarted.
            left = self.leftovers();
            left.retain(|line| !line.contains(" containerd --config ") && product(line));
            left.is_empty()
        });
        assert!(gone, "left behind: {left:#?}");
    }

    fn keys(&self) -> Vec<String> {
        self.keys.borrow().iter().cloned().collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            diagnostics::dump(&self.dir);
        }
        self.stop_containerd();
        diagnostics::unregister(&self.dir);
        if let Err(e) = leftovers::remove_all(&self.dir, &self.keys()) {
            eprintln!("cannot remove {}: {e}", self.dir.display());
        }
        leftovers::remove_cgroups_of_runc(self.namespace());
    }
}

fn short_directory() -> PathBuf {
    let dir = tempfile::Builder::new().prefix("ct.").rand_bytes(5).tempdir().unwrap().keep();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

/// overlayfs does not take another overlayfs for its upper directory, as /tmp in a container is.
fn overlay_works(dir: &Path) -> bool {
    let dir = dir.join("probe");
    for part in ["lower", "upper", "work", "merged"] {
        fs::create_dir_all(dir.join(part)).unwrap();
    }
    let part = |name| dir.join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", part("lower"), part("upper"), part("work"));
    let merged = dir.join("merged");
    let works =
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).is_ok();
    if works {
        umount(&merged).unwrap();
    }
    fs::remove_dir_all(&dir).unwrap();
    works
}
