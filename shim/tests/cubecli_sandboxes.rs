//! `cubecli cubebox ls`, `gc` and `cubecli info` against state files, with shims that answer, hang or
//! are gone.
#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

mod support;

use std::{
    fs::{self, File},
    os::unix::net::UnixListener,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{StateRequest, StateResponse, Status},
    shim_async::{Task, create_task},
};
use cube_shim::snapshot::Suspended;
use support::Host;
use tokio::sync::oneshot;
use ttrpc::r#async::{Server, TtrpcContext};

struct OneTask(Status);

#[async_trait]
impl Task for OneTask {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (status, pid) = (self.0.into(), 77);
        Ok(StateResponse { id: request.id, status, pid, ..Default::default() })
    }
}

/// A shim that answers `State` until this is dropped.
struct Shim(#[allow(dead_code, reason = "held, not read")] oneshot::Sender<()>);

fn shim(socket: &Path, status: Status) -> Shim {
    let address = format!("unix://{}", socket.display());
    let (stop, stopped) = oneshot::channel();
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let service = create_task(Arc::new(OneTask(status)));
            let mut server = Server::new().bind(&address).unwrap().register_service(service);
            server.start().await.unwrap();
            ready.send(()).unwrap();
            let _ = stopped.await;
        });
    });
    is_ready.recv_timeout(support::LIMIT).unwrap();
    Shim(stop)
}

#[test]
fn ls_asks_each_shim_and_waits_for_none_that_hangs() {
    let host = Host::new();
    let dirs = ["answers", "hangs", "gone"].map(|id| host.sandbox(id, host.log_dir(id)));
    let _shim = shim(&dirs[0].socket().unwrap(), Status::RUNNING);
    let _hanging = UnixListener::bind(dirs[1].socket().unwrap()).unwrap();
    let begun = Instant::now();
    let text = host.text(&["cubebox", "ls"]);
    assert!(begun.elapsed() < Duration::from_secs(20));
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let row = |id: &str| rows.iter().find(|row| row[1] == id).unwrap()[..6].to_vec();
    assert_eq!(row("ID"), ["NAMESPACE", "ID", "SANDBOX", "STATUS", "PID", "VMM"]);
    assert_eq!(row("answers"), ["default", "answers", "answers", "running", "77", "process"]);
    assert_eq!(row("hangs"), ["default", "hangs", "hangs", "no-answer", "4242", "process"]);
    assert_eq!(row("gone"), ["default", "gone", "gone", "shim-gone", "4242", "process"]);
    assert_eq!(host.text(&["cubebox", "ls", "--namespace", "other"]).lines().count(), 1);
}

/// containerd has no word for it.
#[test]
fn ls_tells_a_sandbox_on_disk_from_one_that_is_paused_in_memory() {
    let host = Host::new();
    let dirs = ["memory", "disk", "woken"].map(|id| host.sandbox(id, host.log_dir(id)));
    for dir in &dirs[1..] {
        let mut state = dir.load().unwrap().unwrap();
        state.suspended = Some(host.path("store").join(format!(".suspended-{}", dir.key())));
        dir.save(&state).unwrap();
    }
    let states = [Status::PAUSED, Status::PAUSED, Status::RUNNING];
    let _shims: Vec<_> =
        dirs.iter().zip(states).map(|(dir, state)| shim(&dir.socket().unwrap(), state)).collect();
    let text = host.text(&["cubebox", "ls"]);
    let status = |id: &str| {
        let rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.into_iter().find(|row| row[1] == id).unwrap()[3].to_owned()
    };
    assert_eq!(["memory", "disk", "woken"].map(status), ["paused", "suspended", "running"]);
}

