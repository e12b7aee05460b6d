//! Which versions of Cloud Hypervisor will do.

use std::{
    io::{self, Read},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use nix::unistd::Pid;
use serde_json::Value;

use super::{
    super::{VmmError, kvm::wait_for_exit, program::CLOUD_HYPERVISOR_HINT},
    api::Api,
};

/// The oldest major version.
///
/// From 52 on, a restore ends the guest's old vsock connections, which would hang otherwise, and a
/// snapshot leaves out the memory that the guest never used. From 53 on, the guest's clock and TSC go on
/// after a restore, a half-closed vsock connection does not lose what is under way, and a disk that is
/// added appears in the guest only when it can be used.
pub(in super::super) const NEEDED: u32 = 53;

/// Printing a version takes milliseconds, on an overloaded host seconds.
const LIMIT: Duration = Duration::from_secs(10);

/// Fails if the program is too old or tells no version. Runs it: blocks for milliseconds, for [`LIMIT`]
/// at most.
pub(in super::super) fn check_installed(program: &Path) -> Result<(), VmmError> {
    let printed = print(program).map_err(|source| VmmError::Io {
        action: "cannot run",
        path: program.into(),
        source,
    })?;
    check(program, printed.lines().next().unwrap_or_default())
}

/// The version of the VMM behind `api`. Fails if it is too old.
pub(super) async fn check_running(api: &Api, program: &Path, limit: Duration) -> Result<String, VmmError> {
    let ping = api.get("vmm.ping", limit).await?;
    // `build_version` is more exact, but its form is up to whoever built it.
    let version = ping.get("version").and_then(Value::as_str).unwrap_or_default();
    check(program, version).map(|()| version.to_owned())
}

/// Whether Cloud Hypervisor `ours` may try to restore what `theirs` has written.
///
/// Its documentation promises no more than that the code which reads a snapshot looks after changes of its
/// format (docs/live_migration.md, Version Compatibility), and its release notes of 2022 have it that from
/// one major version to the next it "has worked for some versions". That code can only know formats that
/// were there before it: so the version that wrote a snapshot and newer ones are tried, and older ones are
/// refused. Only v53 reading what v53 had written was
/// tried.
pub(super) fn may_restore(ours: &str, theirs: &str) -> bool {
    match (number(ours), number(theirs)) {
        (Some(ours), Some(theirs)) => ours >= theirs,
        _ => false,
    }
}

fn check(program: &Path, version: &str) -> Result<(), VmmError> {
    match major(version) {
        Some(NEEDED..) => Ok(()),
        _ => Err(VmmError::TooOld {
            program: program.into(),
            found: format!("{:?}", version.trim_start_matches("cloud-hypervisor ")),
            needed: NEEDED,
            hint: CLOUD_HYPERVISOR_HINT,
        }),
    }
}

fn major(version: &str) -> Option<u32> {
    Some(number(version)?.0)
}

/// The major and minor version: what `git describe` makes of a release's tag `v53.0`, which is
/// `v53.0-34-gabcdef-dirty` between two releases, or a package's `53.0.0`.
fn number(version: &str) -> Option<(u32, u32)> {
    let last_word = version.split_whitespace().last()?;
    let number = last_word.trim_start_matches(|c: char| !c.is_ascii_digit());
    let (major, minor) = number.split_once('.')?;
    let minor = minor.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn print(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let ended = wait_for_exit(Pid::from_raw(child.id().cast_signed()), LIMIT)?;
    if !ended {
        child.kill()?;
    }
    child.wait()?;
    let mut printed = String::new();
    // What it printed is in the pipe: it does not wait for somebody to read a line or two.
    child.stdout.take().map(|pipe| pipe.take(4096).read_to_string(&mut printed)).transpose()?;
    match ended {
        true => Ok(printed),
        false => Err(io::Error::new(io::ErrorKind::TimedOut, "it did not print its version in time")),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn releases_builds_between_them_and_dirty_ones_are_told_apart() {
        for (version, expected) in [
            ("cloud-hypervisor v53.0", Some(53)),
            ("cloud-hypervisor v53.0.0", Some(53)),
            ("cloud-hypervisor v52.0-34-gabcdef1", Some(52)),
            ("cloud-hypervisor v53.0-246-gae44c2971-dirty", Some(53)),
            ("cloud-hypervisor v100.1-dirty", Some(100)),
            ("cloud-hypervisor msft/v45.0.321", Some(45)),
            ("54.0.0", Some(54)),
            ("cloud-hypervisor", None),
            ("cloud-hypervisor v53", None),
            ("cloud-hypervisor 99999999999.0", None),
            ("", None),
        ] {
            assert_eq!(major(version), expected, "{version:?}");
        }
    }

    #[test]
    fn what_a_newer_one_has_written_is_refused() {
        for (ours, theirs, may) in [
            ("v53.0.0", "v53.0.0", true),
            ("v53.0-246-gae44c2971-dirty", "53.0.0", true),
            ("v54.0", "v53.1", true),
            ("v53.1", "v53.0", true),
            ("v53.0", "v53.1", false),
            ("v53.9", "v54.0", false),
            ("v53.0", "", false),
            ("v53.0", "of my own", false),
        ] {
            assert_eq!(may_restore(ours, theirs), may, "{ours} for {theirs}");
        }
    }

    #[test]
    fn one_that_is_too_old_is_refused_with_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        let prints = |version: &str| {
            let script =
                format!("#!/bin/sh\necho cloud-hypervisor {version}\necho Migration Protocol Versions: 0\n");
            // A file that is still open for writing cannot be run, and other tests fork.
            fs::write(program.with_extension("new"), script).unwrap();
            fs::set_permissions(program.with_extension("new"), PermissionsExt::from_mode(0o755)).unwrap();
            fs::rename(program.with_extension("new"), &program).unwrap();
            loop {
                match check_installed(&program) {
                    Err(VmmError::Io { source, .. }) if source.raw_os_error() == Some(libc::ETXTBSY) => {}
                    result => return result,
                }
            }
        };
        prints("v53.0-2-g1234567-dirty").unwrap();
        let error = prints("v52.0-34-gabcdef1").unwrap_err().to_string();
        for part in [program.to_str().unwrap(), "v52.0-34-gabcdef1", "version 53 or newer", "install"] {
            assert!(error.contains(part), "{error}");
        }
        let error = prints("of my own").unwrap_err().to_string();
        assert!(error.contains("\"of my own\"") && error.contains("53"), "{error}");
    }
}
