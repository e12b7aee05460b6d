//! A rootfs made from busybox, the spec that `ctr run` makes by default, and a cgroup to run it in.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    future::Future,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use cube_agent::{
    container::{Config, Container, ContainerError, Spawned, parse, set_stage_executable},
    stdio::ChildStdio,
};
use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::unix::pipe};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Everything a container needs. Removed when dropped.
pub(crate) struct Fixture {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make containers, and must be run as root");
        set_stage_executable(env!("CARGO_BIN_EXE_cube-agent").into());
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("cube-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let cgroup = cgroup2().join(name);
        fs::create_dir(&cgroup).unwrap();
        let fixture = Self { directory: tempfile::tempdir().unwrap(), cgroup };
        fixture.install_busybox();
        fixture
    }

    fn install_busybox(&self) {
        let bin = self.rootfs().join("bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("these tests need busybox-static");
        let applets = Command::new("/bin/busybox").arg("--list").output().unwrap().stdout;
        for applet in String::from_utf8(applets).unwrap().lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", bin.join(applet)).unwrap();
        }
        let etc = self.rootfs().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
            .unwrap();
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// A directory outside of the rootfs.
    pub(crate) fn outside(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn cgroup(&self, id: &str) -> PathBuf {
        self.cgroup.join(id)
    }

    pub(crate) async fn create(&self, spec: Value) -> Result<(Container, Spawned, Output), ContainerError> {
        self.create_with(spec, false).await
    }

    pub(crate) async fn create_with(
        &self,
        spec: Value,
        allow_vsock: bool,
    ) -> Result<(Container, Spawned, Output), ContainerError> {
        self.create_in(self.rootfs(), spec, allow_vsock).await
    }

    pub(crate) async fn create_in(
        &self,
        rootfs: PathBuf,
        spec: Value,
        allow_vsock: bool,
    ) -> Result<(Container, Spawned, Output), ContainerError> {
        let (stdio, output) = stdio(&spec["process"]);
        let config = Config {
            id: "c1".into(),
            spec: parse(spec.to_string().as_bytes())?,
            rootfs,
            proc: self.directory.path().join("proc/c1"),
            cgroup_parent: self.cgroup.clone(),
            allow_vsock,
        };
        let (container, spawned) = within(Container::create(config, stdio)).await?;
        Ok((container, spawned, output))
    }

    /// Runs a container to its end. Gives its output and status.
    pub(crate) async fn run(&self, spec: Value) -> (String, WaitStatus) {
        let (mut container, spawned, output) = self.create(spec).await.unwrap();
        within(container.start()).await.unwrap();
        let text = output.text().await;
        let status = wait(&spawned);
        within(container.delete()).await.unwrap();
        assert!(!self.cgroup("c1").exists(), "delete leaves no cgroup");
        (text, status)
    }

    /// The output of a shell script that succeeds in a container with this spec.
    pub(crate) async fn script(&self, mut spec: Value, script: &str) -> String {
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        let (text, status) = self.run(spec).await;
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "{script}: {status:?}\n{text}");
        text
    }

    /// The error of a create, of which nothing is left.
    pub(crate) async fn refused(&self, spec: Value) -> ContainerError {
        let error = self.create(spec).await.map(drop).unwrap_err();
        // There may have been an init stage.
        let _ = waitpid(None, Some(WaitPidFlag::__WNOTHREAD));
        assert!(!self.cgroup("c1").exists(), "a create that failed leaves no cgroup");
        error
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        // After a failed assertion there may be a container.
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        for _ in 0..500 {
            for path in ["c1/init", "c1", ""] {
                let _ = fs::remove_dir(self.cgroup.join(path));
            }
            if !self.cgroup.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where the combined output of a process can be read.
pub(crate) struct Output(Option<pipe::Receiver>);

impl Output {
    /// Everything until the last writer is gone.
    pub(crate) async fn text(self) -> String {
        let mut text = Vec::new();
        within(self.0.unwrap().read_to_end(&mut text)).await.unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// stdin at its end; stdout and stderr in one pipe.
pub(crate) fn stdio(process: &Value) -> (ChildStdio, Output) {
    if process["terminal"] == json!(true) {
        return (ChildStdio::Terminal, Output(None));
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let null = OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let writer = OwnedFd::from(writer);
    let pipes = ChildStdio::Pipes([null, writer.try_clone().unwrap(), writer]);
    (pipes, Output(Some(pipe::Receiver::from_owned_fd(reader.into()).unwrap())))
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("this takes too long")
}

pub(crate) fn wait(spawned: &Spawned) -> WaitStatus {
    waitpid(Pid::from_raw(spawned.pid), None).unwrap()
}

/// Reaps one child of this thread, which is one of this test.
pub(crate) fn reap_any() {
    waitpid(None, Some(WaitPidFlag::__WNOTHREAD)).unwrap();
}

/// Reaps the stages that have ended, whose children the processes of this test were.
pub(crate) fn reap_stages() {
    let flags = WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
    while matches!(waitpid(None, Some(flags)), Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))) {}
}

/// Text of an error and its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn cgroup2() -> PathBuf {
    // Other tests may mount on paths that are not UTF-8.
    let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("these tests need cgroup v2");
    Path::new(line.split(' ').nth(4).unwrap()).to_owned()
}

/// What `ctr run` of containerd 1.6 puts into config.json, with a hostname.
pub(crate) fn default_spec() -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ]);
    let device = |major: i64, minor: i64| json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                device(1, 3), device(1, 8), device(1, 7), device(5, 0), device(1, 5), device(1, 9), device(5, 1),
                {"allow": true, "type": "c", "major": 136, "access": "rwm"},
                device(5, 2),
            ]},
            "cgroupsPath": "/default/c1",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