/// From the state file, and where that is gone from the link.
#[test]
fn gc_removes_memory_that_nobody_can_go_on_from() {
    let host = Host::new();
    let store = host.path("store");
    host.configure(&format!("[snapshot]\ndir = {store:?}"));
    let dirs = ["crashed", "lost", "lives"].map(|id| host.sandbox(id, host.log_dir(id)));
    let memory = dirs.each_ref().map(|dir| Suspended::new(&store, dir));
    for (dir, memory) in dirs.iter().zip(&memory) {
        memory.create(dir).unwrap();
        fs::write(memory.vm_dir().join("memory-ranges"), "secret").unwrap();
        let mut state = dir.load().unwrap().unwrap();
        state.suspended = Some(memory.path().into());
        dir.save(&state).unwrap();
    }
    dirs[1].remove().unwrap();
    let _shim = shim(&dirs[2].socket().unwrap(), Status::PAUSED);
    let would = host.text(&["cubebox", "gc", "--dry-run"]);
    assert!(would.contains(memory[1].path().to_str().unwrap()), "{would}");
    assert!(memory.iter().all(|memory| memory.path().exists()));
    let told = host.text(&["cubebox", "gc"]);
    assert!(told.contains("memory of a sandbox that is gone"), "{told}");
    assert_eq!(memory.map(|memory| memory.path().exists()), [false, false, true]);
}

#[test]
fn ls_writes_json_for_scripts() {
    let host = Host::new();
    assert_eq!(host.text(&["cubebox", "ls", "--json"]), "[]\n");
    host.sandbox("c", host.log_dir("c"));
    let json: serde_json::Value = serde_json::from_slice(&host.ok(&["cubebox", "ls", "--json"])).unwrap();
    assert_eq!(json[0]["id"], "c");
    assert_eq!(json[0]["status"], "shim-gone");
    assert_eq!(json[0]["log_dir"], host.log_dir("c").to_str().unwrap());
}

#[test]
fn a_state_file_that_cannot_be_read_hides_no_other_sandbox() {
    let host = Host::new();
    host.sandbox("good", host.log_dir("good"));
    let bad = host.sandbox("bad", host.log_dir("bad"));
    fs::write(bad.path().join("state.json"), "{").unwrap();
    let output = host.run(&["cubebox", "ls"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("good"));
    assert!(String::from_utf8(output.stderr).unwrap().contains(bad.key()));
}

fn log_of_age(host: &Host, id: &str, hours: u64) {
    host.log(id, "stdout").write(1, b"x\n");
    let time = SystemTime::now() - Duration::from_secs(hours * 3600);
    for path in [host.log_dir(id).join("stdout"), host.log_dir(id).join("stdout.idx"), host.log_dir(id)] {
        File::open(path).unwrap().set_modified(time).unwrap();
    }
}

#[test]
fn gc_removes_logs_beyond_their_retention_and_says_so() {
    let host = Host::new();
    for (id, hours) in [("new", 1), ("old", 25), ("living", 25)] {
        log_of_age(&host, id, hours);
    }
    let sandbox = host.sandbox("living", host.log_dir("living"));
    let _shim = shim(&sandbox.socket().unwrap(), Status::RUNNING);
    let old = host.log_dir("old");
    let would = host.text(&["cubebox", "gc", "--dry-run"]);
    assert_eq!(would, format!("would remove {} (unchanged for 25h)\n", old.display()));
    assert!(old.exists());
    assert_eq!(host.text(&["cubebox", "gc"]), would.replace("would remove", "removed"));
    assert!(!old.exists() && host.log_dir("new").exists() && host.log_dir("living").exists());
    assert_eq!(host.text(&["cubebox", "gc"]), "");
}

#[test]
fn gc_removes_the_oldest_logs_beyond_their_total_and_counts_those_of_the_living_not() {
    let host = Host::new();
    host.configure("total_limit = 2500000");
    for (id, hours) in [("a", 1), ("b", 2), ("c", 3), ("living", 25)] {
        let dir = host.log_dir(id);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("stdout"), vec![1; 1_000_000]).unwrap();
        let time = SystemTime::now() - Duration::from_secs(hours * 3600);
        for path in [dir.join("stdout"), dir] {
            fs::File::open(path).unwrap().set_modified(time).unwrap();
        }
    }
    let sandbox = host.sandbox("living", host.log_dir("living"));
    let _shim = shim(&sandbox.socket().unwrap(), Status::RUNNING);
    let text = host.text(&["cubebox", "gc"]);
    let oldest = host.log_dir("c");
    let expected = format!("removed {} (unchanged for 3h, 1 MiB beyond log.total_limit)\n", oldest.display());
    assert_eq!(text, expected);
    assert!(!oldest.exists() && ["a", "b", "living"].iter().all(|id| host.log_dir(id).exists()));
}

