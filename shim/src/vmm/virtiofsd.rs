//! virtiofsd: exports the sandbox's shared directory to the VM, as a vhost-user device.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::resource::{Resource, getrlimit};

use super::{
    VmSpec, VmmError,
    helper::{Helper, Launch, listen},
    program::{VIRTIOFSD_HINT, find},
};
use crate::cgroup::SandboxCgroup;

/// Where the VMM connects.
pub(crate) fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("virtiofsd.sock")
}

/// Starts virtiofsd for `share`. The VMM can connect at once.
///
/// In its own namespaces with nothing but `share` visible, seccomp on: the guest sends it requests.
/// It keeps running when the shim dies, and ends when the VMM disconnects.
pub(crate) fn launch(spec: &VmSpec, share: &Path, program: &Path) -> Result<Helper, VmmError> {
    let program = find(program, VIRTIOFSD_HINT)?;
    let socket = OwnedFd::from(listen(&socket(&spec.run_dir))?);
    // It needs a descriptor for each file that the guest knows, and tries for more than it may have.
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let args = vec![
        format!("--rlimit-nofile={}", files.min(1_000_000)).into(),
        "--fd".into(),
        socket.as_raw_fd().to_string().into(),
        "--shared-dir".into(),
        share.into(),
        "--sandbox=namespace".into(),
        "--announce-submounts".into(),
        // Overlay mounts on the host keep their whiteouts in attributes, images their capabilities.
        "--xattr".into(),
        "--log-level=warn".into(),
    ];
    Helper::launch(Launch {
        program,
        args,
        cgroup: SandboxCgroup::at(&spec.cgroup).helpers(),
        fds: vec![socket],
        own_network: false,
        stdout: None,
    })
}
