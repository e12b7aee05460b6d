//! Finding the programs that backends run.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::VmmError;

/// Where programs are looked for behind `PATH`: containerd's own may be short, and distributions
/// put virtiofsd into a directory that is on nobody's.
const FALLBACK_DIRS: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/usr/sbin", "/usr/libexec"];

pub(crate) const CLOUD_HYPERVISOR_HINT: &str = "install a release of \
     https://github.com/cloud-hypervisor/cloud-hypervisor, or set tools.cloud_hypervisor in the configuration file";
pub(crate) const QEMU_HINT: &str =
    "`apt-get install qemu-system-x86`, or set tools.qemu in the configuration file";
pub(crate) const VIRTIOFSD_HINT: &str =
    "`cargo install virtiofsd`, or set tools.virtiofsd in the configuration file";
pub(crate) const VSOCK_HINT: &str =
    "`cargo install vhost-device-vsock`, or set tools.vhost_device_vsock in the configuration file";
pub(crate) const AGENT_HINT: &str =
    "`make install` installs it, and writes a configuration file that names it in tools.agent";

pub(crate) const RESTORE_HINT: &str =
    "set vmm = \"cloud-hypervisor\" in the configuration file, on a host with KVM";

/// The executable that `program` means: a path as it is, a name on `PATH`.
pub fn find(program: &Path, hint: &'static str) -> Result<PathBuf, VmmError> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates: Vec<PathBuf> = match program.is_absolute() {
        true => vec![program.into()],
        false => env::split_paths(&path)
            .chain(FALLBACK_DIRS.map(PathBuf::from))
            .map(|dir| dir.join(program))
            .filter(|candidate| candidate.is_absolute())
            .collect(),
    };
    candidates.retain(|candidate| is_executable(candidate));
    candidates.into_iter().next().ok_or_else(|| VmmError::MissingProgram { program: program.into(), hint })
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_up_and_a_path_is_taken_as_it_is() {
        let sh = find(Path::new("sh"), "").unwrap();
        assert!(sh.is_absolute() && sh.ends_with("sh"));
        assert_eq!(find(&sh, "").unwrap(), sh);
    }

    #[test]
    fn a_missing_program_is_named_with_the_way_to_get_it() {
        for missing in ["no-such-vmm", "/nonexistent/no-such-vmm", "/etc/passwd", "/tmp"] {
            let error = find(Path::new(missing), QEMU_HINT).unwrap_err().to_string();
            assert!(error.contains(missing) && error.contains("apt-get install"), "{error}");
        }
    }
}
