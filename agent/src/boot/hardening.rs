//! Settings of the guest's kernel that keep its containers further from it, and cost nothing.

use std::{fs, io, path::Path};

/// Below /proc/sys. What a kernel does not have needs no setting.
const SETTINGS: [(&str, &str); 13] = [
    // Addresses of the kernel, and what it logs, are of use to nobody but its attackers.
    ("kernel/kptr_restrict", "2"),
    ("kernel/dmesg_restrict", "1"),
    // Only descendants are traced, unless with CAP_SYS_PTRACE.
    ("kernel/yama/ptrace_scope", "1"),
    // The kernel that was booted is the one that runs, with the modules that were loaded from the guest's image.
    // Neither can be undone.
    ("kernel/kexec_load_disabled", "1"),
    ("kernel/modules_disabled", "1"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("kernel/perf_event_paranoid", "3"),
    ("kernel/sysrq", "0"),
    // Programs that changed their user leave no core. Others do as their limit says, which is 0.
    ("fs/suid_dumpable", "0"),
    // What systemd sets on any other machine: no tricks with links and FIFOs of others in /tmp.
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "2"),
];

/// Sets them. Needs /proc.
pub(super) fn apply() {
    for (name, value) in SETTINGS {
        let path = Path::new("/proc/sys").join(name);
        match fs::write(&path, value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot write {value} to {}: {error}", path.display());
            }
            _ => {}
        }
    }
}
