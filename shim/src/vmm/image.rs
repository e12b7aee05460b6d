//! What the guest boots: checked files and the kernel command line.

use std::path::Path;

use super::VmmError;

/// Fails if a file of the guest image is missing. `key` is its key in the `[guest]` table.
pub(crate) fn check(path: &Path, key: &'static str) -> Result<(), VmmError> {
    match path.is_file() {
        true => Ok(()),
        false => Err(VmmError::MissingImage { path: path.into(), key }),
    }
}

/// `quiet`, because every line of a serial console costs the boot about a millisecond. `panic=-1`,
/// so that a kernel that panics restarts at once, which ends the VM. `tsc=reliable` and
/// `no_timer_check` skip calibrations that a busy host would fail; `cryptomgr.notests` skips the
/// self tests of ciphers; `random.trust_cpu` lets the agent have randomness in its first instruction.
const COMMON: &str = "console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable no_timer_check \
     cryptomgr.notests random.trust_cpu=on 8250.nr_uarts=1";

/// The kernel command line: ours, then what the backend needs, then what the configuration says,
/// then what the sandbox says. Of two settings of the same parameter the kernel takes the last.
pub(crate) fn cmdline(backend: &str, configured: &str, sandbox: &str) -> String {
    let parts = [COMMON, backend, configured, sandbox];
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_operator_adds_comes_last() {
        let line = cmdline("a=1", " quiet=no ", "cube.x=y");
        assert!(line.starts_with("console=ttyS0 ") && line.ends_with(" a=1 quiet=no cube.x=y"), "{line}");
        assert!(!line.contains("  "), "{line}");
    }

    #[test]
    fn a_missing_file_is_named_with_its_key_and_the_way_to_make_it() {
        let error = check(Path::new("/nonexistent/vmlinux"), "vmlinux").unwrap_err().to_string();
        for part in ["/nonexistent/vmlinux", "guest.vmlinux", "build-guest"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
