//! The file systems of a guest before any container.

use std::{fs, io, os::unix::fs::symlink, path::Path};

use nix::mount::{MsFlags, mount};

use super::BootError;
use crate::guest::paths;

struct Mount {
    fs_type: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const TEMPORARY: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

/// In this order: a target may lie in a file system further up.
const MOUNTS: [Mount; 9] = [
    Mount { fs_type: "proc", target: "/proc", flags: PLAIN, data: "" },
    Mount { fs_type: "sysfs", target: "/sys", flags: PLAIN, data: "" },
    Mount { fs_type: "devtmpfs", target: "/dev", flags: DEVICES, data: "mode=0755" },
    Mount { fs_type: "devpts", target: "/dev/pts", flags: DEVICES, data: "gid=5,mode=0620,ptmxmode=0666" },
    Mount { fs_type: "tmpfs", target: "/dev/shm", flags: PLAIN, data: "mode=1777" },
    Mount { fs_type: "mqueue", target: "/dev/mqueue", flags: PLAIN, data: "" },
    Mount { fs_type: "tmpfs", target: "/run", flags: TEMPORARY, data: "mode=0755" },
    Mount { fs_type: "tmpfs", target: "/tmp", flags: TEMPORARY, data: "mode=1777" },
    Mount { fs_type: "cgroup2", target: "/sys/fs/cgroup", flags: PLAIN, data: "nsdelegate" },
];

/// What the first stage needs: the command line, the mount table, and somewhere to complain.
pub(super) const EARLY: [&str; 2] = ["/proc", "/dev"];

/// Mounts [`EARLY`].
pub(super) fn early() -> Result<(), BootError> {
    MOUNTS.iter().filter(|entry| EARLY.contains(&entry.target)).try_for_each(Mount::apply)
}

/// Mounts everything.
pub(super) fn all() -> Result<(), BootError> {
    MOUNTS.iter().try_for_each(Mount::apply)?;
    // Containers' devpts instances and programs in the guest expect the names of devpts(5) and proc(5).
    for (target, link) in [
        ("pts/ptmx", "/dev/ptmx"),
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        (paths::RESOLV_CONF, "/etc/resolv.conf"),
    ] {
        replace_by_link(target, Path::new(link)).map_err(|source| BootError::Io {
            action: "cannot link",
            path: link.into(),
            source,
        })?;
    }
    Ok(())
}

impl Mount {
    fn apply(&self) -> Result<(), BootError> {
        let failed = |source| BootError::Io {
            action: "cannot mount a file system on",
            path: self.target.into(),
            source,
        };
        fs::create_dir_all(self.target).map_err(failed)?;
        let source = Some(self.fs_type);
        match mount(source, self.target, Some(self.fs_type), self.flags, Some(self.data)) {
            // EBUSY: this very file system is there already, an early one for example.
            Ok(()) | Err(nix::Error::EBUSY) => Ok(()),
            // CONFIG_POSIX_MQUEUE is optional, and containers mount their own instance.
            Err(nix::Error::ENODEV) if self.fs_type == "mqueue" => Ok(()),
            Err(errno) => Err(failed(errno.into())),
        }
    }
}

fn replace_by_link(target: &str, link: &Path) -> io::Result<()> {
    link.parent().map_or(Ok(()), fs::create_dir_all)?;
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => symlink(target, link),
    }
}
