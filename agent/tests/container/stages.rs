//! What a container gets to see of the stages that make its processes.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Instant,
};

use nix::sys::wait::WaitStatus;
use oci_spec::runtime::Process;
use serde_json::{Value, json};

use crate::{
    push,
    support::{Fixture, LIMIT, default_spec, reap_stages, stdio, wait, within},
};

/// What [`probe_every_process_in_sight`] says at its end.
const SUMMARY: &str = "stages seen: ";

/// The default spec with `CAP_SYS_PTRACE`, and with this very program as /probe.
fn tracer() -> Value {
    let mut spec = default_spec();
    for set in ["bounding", "effective", "permitted"] {
        push(&mut spec, &format!("/process/capabilities/{set}"), json!("CAP_SYS_PTRACE"));
    }
    let program = std::env::current_exe().unwrap();
    // With the libraries that it is linked to.
    for (source, destination) in
        [("/usr", "/usr"), ("/lib", "/lib"), ("/lib64", "/lib64"), (program.to_str().unwrap(), "/probe")]
    {
        push(
            &mut spec,
            "/mounts",
            json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]}),
        );
    }
    spec
}

/// A rootfs that is also the root of the probe has what the probe looks for.
fn probe(spec: &mut Value) {
    spec["process"]["args"] =
        json!(["/probe", "--ignored", "--exact", "--nocapture", "stages::probe_every_process_in_sight"]);
}

#[tokio::test]
async fn a_process_that_may_trace_finds_nothing_in_a_stage_that_is_not_the_containers() {
    let fixture = Fixture::new();
    let mut spec = tracer();
    let exec = spec["process"].clone();
    probe(&mut spec);
    let (mut container, init, output) = fixture.create(spec).await.unwrap();
    within(container.start()).await.unwrap();
    let seen = tokio::spawn(output.text());
    until_exists(&fixture.rootfs().join("probing")).await;

    for (uid, terminal) in [(0, false), (1000, false), (0, true)].into_iter().cycle().take(150) {
        let mut process = exec.clone();
        process["args"] = json!(["true"]);
        process["user"] = json!({"uid": uid, "gid": uid});
        process["terminal"] = json!(terminal);
        let (pipes, _output) = stdio(&process);
        let process: Process = serde_json::from_value(process).unwrap();
        let spawned = within(container.exec(&process, pipes)).await.unwrap();
        assert!(matches!(wait(&spawned), WaitStatus::Exited(_, 0)));
        reap_stages();
    }
    fs::write(fixture.rootfs().join("stop"), "").unwrap();
    let seen = within(seen).await.unwrap();
    wait(&init);
    within(container.delete()).await.unwrap();
    let found: Vec<&str> = seen.lines().filter(|line| line.starts_with("found ")).collect();
    assert!(found.is_empty(), "{found:#?}");
    let stages = seen.lines().find_map(|line| line.strip_prefix(SUMMARY)).unwrap_or_else(|| panic!("{seen}"));
    assert_ne!(stages, "0", "the probe is too slow to see anything");
}

/// The init process of a container that joins the pid namespace of another waits there to be started.
#[tokio::test]
async fn nor_in_one_that_waits_in_the_pid_namespace_of_another_container() {
    let fixture = Fixture::new();
    let mut spec = tracer();
    probe(&mut spec);
    let (mut container, init, output) = fixture.create(spec).await.unwrap();
    within(container.start()).await.unwrap();
    let seen = tokio::spawn(output.text());
    until_exists(&fixture.rootfs().join("probing")).await;

    let other = Fixture::new();
    let mut joined = default_spec();
    joined["linux"]["namespaces"][0]["path"] = json!(format!("/proc/{}/ns/pid", init.pid));
    let (mut second, waiting, _output) = other.create_in(fixture.rootfs(), joined, false).await.unwrap();
    reap_stages();
    until_exists(&fixture.rootfs().join("seen")).await;
    fs::write(fixture.rootfs().join("stop"), "").unwrap();
    let seen = within(seen).await.unwrap();
    let found: Vec<&str> = seen.lines().filter(|line| line.starts_with("found ")).collect();
    assert!(found.is_empty(), "{found:#?}");

    // The first process of a pid namespace takes the others along.
    assert!(matches!(wait(&waiting), WaitStatus::Signaled(..)));
    wait(&init);
    within(second.delete()).await.unwrap();
    within(container.delete()).await.unwrap();
    drop(second);
    drop(container);
    let mounts = fs::read("/proc/self/mountinfo").unwrap();
    let mounts = String::from_utf8_lossy(&mounts);
    for fixture in [&fixture, &other] {
        assert!(!mounts.contains(fixture.outside("proc").to_str().unwrap()), "a proc is left:\n{mounts}");
    }
}

