//! What specs say that means something else in a VM, and what clients ask of a container.

use std::{fs, io::Read, path::PathBuf};

use containerd_shim_protos::{api::UpdateTaskRequest, protobuf::well_known_types::any::Any};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, makedev, mknod},
};
use serde_json::{Value, json};

use super::{WAIT, lab_with_waiting_container};
use crate::{
    command::poll,
    direct::{Direct, bind_mount, spec},
    lab::Lab,
    needs::Backend,
};

/// A node of the host with these numbers.
fn node(lab: &Lab, name: &str, kind: SFlag, major: u64, minor: u64) -> PathBuf {
    let path = lab.dir().join(name);
    mknod(&path, kind, Mode::from_bits_truncate(0o666), makedev(major, minor)).unwrap();
    path
}

/// By path and by number: in the guest the number means another device, or none.
pub fn a_device_of_the_host_is_refused_by_name(backend: Backend) {
    let lab = Lab::new(backend);
    for (name, kind, major, minor) in [("vda", SFlag::S_IFBLK, 254, 0), ("kvm", SFlag::S_IFCHR, 10, 232)] {
        let path = node(&lab, name, kind, major, minor);
        let path = path.to_str().unwrap();
        let words = [path, &format!("{major}:{minor}"), "which the vm does not have"];
        lab.run_with(&["--device", path], "c", &["true"]).fails_with(&words);
        let volume = format!("type=bind,src={path},dst=/dev/x,options=rbind");
        lab.run_with(&["--mount", &volume], "c", &["true"]).fails_with(&[path, "the device is the host's"]);
    }
    lab.nothing_is_left();
}

/// `/dev/null` over a file, and a device that every kernel has; a privileged container goes without the rest.
pub fn files_are_masked_and_a_privileged_container_runs_without_the_hosts_devices(backend: Backend) {
    let lab = Lab::new(backend);
    let masked = "type=bind,src=/dev/null,dst=/etc/passwd,options=rbind:ro";
    let script = "wc -c < /etc/passwd; test -c /etc/passwd && echo x > /dev/zero && echo usable";
    let seen = lab.run_with(&["--mount", masked, "--device", "/dev/zero"], "c", &["sh", "-c", script]);
    assert_eq!(seen.succeeds().out(), "0\nusable\n");
    let script = "test ! -b /dev/vda && test -c /dev/null && echo runs";
    let seen = lab.run_with(&["--privileged"], "c", &["sh", "-c", script]);
    assert_eq!(seen.succeeds().out(), "runs\n");
    lab.nothing_is_left();
}

/// A volume holds no way to the devices of whoever opens it.
pub fn a_node_below_a_volume_opens_no_device(backend: Backend) {
    let lab = Lab::new(backend);
    let volume = lab.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    node(&lab, "volume/null", SFlag::S_IFCHR, 1, 3);
    let mount = format!("type=bind,src={},dst=/v,options=rbind:rw", volume.display());
    let finished = lab.run_with(&["--mount", &mount], "c", &["sh", "-c", "cat /v/null; echo $?"]);
    assert_eq!(finished.out(), "1\n", "{finished}");
    assert!(finished.err().contains("Permission denied"), "{finished}");
    lab.nothing_is_left();
}

/// Runs `config`'s container to its end, and gives what it wrote.
fn output(direct: &mut Direct<'_>, config: &Value) -> String {
    let rootfs = direct.unpack_image();
    direct.write_spec(config);
    let [mut stdout, _stderr] = direct.read_fifos();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let mut seen = String::new();
    stdout.read_to_string(&mut seen).unwrap();
    assert_eq!(direct.wait().unwrap(), 0, "{seen}");
    direct.delete().unwrap();
    seen
}

/// As containerd 2 sets them for each pod; and a host name, where the spec has none.
pub fn sysctls_of_the_network_are_set_and_a_guest_has_a_name(backend: Backend) {
    let lab = Lab::new(backend);
    let script =
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range; hostname";
    let mut config = spec(&["sh", "-c", script]);
    config["linux"]["sysctl"] = json!({
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "0 2147483647",
    });
    let mut direct = Direct::new(&lab, "c", &["true"]);
    assert_eq!(output(&mut direct, &config), "0\n0\t2147483647\nc\n");
    direct.finish();
    lab.nothing_is_left();
}

