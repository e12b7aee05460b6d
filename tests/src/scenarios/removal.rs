//! Clean-up costs nobody a file, however the configured directories are named.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use nix::sys::signal::{Signal, kill};

use crate::{
    command::{poll, start},
    lab::{Lab, Setup},
    leftovers,
    needs::Backend,
};

/// Such a container has no `PATH`.
const WAIT: [&str; 3] = ["/bin/sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.1; done"];

/// What the host has, and how to give it to a container.
struct Host {
    lab: Lab,
    rootfs: PathBuf,
    volume: PathBuf,
    before: BTreeMap<PathBuf, Vec<u8>>,
}

impl Host {
    fn new(backend: Backend) -> Host {
        let lab = Lab::with(Setup { through_links: true, ..backend.into() });
        let (rootfs, volume) = (lab.dir().join("rootfs"), lab.dir().join("volume"));
        lab.unpack(&rootfs);
        fs::create_dir_all(volume.join("sub/deep")).unwrap();
        fs::create_dir(volume.join("empty")).unwrap();
        fs::write(volume.join("file"), "of the host").unwrap();
        fs::write(volume.join("sub/deep/file"), "").unwrap();
        let mut before = BTreeMap::new();
        [&rootfs, &volume].into_iter().for_each(|dir| files(dir, &mut before));
        assert!(before.len() > 10, "{before:?}");
        lab.disown_what_exists();
        Host { lab, rootfs, volume, before }
    }

    /// `ctr run` with the directory as rootfs, and the volume both as a whole and as one file.
    fn run(&self, flags: &[&str], id: &str, argv: &[&str]) -> crate::command::Running {
        let mount = |from: &str, to: &str| {
            format!("type=bind,src={},dst={to},options=rbind:rw", self.volume.join(from).display())
        };
        let (whole, one) = (mount("", "/volume"), mount("file", "/one"));
        let flags = [flags, &["--mount", &whole, "--mount", &one]].concat();
        start(&mut self.lab.rootfs_command(&flags, &self.rootfs, id, argv))
    }

    #[track_caller]
    fn has_all_its_files(&self) {
        let mut now = BTreeMap::new();
        [&self.rootfs, &self.volume].into_iter().for_each(|dir| files(dir, &mut now));
        let lost: Vec<_> = self.before.iter().filter(|(path, text)| now.get(*path) != Some(text)).collect();
        let lost: Vec<_> = lost.iter().map(|(path, _)| path).collect();
        assert!(lost.is_empty(), "{} of {} are lost: {lost:#?}", lost.len(), self.before.len());
    }
}

/// Files below `dir` with their contents; of directories and links that they are there.
fn files(dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        let content = if kind.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
        found.insert(entry.path(), content);
        if kind.is_dir() {
            files(&entry.path(), found);
        }
    }
}

/// A normal exit, a task that is deleted by force, a shim that was killed, and what only `gc` finds.
pub fn rootfs_and_volumes_of_the_host_outlive_their_containers_where_directories_are_links(backend: Backend) {
    let host = Host::new(backend);
    let lab = &host.lab;
    let script = "echo of the guest > /volume/new; cat /volume/file /one";
    let ended = host.run(&["--rm"], "a", &["/bin/sh", "-c", script]).wait(lab.limit()).succeeds();
    assert_eq!(ended.out(), "of the hostof the host");
    host.has_all_its_files();
    assert_eq!(fs::read_to_string(host.volume.join("new")).unwrap(), "of the guest\n");
    lab.nothing_is_left();

    let detached = ["--detach", "--null-io"];
    host.run(&detached, "b", &WAIT).wait(lab.limit()).succeeds();
    lab.remove("b");
    host.has_all_its_files();
    lab.nothing_is_left();

    host.run(&detached, "c", &WAIT).wait(lab.limit()).succeeds();
    kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
    assert!(
        poll(lab.limit(), || lab.task("c").is_none_or(|(state, _)| state == "STOPPED")),
        "the task lives on"
    );
    lab.ctr(&["task", "delete", "--force", "c"]);
    lab.ctr(&["container", "delete", "c"]).succeeds();
    host.has_all_its_files();
    lab.nothing_is_left();

    host.run(&detached, "d", &WAIT).wait(lab.limit()).succeeds();
    lab.kill_containerd();
    kill(lab.shim_pid("d"), Signal::SIGKILL).unwrap();
    for cgroup in leftovers::cgroups(&[lab.key("d")]) {
        fs::write(cgroup.join("cgroup.kill"), "1").unwrap();
    }
    let run_dir = lab.run_dir().join(lab.key("d"));
    assert!(run_dir.exists());
    lab.cubecli(&["cubebox", "gc"]).succeeds();
    assert!(!run_dir.exists(), "gc has left it");
    host.has_all_its_files();
    lab.start_containerd();
    lab.ctr(&["task", "delete", "--force", "d"]);
    lab.ctr(&["container", "delete", "d"]).succeeds();
    lab.nothing_is_left();
    host.has_all_its_files();
}
