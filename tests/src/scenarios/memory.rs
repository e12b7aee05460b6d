//! Limits: what only a kernel with controllers of its own can enforce.

use serde_json::json;

use crate::{
    command::start,
    direct::{Direct, bind_mount, ext4_mount, spec},
    lab::Lab,
    needs::Backend,
};

/// The event, the exit status, and a guest that lives on until then.
pub fn running_out_of_memory_is_an_event_and_137(backend: Backend) {
    let lab = Lab::new(backend);
    let events = start(&mut lab.ctr_command(&["events"]));
    let flags = ["--memory-limit", "67108864"];
    lab.run_with(&flags, "c", &["cube-test-writer", "hog", "256"]).exits_with(137);
    events.stdout.wait_for("/tasks/oom", lab.limit());
    drop(events);
    lab.nothing_is_left();
}

/// The limit holds, and the agent still answers.
pub fn a_fork_bomb_under_a_pids_limit_leaves_the_agent_answering(backend: Backend) {
    let lab = Lab::new(backend);
    let bomb = "cube-test-writer forks 500 > /tmp/result; f() { f | f & }; f; while :; do sleep 1; done";
    let mut direct = Direct::new(&lab, "c", &["sh", "-c", bomb]);
    let mut limited = spec(&["sh", "-c", bomb]);
    limited["linux"]["resources"] = json!({ "pids": { "limit": 40 } });
    direct.write_spec(&limited);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let result = rootfs.join("tmp/result");
    let counted = || std::fs::read_to_string(&result).unwrap_or_default();
    assert!(crate::command::poll(lab.limit(), || counted().contains("then")), "no limit: {:?}", counted());
    let processes: u32 = counted().split(' ').next().unwrap().parse().unwrap();
    assert!((10..40).contains(&processes), "{}", counted());
    for _ in 0..20 {
        direct.task().pids(direct.context(), &pids_request()).unwrap();
        direct.task().stats(direct.context(), &stats_request()).unwrap();
    }
    direct.kill(9).unwrap();
    assert_eq!(direct.wait().unwrap(), 137);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

fn pids_request() -> containerd_shim_protos::api::PidsRequest {
    containerd_shim_protos::api::PidsRequest { id: "c".into(), ..Default::default() }
}

fn stats_request() -> containerd_shim_protos::api::StatsRequest {
    containerd_shim_protos::api::StatsRequest { id: "c".into(), ..Default::default() }
}

/// Without virtiofsd: a block device that the guest mounts by itself, and has written out when Delete
/// returns.
pub fn an_ext4_rootfs_is_a_block_device_of_the_vm(backend: Backend) {
    let lab = Lab::new(backend);
    let argv = ["sh", "-c", "grep ' / ' /proc/mounts && echo written > /file && exit 9"];
    let mut direct = Direct::new(&lab, "c", &argv);
    let tree = direct.unpack_image();
    let image = lab.dir().join("direct/rootfs.ext4");
    let mut mke2fs = std::process::Command::new("mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("32M");
    start(&mut mke2fs).wait(lab.limit()).succeeds();
    direct.start_shim();
    direct.create(ext4_mount(&image)).unwrap();
    let shares: Vec<_> = lab.leftovers().into_iter().filter(|line| line.contains("virtiofsd ")).collect();
    assert_eq!(shares, Vec::<String>::new(), "a block rootfs needs no virtiofsd");
    direct.start().unwrap();
    assert_eq!(direct.wait().unwrap(), 9);
    direct.delete().unwrap();
    let log = std::fs::read_to_string(lab.log_dir("c").join("stdout")).unwrap();
    assert!(log.contains("ext4"), "{log}");
    let mut debugfs = std::process::Command::new("debugfs");
    let written = start(debugfs.args(["-R", "cat /file"]).arg(&image)).wait(lab.limit()).succeeds().out();
    assert_eq!(written, "written\n");
    direct.finish();
    lab.nothing_is_left();
}
