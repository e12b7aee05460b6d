//! Which VMM runs a sandbox, and why.

use std::fmt;

use super::{
    VmSpec, Vmm, VmmError,
    cloud_hypervisor::{CloudHypervisor, version},
    kvm,
    machine::Vm,
    process::Process,
    program::{CLOUD_HYPERVISOR_HINT, find},
    qemu::{Accel, Qemu},
};
use crate::{
    config::{Config, Limits, VmmChoice},
    errors::chain,
};

/// A VMM, and how it runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Cloud Hypervisor on KVM.
    CloudHypervisor,
    /// QEMU.
    Qemu(Accel),
    /// No VM.
    Process,
}

/// The VMM that the next sandbox gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The VMM.
    pub backend: Backend,
    /// For logs and operators: a clause that says what led to it.
    pub reason: String,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::CloudHypervisor => "cloud-hypervisor",
            Backend::Qemu(Accel::Kvm) => "qemu (KVM)",
            Backend::Qemu(Accel::Tcg) => "qemu (emulation)",
            Backend::Process => "process",
        })
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, because {}", self.backend, self.reason)
    }
}

/// Decides what `vmm` in the configuration means on this host, at this moment. Starts no VM.
///
/// Blocks while KVM is tried and a program tells its version: milliseconds, or up to three seconds where
/// KVM hangs.
pub fn choose(config: &Config) -> Choice {
    let configured =
        |backend, name: &str| Choice { backend, reason: format!("the configuration says vmm = \"{name}\"") };
    match config.vmm {
        VmmChoice::CloudHypervisor => configured(Backend::CloudHypervisor, "cloud-hypervisor"),
        VmmChoice::Process => configured(Backend::Process, "process"),
        VmmChoice::Qemu => {
            let (accel, kvm) = match kvm::probe() {
                Ok(()) => (Accel::Kvm, "KVM works".into()),
                Err(error) => (Accel::Tcg, error.to_string()),
            };
            let choice = configured(Backend::Qemu(accel), "qemu");
            Choice { reason: format!("{}, and {kvm}", choice.reason), ..choice }
        }
        VmmChoice::Auto => automatic(
            kvm::probe().map_err(|error| error.to_string()),
            usable_cloud_hypervisor(config).map_err(|error| chain(&error)),
        ),
    }
}

fn usable_cloud_hypervisor(config: &Config) -> Result<(), VmmError> {
    version::check_installed(&find(&config.tools.cloud_hypervisor, CLOUD_HYPERVISOR_HINT)?)
}

fn automatic<T>(kvm: Result<(), String>, cloud_hypervisor: Result<T, String>) -> Choice {
    let (backend, reason) = match (kvm, cloud_hypervisor) {
        (Ok(()), Ok(_)) => {
            (Backend::CloudHypervisor, "KVM works and Cloud Hypervisor is installed".to_owned())
        }
        (Ok(()), Err(unusable)) => (Backend::Qemu(Accel::Kvm), format!("KVM works, but {unusable}")),
        (Err(kvm), _) => (Backend::Qemu(Accel::Tcg), kvm),
    };
    Choice { backend, reason }
}

/// The VM of a new sandbox, not booted yet, with what was chosen for it. Blocks like [`choose`].
pub fn select(config: &Config, spec: VmSpec) -> (Box<dyn Vmm>, Choice) {
    let choice = choose(config);
    tracing::info!(vmm = %choice.backend, reason = choice.reason, sandbox = spec.sandbox_id, "VMM chosen");
    (choice.backend.vm(config, spec), choice)
}

impl Backend {
    /// MiB that it takes on the host beside the memory of the VM; `None` if there is no VM.
    pub fn overhead_mib(self, limits: &Limits) -> Option<u64> {
        match self {
            Backend::CloudHypervisor | Backend::Qemu(Accel::Kvm) => Some(limits.memory_overhead_mib),
            // Translated code is kept, up to 1 GiB of it.
            Backend::Qemu(Accel::Tcg) => Some(limits.memory_overhead_mib.saturating_add(1024)),
            Backend::Process => None,
        }
    }

    /// A VM of this backend, not booted yet.
    pub fn vm(self, config: &Config, spec: VmSpec) -> Box<dyn Vmm> {
        match self {
            Backend::CloudHypervisor => Box::new(Vm::new(CloudHypervisor::new(config, spec))),
            Backend::Qemu(accel) => Box::new(Vm::new(Qemu::new(config, spec, accel))),
            Backend::Process => Box::new(Vm::new(Process::new(config, spec))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cloud_hypervisor_is_taken_only_where_kvm_works() {
        let (no, yes) = (|| Err("KVM cannot run a virtual CPU here".to_owned()), Ok::<(), String>);
        let missing = || Err::<(), _>("cloud-hypervisor was not found".to_owned());
        assert_eq!(automatic(yes(()), yes(())).backend, Backend::CloudHypervisor);
        assert_eq!(automatic(yes(()), missing()).backend, Backend::Qemu(Accel::Kvm));
        assert_eq!(automatic(no(), yes(())).backend, Backend::Qemu(Accel::Tcg));
        assert_eq!(automatic(no(), missing()).backend, Backend::Qemu(Accel::Tcg));
    }

    #[test]
    fn the_reason_names_what_is_in_the_way() {
        let choice = automatic(Err("KVM cannot create a VM here".to_owned()), Ok(()));
        assert_eq!(choice.to_string(), "qemu (emulation), because KVM cannot create a VM here");
    }

    #[test]
    fn no_vm_is_taken_only_if_the_configuration_says_so() {
        let config = Config { vmm: VmmChoice::Process, ..Config::default() };
        let choice = choose(&config);
        assert_eq!(choice.backend, Backend::Process);
        assert!(choice.reason.contains("vmm = \"process\""), "{choice}");
        assert_ne!(choose(&Config::default()).backend, Backend::Process);
    }
}
