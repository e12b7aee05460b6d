//! The namespaces of a container: which are new, which are joined, which are the guest's.

use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use super::ContainerError;

/// What the spec asks for. A kind that is in none of the fields is shared with the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Namespaces {
    /// `CLONE_NEW…` flags of the namespaces that the stage makes for itself.
    unshare: i32,
    /// Namespaces that the stage joins, in the spec's order.
    pub(super) join: Vec<Join>,
    pub(super) pid: Pid,
}

/// A namespace file, and the `CLONE_NEW…` flag of its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) kind: i32,
    pub(super) path: PathBuf,
}

/// The pid namespace stands apart: a process never changes its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Pid {
    /// The stage is born as pid 1 of a new one, where nobody else is.
    New,
    /// The stage stays outside, and a child of it that has nothing but what is the container's goes in:
    /// others live there, and a process with `CAP_SYS_PTRACE` may take over whatever it sees.
    Join(PathBuf),
    /// The agent's own. Whoever may trace processes there may trace the agent.
    Guest,
}

impl Namespaces {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self, ContainerError> {
        // The host's cgroup tree means nothing in the guest, and the guest's is not the container's
        // business: it always gets its own view.
        let mut namespaces =
            Self { unshare: CloneFlags::CLONE_NEWCGROUP.bits(), join: Vec::new(), pid: Pid::Guest };
        let listed =
            spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
        for (index, namespace) in listed.iter().enumerate() {
            let field = || format!("linux.namespaces[{index}]");
            let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty());
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                let reason = "the path of a namespace must be absolute";
                return Err(ContainerError::invalid(format!("{}.path", field()), path.display(), reason));
            }
            match (namespace.typ(), path) {
                (LinuxNamespaceType::User, _) => {
                    return Err(ContainerError::unsupported(format!("{} (user namespace)", field())));
                }
                (LinuxNamespaceType::Time, _) => {
                    return Err(ContainerError::unsupported(format!("{} (time namespace)", field())));
                }
                (LinuxNamespaceType::Mount, Some(_)) => {
                    return Err(ContainerError::unsupported(format!("{}.path (mount namespace)", field())));
                }
                (LinuxNamespaceType::Pid, None) => namespaces.pid = Pid::New,
                (LinuxNamespaceType::Pid, Some(path)) => namespaces.pid = Pid::Join(path.to_owned()),
                // The guest is the sandbox, and its network is the sandbox's.
                (LinuxNamespaceType::Network, None) => {}
                (kind, None) => namespaces.unshare |= kind as i32,
                (kind, Some(path)) => namespaces.add_join(kind as i32, path),
            }
        }
        if namespaces.unshare & CloneFlags::CLONE_NEWNS.bits() == 0 {
            return Err(ContainerError::Unsupported {
                field: "linux.namespaces without a mount namespace".into(),
                hint: Some("add {\"type\": \"mount\"}"),
            });
        }
        Ok(namespaces)
    }

    fn add_join(&mut self, kind: i32, path: &Path) {
        self.unshare &= !kind;
        self.join.push(Join { kind, path: path.to_owned() });
    }

    /// Those that the stage makes at once: all but the cgroup namespace, whose root is where the
    /// process is when it is made.
    pub(super) fn unshare_first(&self) -> CloneFlags {
        CloneFlags::from_bits_truncate(self.unshare) - CloneFlags::CLONE_NEWCGROUP
    }

    /// Whether the container has a cgroup namespace of its own.
    pub(super) fn unshare_cgroup(&self) -> bool {
        CloneFlags::from_bits_truncate(self.unshare).contains(CloneFlags::CLONE_NEWCGROUP)
    }
}

/// Whether `spec` gives the container a namespace of this kind that is not simply the runtime's own.
pub(super) fn is_listed(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    listed.iter().any(|namespace| namespace.typ() == kind)
}
