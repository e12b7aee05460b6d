//! /dev of the container.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat},
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, makedev, mknodat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat},
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::{
    Result, Step,
    root::{Kind, Root, proc_path, split},
};
use crate::container::mount_options::MountOptions;

/// A device node to make.
#[derive(Debug)]
struct Node {
    path: PathBuf,
    kind: SFlag,
    device: libc::dev_t,
    mode: Mode,
    uid: u32,
    gid: u32,
}

/// Those that the OCI specification says every container has.
const DEFAULT_NODES: [(&str, u64); 6] = [
    ("/dev/null", 3),
    ("/dev/zero", 5),
    ("/dev/full", 7),
    ("/dev/random", 8),
    ("/dev/urandom", 9),
    ("/dev/tty", 0),
];
const MEMORY_MAJOR: u64 = 1;
const TTY_MAJOR: u64 = 5;

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Makes device nodes and links, unless /dev is a bind mount: then it is somebody else's.
pub(super) fn populate(root: &Root, spec: &Spec) -> Result<()> {
    if is_dev_bound(spec) {
        return Ok(());
    }
    let given = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    for node in given.iter().map(Node::from).chain(default_nodes(given)) {
        node.make(root).step(|| format!("make the device node {}", node.path.display()))?;
    }
    for (link, target) in LINKS {
        make_link(root, link.as_ref(), target).step(|| format!("make the link {link}"))?;
    }
    let terminal = spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false));
    if terminal {
        root.ensure("/dev/console".as_ref(), Kind::File).step(|| "make /dev/console".into())?;
    }
    Ok(())
}

fn is_dev_bound(spec: &Spec) -> bool {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts.iter().enumerate().any(|(index, mount)| {
        mount.destination() == Path::new("/dev")
            && MountOptions::parse(index, mount).is_ok_and(|options| options.bind)
    })
}

fn default_nodes(given: &[LinuxDevice]) -> impl Iterator<Item = Node> {
    let missing =
        DEFAULT_NODES.iter().filter(|(path, _)| given.iter().all(|device| device.path() != Path::new(path)));
    missing.map(|(path, minor)| Node {
        path: path.into(),
        kind: SFlag::S_IFCHR,
        device: makedev(if *path == "/dev/tty" { TTY_MAJOR } else { MEMORY_MAJOR }, *minor),
        mode: Mode::from_bits_truncate(0o666),
        uid: 0,
        gid: 0,
    })
}

impl From<&LinuxDevice> for Node {
    fn from(device: &LinuxDevice) -> Self {
        Node {
            path: device.path().clone(),
            kind: match device.typ() {
                LinuxDeviceType::B => SFlag::S_IFBLK,
                LinuxDeviceType::P => SFlag::S_IFIFO,
                LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => SFlag::S_IFCHR,
            },
            device: makedev(device.major().cast_unsigned(), device.minor().cast_unsigned()),
            mode: Mode::from_bits_truncate(device.file_mode().unwrap_or(0o666) & 0o7777),
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        }
    }
}

impl Node {
    fn make(&self, root: &Root) -> nix::Result<()> {
        self.hand_out(&self.place(root)?)
    }

    /// Gives a descriptor (`O_PATH`) of the node, whatever its name may lead to by then: where nothing is
    /// mounted on /dev, others may write to it at the same time.
    fn place(&self, root: &Root) -> nix::Result<OwnedFd> {
        let (above, name) = split(&self.path)?;
        let parent = root.ensure_directory(above)?;
        let made = match mknodat(&parent, name, self.kind, self.mode, self.device) {
            // A rootfs may bring its own nodes.
            Err(Errno::EEXIST) => Err(Errno::EEXIST),
            result => Ok(result?),
        };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let node = openat(&parent, name, flags, Mode::empty())?;
        if self.is(&node)? { Ok(node) } else { Err(made.err().unwrap_or(Errno::ESTALE)) }
    }

    /// Sets the mode, which the umask has no part in, and the owner.
    fn hand_out(&self, node: &OwnedFd) -> nix::Result<()> {
        // fchmod(2) takes no O_PATH descriptor.
        fchmodat(AT_FDCWD, proc_path(node).as_str(), self.mode, FchmodatFlags::FollowSymlink)?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        fchownat(node, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
    }

    fn is(&self, node: &OwnedFd) -> nix::Result<bool> {
        let found = fstat(node)?;
        let same_kind = found.st_mode & SFlag::S_IFMT.bits() == self.kind.bits();
        Ok(same_kind && (self.kind == SFlag::S_IFIFO || found.st_rdev == self.device))
    }
}

fn make_link(root: &Root, link: &Path, target: &str) -> nix::Result<()> {
    let (above, name) = split(link)?;
    let parent = root.ensure_directory(above)?;
    if name == "ptmx" {
        // Whatever an image has there, the container's terminals come from its own devpts.
        match unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    match symlinkat(target, &parent, name) {
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    /// A FIFO, which anybody may make.
    fn fifo() -> Node {
        Node {
            path: "/dev/log".into(),
            kind: SFlag::S_IFIFO,
            device: 0,
            mode: Mode::from_bits_truncate(0o666),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        }
    }

    #[test]
    fn a_node_that_is_swapped_for_a_link_is_left_alone_and_so_is_what_it_leads_to() {
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o600)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        let node = fifo().place(&root).unwrap();
        let path = directory.path().join("dev/log");
        fs::rename(&path, directory.path().join("dev/moved")).unwrap();
        symlink(outside.path(), &path).unwrap();
        fifo().hand_out(&node).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(outside.path()), 0o600);
        assert_eq!(mode(&directory.path().join("dev/moved")), 0o666, "not subject to the umask");
        assert_eq!(fifo().make(&root).unwrap_err(), Errno::EEXIST);
        assert_eq!(mode(outside.path()), 0o600);
    }
}
