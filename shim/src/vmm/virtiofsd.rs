//! virtiofsd: exports the sandbox's shared directory to the VM, as a vhost-user device.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::resource::{Resource, getrlimit};

use super::{
    VmSpec, VmmError,
    helper::{Helper, Launch, give, listen},
    program::{VIRTIOFSD_HINT, find},
    wall::{Root, User, Wall},
};
use crate::cgroup::SandboxCgroup;

/// Where the VMM connects.
pub(crate) fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("virtiofsd.sock")
}

/// Starts virtiofsd for `share`. The VMM can connect at once.
///
/// In namespaces of its own with nothing but `share` visible, with the capabilities that act on files, and
/// its own seccomp filter: the guest sends it requests.
/// It keeps running when the shim dies, and ends when the VMM disconnects.
pub(crate) fn launch(spec: &VmSpec, share: &Path, program: &Path) -> Result<Helper, VmmError> {
    let program = find(program, VIRTIOFSD_HINT)?;
    let path = socket(&spec.run_dir);
    let socket = OwnedFd::from(listen(&path)?);
    give(&path, spec.vmm_user())?;
    // It needs a descriptor for each file that the guest knows, and tries for more than it may have.
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let files = files.min(1_000_000);
    let root = Root::new(&spec.root()).program(&program).tree(share).proc();
    let root = root.device("/dev/null".as_ref(), 0o666, User { uid: 0, gid: 0 });
    let args = vec![
        format!("--rlimit-nofile={files}").into(),
        "--fd".into(),
        socket.as_raw_fd().to_string().into(),
        "--shared-dir".into(),
        share.into(),
        // The wall is ours, with less in it: its own leaves a process outside that has every right.
        "--sandbox=none".into(),
        "--inode-file-handles=never".into(),
        "--modcaps=-mknod".into(),
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
        wall: Wall::file_server(root, files),
        stdout: None,
    })
}
