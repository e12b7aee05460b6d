//! Which files and devices of the host a VMM may open, as the user that it is.

use std::{
    fs::{self, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use super::{
    Disk, VmSpec, VmmError,
    helper::Helper,
    lent,
    wall::{Root, User, inside},
};

/// What every VMM needs: randomness, a sink, and KVM, each a node of its own.
const DEVICES: [(&str, u32); 3] = [("/dev/null", 0o666), ("/dev/urandom", 0o444), ("/dev/kvm", 0o600)];

/// `root` with the devices that every VMM needs, and its disks.
pub(super) fn with_devices_and_disks(mut root: Root, spec: &VmSpec) -> Result<Root, VmmError> {
    let user = spec.vmm_user();
    for (path, mode) in DEVICES {
        root = root.device(path.as_ref(), mode, user);
    }
    for disk in &spec.disks {
        let meta = look_at(disk)?;
        root = if meta.file_type().is_block_device() {
            root.device(&disk.path, if disk.read_only { 0o400 } else { 0o600 }, user)
        } else {
            open_to(disk, &spec.run_dir, user)?;
            if disk.read_only { root.read(&disk.path) } else { root.write(&disk.path) }
        };
    }
    Ok(root)
}

/// Lets a VMM that runs see one more disk.
pub(super) fn show_disk(vmm: &Shown, disk: &Disk) -> Result<(), VmmError> {
    let meta = look_at(disk)?;
    if meta.file_type().is_block_device() {
        let mode = if disk.read_only { 0o400 } else { 0o600 };
        let shown = inside::show_device(&vmm.helper.pidfd(), &disk.path, mode, vmm.user);
        return shown.map_err(|source| vmm.cannot(&disk.path, source));
    }
    open_to(disk, &vmm.run_dir, vmm.user)?;
    vmm.show(&disk.path, disk.read_only)
}

fn look_at(disk: &Disk) -> Result<Metadata, VmmError> {
    let meta = fs::metadata(&disk.path);
    meta.map_err(|source| VmmError::Io { action: "cannot open the disk", path: disk.path.clone(), source })
}

/// A writable disk belongs to the VMM that has it, for as long as that runs; one that is shared can be read by
/// the group of all VMMs.
fn open_to(disk: &Disk, run_dir: &Path, user: User) -> Result<(), VmmError> {
    match disk.read_only {
        true => let_group_read(&disk.path, user.gid),
        false => lent::lend(run_dir, &disk.path, user),
    }
}

/// Lets the group of VMMs read a file, unless everybody may.
pub(super) fn let_group_read(path: &Path, group: u32) -> Result<(), VmmError> {
    let failed = |source| VmmError::Io { action: "cannot let VMMs read", path: path.into(), source };
    let meta = fs::metadata(path).map_err(failed)?;
    let mode = meta.mode() & 0o7777;
    let wanted = if meta.is_dir() { 0o050 } else { 0o040 };
    if mode & (wanted >> 3) == wanted >> 3 || (meta.gid() == group && mode & wanted == wanted) {
        return Ok(());
    }
    let changed = chown(path, None, Some(group))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode | wanted)));
    changed.map_err(failed)
}

/// A VMM that runs, as far as files can be shown to it.
#[derive(Debug, Clone)]
pub(super) struct Shown {
    helper: Helper,
    pub(super) user: User,
    run_dir: PathBuf,
}

impl Shown {
    pub(super) fn new(vmm: &Helper, spec: &VmSpec) -> Shown {
        Shown { helper: vmm.clone(), user: spec.vmm_user(), run_dir: spec.run_dir.clone() }
    }

    fn cannot(&self, path: &Path, source: std::io::Error) -> VmmError {
        VmmError::Show { program: self.helper.program().into(), path: path.into(), source }
    }

    pub(super) fn show(&self, path: &Path, read_only: bool) -> Result<(), VmmError> {
        inside::show(&self.helper.pidfd(), path, read_only).map_err(|source| self.cannot(path, source))
    }

    pub(super) fn hide(&self, path: &Path) -> Result<(), VmmError> {
        inside::hide(&self.helper.pidfd(), path).map_err(|source| self.cannot(path, source))
    }
}
