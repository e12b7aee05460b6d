//! Masked and read-only paths.

use std::{os::fd::AsFd, path::Path};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::stat::SFlag,
};
use oci_spec::runtime::Spec;

use super::{
    Result, Step,
    mounts::set_attributes,
    root::{Root, file_type, proc_path},
};
use crate::container::mount_options::Attributes;

const NONE: Option<&str> = None;

/// Covers the masked paths and write-protects the read-only ones. What does not exist needs neither.
pub(super) fn restrict(root: &Root, spec: &Spec) -> Result<()> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    for path in linux.readonly_paths().iter().flatten() {
        tolerate_missing(make_read_only(root, path.as_ref())).step(|| format!("make {path} read-only"))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        tolerate_missing(mask(root, path.as_ref())).step(|| format!("mask {path}"))?;
    }
    Ok(())
}

fn tolerate_missing(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        result => result,
    }
}

fn make_read_only(root: &Root, path: &Path) -> nix::Result<()> {
    let fd = root.locate(path)?;
    let itself = proc_path(&fd);
    mount(Some(itself.as_str()), itself.as_str(), NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
    let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
    set_attributes(root.locate(path)?.as_fd(), read_only, false)
}

fn mask(root: &Root, path: &Path) -> nix::Result<()> {
    let fd = root.locate(path)?;
    let target = proc_path(&fd);
    if file_type(&fd)? == SFlag::S_IFDIR {
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("tmpfs"), target.as_str(), Some("tmpfs"), flags, NONE)
    } else {
        // The guest's own /dev/null: the container's could be anything.
        mount(Some("/dev/null"), target.as_str(), NONE, MsFlags::MS_BIND, NONE)
    }
}