#[test]
fn gc_removes_what_a_sandbox_without_shim_and_processes_has_left() {
    let host = Host::new();
    let (gone, living) = (host.sandbox("gone", host.log_dir("gone")), host.sandbox("up", host.log_dir("up")));
    let _shim = shim(&living.socket().unwrap(), Status::RUNNING);
    fs::create_dir_all(gone.path().join("shared")).unwrap();
    fs::write(gone.path().join("shared/file"), "x").unwrap();
    let text = host.text(&["cubebox", "gc"]);
    assert!(text.contains(gone.key()) && text.lines().count() == 1, "{text}");
    assert!(!gone.path().exists() && living.path().exists());
}

#[test]
fn gc_leaves_a_sandbox_alone_that_somebody_works_on_or_that_has_processes() {
    let host = Host::new();
    let locked = host.sandbox("locked", host.log_dir("locked"));
    let _lock = locked.lock(Duration::from_secs(1)).unwrap().unwrap();
    let populated = host.sandbox("populated", host.log_dir("populated"));
    let mut state = populated.load().unwrap().unwrap();
    state.cgroup = host.path("cgroup");
    populated.save(&state).unwrap();
    fs::create_dir(&state.cgroup).unwrap();
    fs::write(state.cgroup.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
    let text = host.text(&["cubebox", "gc"]);
    assert!(text.starts_with("kept ") && text.lines().count() == 1, "{text}");
    assert!(locked.path().exists() && populated.path().exists());
}

#[test]
fn gc_unmounts_before_it_removes() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let host = Host::new();
    let image = host.path("image");
    fs::create_dir(&image).unwrap();
    fs::write(image.join("precious"), "x").unwrap();
    let gone = host.sandbox("gone", host.log_dir("gone"));
    let rootfs = gone.path().join("shared/gone/rootfs");
    fs::create_dir_all(&rootfs).unwrap();
    // In a mount namespace of its own, so that a failure leaves no mount on this machine.
    let script = "mount --bind \"$1\" \"$2\" && exec \"$0\" cubebox gc";
    let output = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_cubecli")])
        .args([&image, &rootfs])
        .env("CUBE_CONFIG", host.path("config.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!gone.path().exists());
    assert!(image.join("precious").exists());
}

#[test]
fn following_a_container_that_has_stopped_ends_though_it_is_not_deleted() {
    let host = Host::new();
    host.log("c", "stdout").write(1, b"last words\n");
    let sandbox = host.sandbox("c", host.log_dir("c"));
    let _shim = shim(&sandbox.socket().unwrap(), Status::STOPPED);
    let (status, printed) = host.start(&["logs", "--follow", "c"]).finish();
    assert!(status.success());
    assert_eq!(printed, b"last words\n");
}

#[test]
fn info_shows_paths_and_whether_they_exist() {
    let host = Host::new();
    let text = host.text(&["info"]);
    let config = host.path("config.toml");
    assert!(text.contains(&format!("{} (1 KiB)", config.display())), "{text}");
    assert!(text.contains(&format!("{} (does not exist)", host.path("run").display())), "{text}");
}

#[test]
fn a_configuration_that_is_wrong_is_named() {
    let host = Host::new();
    host.configure("segments = 0");
    let (code, message) = host.fails(&["cubebox", "ls"]);
    assert!(code == 1 && message.contains("log.segments") && message.contains("at least 2"), "{message}");
}