/// nerdctl sends all of the spec's resources, with the rules for devices.
pub fn an_update_may_repeat_the_rules_for_devices(backend: Backend) {
    let lab = Lab::new(backend);
    let rules = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]);
    let mut config = spec(&["sleep", "1000"]);
    config["linux"]["resources"] = json!({"devices": rules});
    let mut direct = Direct::new(&lab, "c", &["true"]);
    let rootfs = direct.unpack_image();
    direct.write_spec(&config);
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let update = |resources: Value| {
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
        let any = Any { type_url, value: resources.to_string().into_bytes(), ..Default::default() };
        let request = UpdateTaskRequest { id: "c".into(), resources: Some(any).into(), ..Default::default() };
        direct.task().update(direct.context(), &request)
    };
    // Processors that this guest does not have are no error either.
    update(json!({"devices": rules, "cpu": {"cpus": "60000-60007"}})).unwrap();
    let error = update(json!({"devices": [{"allow": true, "access": "rwm"}]})).unwrap_err().to_string();
    assert!(error.contains("linux.resources.devices"), "{error}");
    let limits = json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}});
    let error = update(limits).unwrap_err().to_string();
    assert!(error.contains("linux.resources.blockIO.throttleReadBpsDevice"), "{error}");
    direct.kill(9).unwrap();
    assert_eq!(direct.wait().unwrap(), 137);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

/// Each with the pid that the host knows, and in its info the pid in the guest.
pub fn every_process_of_a_container_is_listed(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    lab.ctr(&["task", "exec", "--detach", "--exec-id", "e1", "c", "sleep", "1000"]).succeeds();
    let (_, pid) = lab.task("c").unwrap();
    let listed = lab.ctr(&["task", "ps", "c"]).succeeds().out();
    let rows: Vec<&str> = listed.lines().skip(1).collect();
    // The shell and the exec; the shell may just have a sleep of its own.
    assert!((2..=3).contains(&rows.len()), "{listed}");
    for row in rows {
        assert!(row.starts_with(&pid.to_string()) && row.to_lowercase().contains("pid:"), "{listed}");
    }
    lab.remove("c");
    lab.nothing_is_left();
}

/// Mounts of this host, unmounted with the test, the last one first.
struct Mounted(Vec<PathBuf>);

impl Drop for Mounted {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
}

/// It appears in the guest, and can be unmounted when the sandbox has ended, whatever the guest had looked at.
pub fn a_mount_below_an_rslave_volume_appears_and_can_be_unmounted_after_the_end(backend: Backend) {
    let lab = Lab::new(backend);
    let volume = lab.dir().join("volume");
    let sub = volume.join("sub");
    fs::create_dir_all(&sub).unwrap();
    let none = None::<&str>;
    mount(Some(&volume), &volume, none, MsFlags::MS_BIND, none).unwrap();
    let mut mounted = Mounted(vec![volume.clone()]);
    mount(none, &volume, none, MsFlags::MS_SHARED, none).unwrap();
    let flag = format!("type=bind,src={},dst=/v,options=rbind:rw:rslave", volume.display());
    lab.detached_with(&["--mount", &flag], "c", &WAIT);

    mount(Some("tmpfs"), &sub, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mounted.0.push(sub.clone());
    fs::write(sub.join("later"), "made later\n").unwrap();
    assert_eq!(lab.exec("c", &["cat", "/v/sub/later"]).succeeds().out(), "made later\n");
    lab.remove("c");
    assert!(poll(lab.limit(), || umount2(&sub, MntFlags::UMOUNT_NOFOLLOW).is_ok()), "{sub:?} is busy");
    mounted.0.pop();
    assert!(!sub.join("later").exists());
    drop(mounted);
    lab.nothing_is_left();
}
