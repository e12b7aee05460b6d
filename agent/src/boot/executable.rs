//! The file that init stages are executed from: this very binary, where nobody can write to it.
//!
//! A process of a container gets hold of that file: by /proc/PID/exe of a stage that it may trace, or as its
//! own /proc/self/exe, if the program to run says `#!/proc/self/exe`. While the agent runs, the kernel lets
//! nobody write to a program that is executed (ETXTBSY). On the `process` backend the file outlives the agent:
//! a descriptor kept open until then would do (CVE-2019-5736). What is opened through a read-only mount stays
//! read-only, and the mount is in a namespace where containers cannot change it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use super::BootError;
use crate::guest::paths;

/// Mounts the binary of this process, read-only, in the mount namespace of this process. Gives the path.
pub(super) fn protect() -> Result<PathBuf, BootError> {
    let path = Path::new(paths::STAGE);
    fs::create_dir_all(paths::CUBE).map_err(BootError::io("cannot create", paths::CUBE))?;
    File::create(path).map_err(BootError::io("cannot create", path))?;
    let none = None::<&str>;
    mount(Some("/proc/self/exe"), path, none, MsFlags::MS_BIND, none)
        .map_err(BootError::sys("cannot mount the agent on", path))?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, path, none, flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV, none)
        .map_err(BootError::sys("cannot make read-only", path))?;
    Ok(path.to_owned())
}
