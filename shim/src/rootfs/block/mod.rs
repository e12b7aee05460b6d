//! `cube.rootfs.mode=block`: any rootfs becomes disks of the VM.
//!
//! What containerd would mount is packed into a read-only erofs file; on top of it each sandbox has a
//! sparse ext4 file for what it writes, and the guest overlays the two. An image's layers, which
//! containerd never changes, are packed once and shared by every sandbox on the host ([`cache`]); a
//! directory that somebody may write to is packed for the one sandbox that it belongs to.
//!
//! On the host, below `rootfs.cache_dir`:
//!
//! ```text
//! images/<identity>/rootfs.erofs      packed layers; the directory is the lock of the identity
//! sandboxes/<key>/<serial>.erofs      hard link to the above, or a file of its own
//! sandboxes/<key>/<serial>.ext4       what the sandbox writes
//! sandboxes/<key>/<serial>.restored   a disk that came from a snapshot
//! sandboxes/<key>/<serial>.staged     one that is about to take the place of another
//! sandboxes/<key>/run                 link to the run directory of the sandbox
//! tree, empty                         mount point of packers, each in its own namespace
//! ```

mod cache;
mod disks;
mod identity;
mod layers;
mod pack;
mod stage;
mod tool;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

pub use self::{
    cache::{Cache, Collected},
    disks::SandboxDisks,
    identity::Identity,
    layers::{Layers, Source},
    stage::Staged,
};
use super::{RootfsError, plan::serial};
use crate::{config::Config, vmm::Disk};

/// How long a create may take to pack an image, or wait for another to pack it. An image of 10 GiB on
/// a slow disk takes minutes.
const PACK_LIMIT: Duration = Duration::from_secs(600);

/// Ends a preparation that is under way. Clones mean the same one.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// What holds this fails soon with [`RootfsError::Cancelled`].
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// [`RootfsError::Cancelled`] after a [`cancel`](Cancel::cancel).
    fn check(&self) -> Result<(), RootfsError> {
        if self.0.load(Ordering::Relaxed) { Err(RootfsError::Cancelled) } else { Ok(()) }
    }
}

/// How to make a container's disks.
#[derive(Debug, Clone)]
pub struct BlockRequest {
    /// `rootfs.cache_dir`.
    pub cache_dir: PathBuf,
    /// `rootfs.cache_limit`, in bytes.
    pub cache_limit: u64,
    /// `rootfs.image_limit`, in bytes.
    pub image_limit: u64,
    /// `tools.mkfs_erofs`.
    pub mkfs_erofs: PathBuf,
    /// `tools.mke2fs`.
    pub mke2fs: PathBuf,
    /// Size of the writable disk in bytes.
    pub size: u64,
    /// Leaf of the sandbox's cgroup in which packers run, so that what ends the sandbox ends them.
    pub cgroup: PathBuf,
    /// Ends the preparation.
    pub cancel: Cancel,
}

impl BlockRequest {
    /// What `config` says, for a writable disk of `size` bytes.
    pub fn new(config: &Config, size: u64, cgroup: PathBuf) -> BlockRequest {
        BlockRequest {
            cache_dir: config.rootfs.cache_dir.clone(),
            cache_limit: config.rootfs.cache_limit,
            image_limit: config.rootfs.image_limit,
            mkfs_erofs: config.tools.mkfs_erofs.clone(),
            mke2fs: config.tools.mke2fs.clone(),
            size,
            cgroup,
            cancel: Cancel::default(),
        }
    }

    /// Makes the disks of container `id`: the packed layers, and the writable one if `layers` ask for
    /// it. Blocks, for the time of packing at most [`PACK_LIMIT`]. Undone by [`SandboxDisks`], also
    /// after an error.
    pub(super) fn disks(
        &self,
        run_dir: &Path,
        id: &str,
        layers: &Layers,
    ) -> Result<(Disk, Option<Disk>), RootfsError> {
        let limits = Limits { deadline: Instant::now() + PACK_LIMIT, cancel: self.cancel.clone() };
        let cache = Cache::open(&self.cache_dir)?;
        cache.remove_orphans(false)?;
        let disks = SandboxDisks::create(run_dir, &cache)?;
        cube_fault::point("create.disks_begun");

        let packer = pack::Packer { request: self, cache: &cache, limits: &limits };
        let image = Disk { path: disks.image(id), serial: serial(id, "image"), read_only: true };
        match &layers.identity {
            Some(identity) => {
                let packed =
                    cache.link(identity, &image.path, &limits, |to| packer.pack(layers, identity, to))?;
                if packed {
                    cache.evict(self.cache_limit, false)?;
                }
            }
            None => packer.pack(layers, &Identity::of_file(&image.path), &image.path)?,
        }
        cube_fault::point("create.image_linked");
        if !layers.writable {
            return Ok((image, None));
        }
        let writable = Disk { path: disks.writable(id), serial: serial(id, "writable"), read_only: false };
        self.make_ext4(&writable.path, &limits)?;
        cube_fault::point("create.disk_made");
        Ok((image, Some(writable)))
    }

    /// An empty ext4 in a sparse file. Without a journal: the disk never outlives its VM, except in a
    /// snapshot, which has the guest's memory beside it. The inode tables are left to the holes of the
    /// file, and the guest is told to leave them so (`noinit_itable`).
    fn make_ext4(&self, path: &Path, limits: &Limits) -> Result<(), RootfsError> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path);
        file.and_then(|file| file.set_len(self.size)).map_err(super::failed("cannot create", path))?;
        let args = ["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal,^resize_inode"];
        let args = args.into_iter().chain(["-E", "lazy_itable_init=1,nodiscard"]).map(Into::into);
        let args = args.chain([path.into()]).collect();
        let program = tool::find(&self.mke2fs, "`apt-get install e2fsprogs`, or set tools.mke2fs")?;
        tool::Tool { program, args, cgroup: &self.cgroup, mount: None, file_limit: self.size }
            .run(limits, |_| {})
    }
}

/// Makes disks of a sandbox from those of a snapshot, in their order: a copy of each that the guest writes
/// to, which shares its blocks where the file system can; the others are used where they are, or linked.
/// Undone by [`SandboxDisks`], also after an error.
pub fn restore_disks(cache_dir: &Path, run_dir: &Path, snapshot: &[Disk]) -> Result<Vec<Disk>, RootfsError> {
    let cache = Cache::open(cache_dir)?;
    cache.remove_orphans(false)?;
    let disks = SandboxDisks::create(run_dir, &cache)?;
    let restored = snapshot.iter().map(|disk| {
        let path = disks.restored(&disk.serial);
        if disk.read_only {
            // Its name in the store may go while the sandbox runs.
            let linked = std::fs::hard_link(&disk.path, &path).is_ok();
            return Ok(if linked { Disk { path, ..disk.clone() } } else { disk.clone() });
        }
        crate::files::copy(&disk.path, &path).map_err(super::failed("cannot copy a disk to", &path))?;
        Ok(Disk { path, ..disk.clone() })
    });
    restored.collect()
}

/// When to give up.
#[derive(Debug)]
pub(in crate::rootfs) struct Limits {
    deadline: Instant,
    cancel: Cancel,
}

impl Limits {
    /// An error if `what` has to end now.
    fn check(&self, what: &'static str) -> Result<(), RootfsError> {
        self.cancel.check()?;
        match Instant::now() >= self.deadline {
            true => Err(RootfsError::Slow { what, limit: PACK_LIMIT }),
            false => Ok(()),
        }
    }
}
