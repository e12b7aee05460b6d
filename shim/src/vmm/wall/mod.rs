//! What a process of a sandbox may reach on the host: as little as it needs.
//!
//! A process gets namespaces of its own, and there a root that holds nothing but what is listed in its
//! [`Root`], at the paths that it has on the host; a user; the capabilities that are listed, of which it can
//! never have more; and limits. All of it is in force before the program runs: [`spawn()`] does it between
//! clone(2) and execve(2).

mod filter;
pub(crate) mod inside;
pub mod keeper;
pub(super) mod landlock;
mod root;
mod spawn;
mod step;

use std::path::Path;

use super::VmmError;

pub use self::spawn::SpawnError;
use self::step::Step;
pub(crate) use self::{
    root::Root,
    spawn::{Started, spawn},
};

/// Every namespace that is not the user's or the cgroup's. There is no cgroup namespace: below one, cgroup2
/// mounted with `nsdelegate` lets the agent move no process from its own cgroup into another.
const NAMESPACES: libc::c_int =
    libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// Descriptors that a process may have open: those that Linux lets a process have without being asked, and far
/// more than the devices of a VM need.
const FILES: u64 = 4096;

/// What virtiofsd needs to act on files as the guest's users do. No CAP_MKNOD: a node that a guest makes in a
/// volume could be opened by the users of the host.
const FILE_CAPABILITIES: [u8; 8] = [
    0,  // CAP_CHOWN
    1,  // CAP_DAC_OVERRIDE
    3,  // CAP_FOWNER
    4,  // CAP_FSETID
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    8,  // CAP_SETPCAP: it clears its bounding set with that, and then drops it
    31, // CAP_SETFCAP
];

/// Who a process is on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// See the module. The default is no wall at all.
#[derive(Debug, Default)]
pub(crate) struct Wall {
    namespaces: libc::c_int,
    /// Without one it sees the host's files, and what is mounted later.
    root: Option<Root>,
    /// Without one it keeps what this process has.
    rights: Option<Rights>,
    system_calls: bool,
}

#[derive(Debug)]
struct Rights {
    user: User,
    capabilities: u64,
    files: u64,
    /// Whether [Landlock](landlock) restricts it, where the kernel has that.
    landlock: bool,
}

impl Wall {
    /// For the agent of the `process` backend: namespaces only. It makes containers, as root.
    pub(crate) fn agent() -> Wall {
        Wall { namespaces: NAMESPACES, ..Wall::default() }
    }

    /// For a process that serves a VM: what is in `root`, as `user`, without any capability.
    pub(crate) fn helper(root: Root, user: User) -> Wall {
        let rights = Rights { user, capabilities: 0, files: FILES, landlock: true };
        Wall { namespaces: NAMESPACES, root: Some(root), rights: Some(rights), system_calls: false }
    }

    /// Also with the system calls only that a daemon needs which has no filter of its own.
    pub(crate) fn filtered(self) -> Wall {
        Wall { system_calls: true, ..self }
    }

    /// For virtiofsd, which acts as root on the files of others.
    pub(crate) fn file_server(root: Root, files: u64) -> Wall {
        let capabilities = FILE_CAPABILITIES.iter().fold(0, |mask, number| mask | 1 << number);
        let rights = Rights { user: User { uid: 0, gid: 0 }, capabilities, files, landlock: false };
        Wall { namespaces: NAMESPACES, root: Some(root), rights: Some(rights), system_calls: false }
    }

    /// Makes the directory for its root.
    pub(crate) fn prepare(&self) -> Result<(), VmmError> {
        match &self.root {
            Some(root) => make_dir(root.at()),
            None => Ok(()),
        }
    }

    /// What has to be done in the new process, in order.
    fn steps(&self) -> Result<Vec<Step>, SpawnError> {
        let mut steps = Vec::new();
        if self.namespaces & libc::CLONE_NEWNS != 0 {
            steps.push(Step::FollowHost);
        }
        if let Some(root) = &self.root {
            steps.extend(root.steps()?);
            if self.rights.as_ref().is_some_and(|rights| rights.landlock) && landlock::is_available() {
                steps.push(Step::Landlock(root.rules()?));
            }
        }
        if let Some(Rights { user, capabilities, files, .. }) = &self.rights {
            steps.push(Step::Limit { resource: libc::RLIMIT_CORE, name: "core", value: 0 });
            steps.push(Step::Limit { resource: libc::RLIMIT_NOFILE, name: "nofile", value: *files });
            steps.push(Step::Rights { user: *user, capabilities: *capabilities });
        }
        if self.system_calls {
            steps.push(Step::Filter(filter::daemon()?));
        }
        Ok(steps)
    }
}

fn make_dir(at: &Path) -> Result<(), VmmError> {
    let made = crate::files::make_dir(at);
    made.map_err(|source| VmmError::Io { action: "cannot create", path: at.into(), source })
}

/// The steps of a process that holds a place for clients: an empty root, nobody's rights.
fn empty(root: &Path, user: User) -> Result<Vec<Step>, SpawnError> {
    let wall = Wall::helper(Root::new(root), user);
    wall.steps()
}
