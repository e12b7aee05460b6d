//! The guest's cgroup v2 tree: the agent in a leaf, containers in a subtree with every controller.
//!
//! cgroups(7), "no internal processes": a group that hands controllers to its children may have no
//! process of its own, the root excepted. The agent leaves the root all the same, so that its own
//! memory is accounted apart from that of the kernel's threads.

use std::{fs, path::Path};

use super::BootError;

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "/sys/fs/cgroup/agent";

/// Below it each container has its group.
pub const CONTAINERS: &str = "/sys/fs/cgroup/cube";

/// Makes the tree. Needs cgroup2 at /sys/fs/cgroup.
pub(super) fn set_up() -> Result<(), BootError> {
    for group in [AGENT, CONTAINERS] {
        fs::create_dir_all(group).map_err(BootError::io("cannot create the cgroup", group))?;
    }
    let procs = Path::new(AGENT).join("cgroup.procs");
    // "0" is the writer.
    fs::write(&procs, "0").map_err(BootError::io("cannot write to", &procs))?;
    delegate(Path::new(ROOT))?;
    delegate(Path::new(CONTAINERS))
}

/// Hands every controller that `group` has to its children. One at a time: a controller that
/// refuses (cpuset without CPUs, cpu with realtime processes) must not cost the others.
pub(super) fn delegate(group: &Path) -> Result<(), BootError> {
    let available = group.join("cgroup.controllers");
    let controllers = fs::read_to_string(&available).map_err(BootError::io("cannot read", &available))?;
    for controller in controllers.split_ascii_whitespace() {
        let control = group.join("cgroup.subtree_control");
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            tracing::warn!(path = %control.display(), controller, %error, "cannot delegate a cgroup controller");
        }
    }
    Ok(())
}
