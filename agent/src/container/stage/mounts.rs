//! The mounts of the spec.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sys::stat::fstat,
};
use oci_spec::runtime::{Mount, Spec};

use super::{
    Failure, Result, Step, copy_up,
    protocol::Proc,
    root::{Kind, Root, proc_path},
};
use crate::container::mount_options::{Attributes, MountOptions, Propagation, is_cgroup};

const NONE: Option<&str> = None;

/// tmpfs mounts that become read-only once everything below them is made: device nodes, and the mount
/// points of later mounts.
#[derive(Debug, Default)]
pub(super) struct Late {
    read_only: Vec<PathBuf>,
}

impl Late {
    pub(super) fn finish(self, root: &Root) -> Result<()> {
        let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        for path in self.read_only {
            root.locate(&path)
                .and_then(|fd| set_attributes(fd.as_fd(), attributes, false))
                .step(|| format!("make {} read-only", path.display()))?;
        }
        Ok(())
    }
}

/// Mounts the proc that is kept for later containers, if the stage is to do so.
pub(super) fn keep_proc(proc: &Proc) -> Result<()> {
    let Proc::Keep(path) = proc else { return Ok(()) };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), path, Some("proc"), flags, NONE).step(|| format!("mount proc on {}", path.display()))
}

/// Mounts everything, in the spec's order.
pub(super) fn mount_all(root: &Root, spec: &Spec, proc: &Proc) -> Result<Late> {
    let mut late = Late::default();
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        // The agent has parsed them before; they are simply parsed again.
        let mut options = MountOptions::parse(index, mount)
            .map_err(|error| Failure { action: error.to_string(), errno: Errno::EINVAL })?;
        let is_tmpfs = mount.typ().as_deref() == Some("tmpfs");
        if is_tmpfs && options.flags.contains(MsFlags::MS_RDONLY) {
            options.flags.remove(MsFlags::MS_RDONLY);
            late.read_only.push(mount.destination().clone());
        }
        if options.bind {
            bind(root, mount, &options)?;
        } else {
            mount_file_system(root, mount, &options, proc)?;
        }
    }
    Ok(late)
}

fn mount_file_system(root: &Root, entry: &Mount, options: &MountOptions, proc: &Proc) -> Result<()> {
    let destination = entry.destination();
    let typ = entry.typ().as_deref().unwrap_or_default();
    let action = || format!("mount {typ} on {}", destination.display());
    // Of a directory that is there before, its mode is what the tmpfs over it gets.
    let mode = root.locate(destination).and_then(|fd| fstat(&fd)).ok().map(|found| found.st_mode & 0o7777);
    let target = match typ {
        // Masked and read-only paths rely on /proc and /sys being where they are said to be.
        "proc" | "sysfs" => {
            root.ensure_directory(destination).step(action)?;
            root.locate_without_links(destination)
                .step(|| format!("{}, which is a symbolic link", action()))?
        }
        _ => root.ensure_directory(destination).step(action)?,
    };
    if let ("proc", Proc::Kept(kept)) = (typ, proc) {
        return bind_proc(kept, root, entry, &target, options).step(action);
    }
    let mut data = options.data.clone();
    if let Some(mode) = mode.filter(|_| typ == "tmpfs") {
        // As runc does. An option of the spec comes after it, and counts.
        data.insert(0, format!("mode={mode:04o}"));
    }
    let covered = match options.copy_up {
        true => Some(root.open_at(destination, OFlag::O_RDONLY | OFlag::O_DIRECTORY).step(action)?),
        false => None,
    };
    let data = data.join(",");
    let (fs_type, data) = match typ {
        // Options of the version 1 hierarchies ("memory", "name=systemd") mean nothing here.
        typ if is_cgroup(typ) => ("cgroup2", ""),
        typ => (typ, data.as_str()),
    };
    let source = entry.source().as_deref().unwrap_or(Path::new(fs_type));
    mount(Some(source), proc_path(&target).as_str(), Some(fs_type), options.flags, Some(data))
        .step(action)?;
    if let Some(covered) = covered {
        let mounted = root.open_at(destination, OFlag::O_RDONLY | OFlag::O_DIRECTORY).step(action)?;
        copy_up::copy(covered.as_fd(), mounted.as_fd())
            .step(|| format!("copy what is in {} into its tmpfs", destination.display()))?;
    }
    if options.propagation.is_empty() && options.recursive_attributes.is_empty() {
        return Ok(());
    }
    // The descriptor from before still refers to what is now covered.
    let mounted = root.locate(destination).step(action)?;
    finish(&mounted, Attributes::default(), options).step(action)
}

/// Options of the file system itself are those of the container that it was mounted for.
fn bind_proc(
    kept: &Path,
    root: &Root,
    entry: &Mount,
    target: &OwnedFd,
    options: &MountOptions,
) -> nix::Result<()> {
    mount(Some(kept), proc_path(target).as_str(), NONE, MsFlags::MS_BIND, NONE)?;
    finish(&root.locate(entry.destination())?, options.attributes, options)
}

fn bind(root: &Root, entry: &Mount, options: &MountOptions) -> Result<()> {
    let destination = entry.destination();
    let source = entry.source().as_deref().unwrap_or(Path::new(""));
    let action = || format!("bind {} to {}", source.display(), destination.display());
    let metadata =
        fs::metadata(source).step(|| format!("find {}, the source of a bind mount", source.display()))?;
    let kind = if metadata.is_dir() { Kind::Directory } else { Kind::File };
    let target = root.ensure(destination, kind).step(action)?;
    let recursive = if options.recursive_bind { MsFlags::MS_REC } else { MsFlags::empty() };
    mount(Some(source), proc_path(&target).as_str(), NONE, MsFlags::MS_BIND | recursive, NONE)
        .step(action)?;
    let mounted = root.locate(destination).step(action)?;
    // mount(2) ignores all flags of a bind mount; and a remount would clear the source's nodev or nosuid
    // where this mount's options do not repeat it.
    finish(&mounted, options.attributes, options).step(action)
}

fn finish(mounted: &OwnedFd, attributes: Attributes, options: &MountOptions) -> nix::Result<()> {
    if !attributes.is_empty() {
        set_attributes(mounted.as_fd(), attributes, false)?;
    }
    if !options.recursive_attributes.is_empty() {
        set_attributes(mounted.as_fd(), options.recursive_attributes, true)?;
    }
    for Propagation { kind, recursive } in &options.propagation {
        let recursive = if *recursive { MsFlags::MS_REC } else { MsFlags::empty() };
        mount(NONE, proc_path(mounted).as_str(), NONE, *kind | recursive, NONE)?;
    }
    Ok(())
}

/// Changes attributes of the mount that `fd` is the root of, or of it and all below it.
pub(super) fn set_attributes(fd: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> nix::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: pointers and size are those of a living string and struct.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}
