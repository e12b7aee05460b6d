//! The command line of QEMU.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use serde_json::json;

use super::{
    super::{Disk, SHARE_TAG, VmSpec, VmmError, image, virtiofsd},
    Accel, disk, qmp_socket, vsock_device_socket,
};
use crate::config::Guest;

/// Everything that QEMU is told. Only the listed devices exist: no BIOS menu, network, display,
/// keyboard or controller of the default machine, which cost boot time and are attack surface.
pub(super) fn command_line(spec: &VmSpec, guest: &Guest, accel: Accel) -> Result<Vec<OsString>, VmmError> {
    let mut args = Args::default();
    args.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    args.pair("-display", "none");
    args.pair("-name", format!("cube-{}", spec.sandbox_id.replace(',', ",,")));
    args.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    args.pair("-machine", "q35,memory-backend=ram,usb=off,vmport=off,smbus=off,sata=off,hpet=off");
    let (accelerator, cpu) = match accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg,thread=multi", "max"),
    };
    args.pair("-accel", accelerator);
    args.pair("-cpu", cpu);
    args.pair("-smp", spec.vcpus.to_string());
    args.pair("-m", format!("{}M", spec.memory_mib));
    // Shared, for the vhost-user devices live in other processes and read guest memory there.
    args.pair("-object", format!("memory-backend-memfd,id=ram,size={}M,share=on", spec.memory_mib));

    args.pair("-kernel", &guest.kernel);
    args.pair("-initrd", &guest.initrd);
    // Translating code is slow enough; there is no speculation to guard against in it.
    let backend = if accel == Accel::Tcg { "mitigations=off" } else { "" };
    args.pair("-append", image::cmdline(backend, &guest.cmdline, &spec.cmdline));

    // The guest's console comes out of QEMU's standard output, which the shim reads.
    args.pair("-chardev", "stdio,id=console,signal=off");
    args.pair("-serial", "chardev:console");
    args.socket("qmp", &qmp_socket(&spec.run_dir));
    args.pair("-mon", "chardev=qmp,mode=control");

    args.pair("-object", "rng-random,id=entropy,filename=/dev/urandom");
    args.device(json!({"driver": "virtio-rng-pci", "rng": "entropy"}));
    args.socket("vsock", &vsock_device_socket(&spec.run_dir));
    args.device(json!({"driver": "vhost-user-vsock-pci", "chardev": "vsock"}));
    if spec.share.is_some() {
        args.socket("share", &virtiofsd::socket(&spec.run_dir));
        args.device(json!({"driver": "vhost-user-fs-pci", "chardev": "share", "tag": SHARE_TAG}));
    }
    for (number, disk) in spec.disks.iter().enumerate() {
        args.disk(number, disk)?;
    }
    for number in 0..disk::PORTS {
        args.device(disk::port(number));
    }
    Ok(args.0)
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(OsString::from));
    }

    fn pair(&mut self, option: &str, value: impl AsRef<OsStr>) {
        self.0.push(option.into());
        self.0.push(value.as_ref().into());
    }

    fn device(&mut self, device: serde_json::Value) {
        self.pair("-device", device.to_string());
    }

    /// QEMU connects to a socket on which somebody listens already. A comma is doubled in option
    /// lists; `-chardev` does not take JSON.
    fn socket(&mut self, id: &str, path: &Path) {
        let path = path.to_string_lossy().replace(',', ",,");
        self.pair("-chardev", format!("socket,id={id},path={path}"));
    }

    fn disk(&mut self, number: usize, disk: &Disk) -> Result<(), VmmError> {
        let node = format!("disk{number}");
        self.pair("-blockdev", disk::node(&node, disk)?.to_string());
        self.device(disk::device(&node, disk));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            sandbox_id: "s,1".into(),
            run_dir: "/run/cube/a,b".into(),
            cgroup: "/nonexistent".into(),
            user: 0,
            group: 0,
            vcpus: 2,
            memory_mib: 300,
            share: None,
            disks: Vec::new(),
            cmdline: "cube.debug=1".into(),
            restore: None,
        }
    }

    fn line(spec: &VmSpec, accel: Accel) -> Vec<String> {
        let args = command_line(spec, &Guest::default(), accel).unwrap();
        args.into_iter().map(|arg| arg.into_string().unwrap()).collect()
    }

    fn has(line: &[String], option: &str, value: &str) -> bool {
        line.windows(2).any(|pair| pair[0] == option && pair[1].contains(value))
    }

    #[test]
    fn the_size_and_the_memory_behind_it_agree() {
        let line = line(&spec(), Accel::Tcg);
        assert!(has(&line, "-smp", "2") && has(&line, "-m", "300M"), "{line:?}");
        assert!(has(&line, "-object", "memory-backend-memfd,id=ram,size=300M,share=on"), "{line:?}");
    }

    #[test]
    fn emulation_and_kvm_differ_in_processor_and_mitigations() {
        let (tcg, kvm) = (line(&spec(), Accel::Tcg), line(&spec(), Accel::Kvm));
        assert!(has(&tcg, "-cpu", "max") && has(&tcg, "-append", "mitigations=off"), "{tcg:?}");
        assert!(has(&kvm, "-accel", "kvm") && has(&kvm, "-cpu", "host"), "{kvm:?}");
        assert!(!has(&kvm, "-append", "mitigations"), "{kvm:?}");
        assert!(has(&kvm, "-append", " cube.debug=1"), "{kvm:?}");
    }

    #[test]
    fn a_comma_in_a_name_starts_no_option() {
        let line = line(&spec(), Accel::Tcg);
        assert!(has(&line, "-name", "cube-s,,1"), "{line:?}");
        assert!(has(&line, "-chardev", "path=/run/cube/a,,b/qmp.sock"), "{line:?}");
    }

    #[test]
    fn without_a_share_there_is_no_virtiofs() {
        assert!(!line(&spec(), Accel::Tcg).iter().any(|arg| arg.contains("vhost-user-fs")));
        let spec = VmSpec { share: Some("/share".into()), ..spec() };
        assert!(has(&line(&spec, Accel::Tcg), "-device", r#""tag":"cube""#));
    }

    #[test]
    fn a_disk_is_raw_and_carries_its_serial() {
        let file = tempfile::NamedTempFile::with_suffix("a,b").unwrap();
        let disk = Disk { path: file.path().into(), serial: "rootfs-1".into(), read_only: true };
        let line = line(&VmSpec { disks: vec![disk], ..spec() }, Accel::Tcg);
        let blockdev = line.iter().skip_while(|arg| *arg != "-blockdev").nth(1).unwrap();
        let blockdev: serde_json::Value = serde_json::from_str(blockdev).unwrap();
        assert_eq!(blockdev["driver"], "raw");
        assert_eq!(blockdev["read-only"], true);
        assert_eq!(blockdev["file"]["filename"], file.path().to_str().unwrap());
        assert!(has(&line, "-device", r#""serial":"rootfs-1""#), "{line:?}");
    }

    #[test]
    fn there_is_room_for_disks_that_come_later() {
        let line = line(&spec(), Accel::Tcg);
        let ports: Vec<serde_json::Value> = line
            .iter()
            .filter(|arg| arg.contains("pcie-root-port"))
            .map(|arg| serde_json::from_str(arg).unwrap())
            .collect();
        assert_eq!(ports.len(), disk::PORTS);
        for field in ["id", "chassis", "addr"] {
            let mut values: Vec<String> = ports.iter().map(|port| port[field].to_string()).collect();
            values.sort();
            values.dedup();
            assert_eq!(values.len(), disk::PORTS, "{field} is not unique: {ports:?}");
        }
    }

    #[test]
    fn a_disk_that_does_not_exist_is_named() {
        let disk = Disk { path: "/nonexistent/disk".into(), serial: "x".into(), read_only: false };
        let spec = VmSpec { disks: vec![disk], ..spec() };
        let error = command_line(&spec, &Guest::default(), Accel::Tcg).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/disk"), "{error}");
    }
}
