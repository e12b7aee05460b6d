//! A scope of systemd: where systemd manages the cgroups, whoever wants one asks it.
//!
//! Asked with busctl(1), which is a part of systemd: one call for each sandbox is not worth a library for D-Bus in
//! every shim. See org.freedesktop.systemd1(5), StartTransientUnit.

use std::{
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{CgroupError, Hierarchy};

/// What the name of a scope ends with.
pub(super) const SUFFIX: &str = ".scope";

/// Time for systemd to make it.
const LIMIT: Duration = Duration::from_secs(10);

/// How often to look whether it has, or whether it has removed one.
const LOOK: Duration = Duration::from_millis(1);

/// Whether systemd runs this host, as sd_booted(3) finds out.
pub(super) fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Makes the scope with the cgroup `dir`, with this process in it: there is none without a process. What is below is
/// ours then, and systemd removes the scope when the last process has left it.
///
/// # Errors
///
/// [`CgroupError::Scope`], with what systemd says.
pub(super) fn start(dir: &Path) -> Result<(), CgroupError> {
    let name = |dir: &Path| dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let unit = name(dir);
    // Below the root there is the slice of that name.
    let slice =
        dir.parent().map(name).filter(|parent| parent.ends_with(".slice")).unwrap_or("-.slice".into());
    let failed = |why: String| CgroupError::Scope { unit: unit.clone(), slice: slice.clone(), why };
    let deadline = Instant::now() + LIMIT;
    loop {
        match ask(&unit, &slice) {
            Ok(()) => break,
            // That of an earlier sandbox of this name is just being removed.
            Err(why) if why.contains("already") && Instant::now() < deadline => thread::sleep(10 * LOOK),
            Err(why) => return Err(failed(why)),
        }
    }
    let hierarchy = Hierarchy::find()?;
    while hierarchy.own().as_deref() != Some(dir) {
        if Instant::now() >= deadline {
            return Err(failed(format!("this process was not in {} after {LIMIT:?}", dir.display())));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Waits until systemd has removed the scope with the cgroup `dir`, which no process is in any more. Whoever removes the
/// cgroup before it has looked leaves it with a scope that never ends, and whose name is taken.
pub(super) fn is_gone(dir: &Path, deadline: Instant) -> bool {
    while dir.exists() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(LOOK);
    }
    true
}

/// The arguments of busctl that ask for it.
fn arguments(unit: &str, slice: &str, pid: u32) -> Vec<String> {
    let call = [
        "--system",
        "--quiet",
        "--timeout=10",
        "call",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
        unit,
        "fail",
    ];
    let properties: [&[&str]; 6] = [
        &["Description", "s", "Cubebox sandbox"],
        &["Slice", "s", slice],
        &["Delegate", "b", "true"],
        &["DefaultDependencies", "b", "false"],
        // One that ended badly does not keep its name.
        &["CollectMode", "s", "inactive-or-failed"],
        &["PIDs", "au", "1", &pid.to_string()],
    ];
    let mut arguments: Vec<_> = call.map(String::from).into();
    arguments.push(properties.len().to_string());
    arguments.extend(properties.iter().flat_map(|property| property.iter().map(|word| (*word).to_owned())));
    // No auxiliary units.
    arguments.push("0".into());
    arguments
}

fn ask(unit: &str, slice: &str) -> Result<(), String> {
    let mut busctl = Command::new("busctl");
    busctl.args(arguments(unit, slice, std::process::id())).stdin(Stdio::null());
    match busctl.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.trim().chars().filter(|c| !c.is_control()).take(500).collect())
        }
        Err(e) => Err(format!("cannot run busctl: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_is_asked_for_a_scope_of_ours_in_the_slice_of_the_spec() {
        let arguments = arguments("cube-0123.scope", "kubepods-podx.slice", 42).join(" ");
        let expected = "StartTransientUnit ssa(sv)a(sa(sv)) cube-0123.scope fail 6 Description s Cubebox sandbox \
                        Slice s kubepods-podx.slice Delegate b true DefaultDependencies b false \
                        CollectMode s inactive-or-failed PIDs au 1 42 0";
        assert!(arguments.ends_with(expected), "{arguments}");
    }
}