async fn until_exists(path: &Path) {
    let exists = async {
        while !path.exists() {
            tokio::task::yield_now().await;
        }
    };
    within(exists).await;
}

/// Looks at every process that comes up, as somebody who wants to break out would. Tells what it finds that
/// is more than it has itself.
#[test]
#[ignore = "runs inside of the containers of the other tests"]
fn probe_every_process_in_sight() {
    let own = Seen::of(Path::new("/proc/self")).unwrap();
    let (mut stages, mut told) = (0, HashSet::new());
    println!();
    fs::write("/probing", "").unwrap();
    let began = Instant::now();
    while !Path::new("/stop").exists() && began.elapsed() < LIMIT {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let path = entry.path();
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if pid == std::process::id() || pid == 1 {
                continue;
            }
            let Some(seen) = Seen::of(&path) else { continue };
            let is_stage = seen.program.as_ref().is_some_and(|program| program.contains("cube-agent"));
            if is_stage && seen.is_complete {
                stages += 1;
                let _ = fs::write("/seen", "");
            }
            for found in seen.beyond(&own, is_stage) {
                // Each kind once.
                if told.insert(found.clone()) {
                    println!("found {found}");
                }
            }
        }
    }
    println!("{SUMMARY}{stages}");
}

/// What a tracer sees of a process.
struct Seen {
    capabilities: u64,
    root: Option<(u64, u64)>,
    program: Option<String>,
    descriptors: Vec<(String, PathBuf)>,
    writable: bool,
    /// It did not end meanwhile.
    is_complete: bool,
}

impl Seen {
    fn of(path: &Path) -> Option<Seen> {
        let status = fs::read_to_string(path.join("status")).ok()?;
        let bits = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            u64::from_str_radix(value.trim(), 16).ok()
        };
        let capabilities = bits("CapPrm:")? | bits("CapEff:")? | bits("CapInh:")? | bits("CapAmb:")?;
        let root = fs::metadata(path.join("root")).ok().map(|root| (root.dev(), root.ino()));
        let program = fs::read_link(path.join("exe")).ok().map(|program| program.display().to_string());
        let open = |entry: fs::DirEntry| {
            let number = entry.file_name().to_str()?.to_owned();
            Some((number, fs::read_link(entry.path()).ok()?))
        };
        let descriptors = fs::read_dir(path.join("fd")).ok().into_iter().flatten().flatten().filter_map(open);
        let descriptors: Vec<_> = descriptors.collect();
        let writable = fs::File::options().append(true).open(path.join("exe")).is_ok();
        let program_after = fs::read_link(path.join("exe")).ok().map(|program| program.display().to_string());
        let is_complete = program.is_some() && program == program_after;
        Some(Seen { capabilities, root, program, descriptors, writable, is_complete })
    }

    /// What it has that `own` has not.
    fn beyond(&self, own: &Seen, is_stage: bool) -> Vec<String> {
        let mut found = Vec::new();
        if self.capabilities & !own.capabilities != 0 {
            found.push(format!("capabilities {:x}", self.capabilities));
        }
        if self.root.is_some_and(|root| Some(root) != own.root) {
            found.push("a root that is not the container's".to_owned());
        }
        if self.writable {
            found.push("a program that it can overwrite".to_owned());
        }
        if is_stage && self.is_complete {
            // stdio, and the socket by which it is told to go.
            let more = self
                .descriptors
                .iter()
                .filter(|(number, _)| !["0", "1", "2", "3"].contains(&number.as_str()));
            found.extend(more.map(|(number, target)| format!("descriptor {number}, {}", target.display())));
        }
        found
    }
}
