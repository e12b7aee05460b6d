//! What a test needs of the machine, and why it is skipped where that is missing.

use std::{
    env,
    fs::File,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
};

use cube_shim::config::VmmChoice;

/// Which VMM runs the sandboxes of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The agent as a process on this host.
    Process,
    /// QEMU, emulating where there is no KVM.
    Qemu,
    /// Cloud Hypervisor on KVM.
    CloudHypervisor,
}

impl Backend {
    /// The value of the `vmm` key in the configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Process => "process",
            Backend::Qemu => "qemu",
            Backend::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// The same as the shim's configuration has it.
    pub fn choice(self) -> VmmChoice {
        match self {
            Backend::Process => VmmChoice::Process,
            Backend::Qemu => VmmChoice::Qemu,
            Backend::CloudHypervisor => VmmChoice::CloudHypervisor,
        }
    }

    /// Whether containers run under a kernel of their own.
    pub fn is_vm(self) -> bool {
        self != Backend::Process
    }

    /// What this machine lacks for this backend.
    pub fn missing(self) -> Option<String> {
        let common = ["containerd", "ctr"];
        let own: &[&str] = match self {
            Backend::Process => &[],
            Backend::Qemu => {
                &["qemu-system-x86_64", "virtiofsd", "vhost-device-vsock", "mkfs.erofs", "mke2fs"]
            }
            Backend::CloudHypervisor => &["cloud-hypervisor", "virtiofsd"],
        };
        if let Some(program) = common.iter().chain(own).find(|program| on_path(program).is_none()) {
            return Some(format!("{program} is not on PATH"));
        }
        if !nix::unistd::geteuid().is_root() {
            return Some("not root".to_owned());
        }
        match self {
            Backend::CloudHypervisor => kvm().err().map(|e| format!("KVM does not work here: {e}")),
            Backend::Process | Backend::Qemu => None,
        }
    }
}

/// The file that a shell would run for `program`.
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

mod ioctls {
    // KVM_CREATE_VM and KVM_CREATE_VCPU of linux/kvm.h.
    nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(0xae, 0x01));
    nix::ioctl_write_int_bad!(create_vcpu, nix::request_code_none!(0xae, 0x41));
}

/// Makes a VM with a virtual CPU: /dev/kvm exists on hosts where that fails.
fn kvm() -> std::io::Result<()> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: both calls take an integer, and answer with a new descriptor that nobody else owns.
    unsafe {
        let vm = OwnedFd::from_raw_fd(ioctls::create_vm(kvm.as_raw_fd(), 0)?);
        OwnedFd::from_raw_fd(ioctls::create_vcpu(vm.as_raw_fd(), 0)?);
    }
    Ok(())
}
