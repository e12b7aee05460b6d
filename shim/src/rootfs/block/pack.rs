//! One tree of files into one erofs file.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::statvfs::statvfs;
use tracing::info;

use super::{
    super::{
        failed,
        mount::{DATA_MAX, relative_lower_dirs},
    },
    BlockRequest, Cache, Identity, Layers, Limits, RootfsError, Source,
    tool::{self, PrivateMount, Tool},
};

/// How often the log says how far it is.
const PROGRESS: Duration = Duration::from_secs(2);

const MKFS_EROFS_HINT: &str =
    "`apt-get install erofs-utils`, or set tools.mkfs_erofs in the configuration file";

/// Packs what one create needs.
pub(super) struct Packer<'a> {
    pub(super) request: &'a BlockRequest,
    pub(super) cache: &'a Cache,
    pub(super) limits: &'a Limits,
}

impl Packer<'_> {
    /// Packs `layers` into `file`, which is safe on disk then. Blocks. On an error there may be half
    /// a file.
    ///
    /// overlayfs itself merges the layers, so whiteouts, opaque directories and whatever else it may
    /// come to know mean what they mean in a container on the host. Not compressed: a small image takes
    /// three times as long then, a large one as long as its disk does either way, and each guest would
    /// have to unpack what it reads.
    pub(super) fn pack(&self, layers: &Layers, identity: &Identity, file: &Path) -> Result<(), RootfsError> {
        let begun = Instant::now();
        self.check_room(&layers.source)?;
        info!(%identity, layers = layers.source.dirs().len(), "packing the rootfs");
        let tree = self.cache.tree()?;
        // The times of the files are kept, those of the pack are not: the same layers give the same
        // bytes but for the time in the superblock.
        let mut args = vec!["--quiet".into(), "-U".into(), identity.uuid().into()];
        args.extend([file.into(), tree.clone().into()]);
        let tool = Tool {
            program: tool::find(&self.request.mkfs_erofs, MKFS_EROFS_HINT)?,
            args,
            cgroup: &self.request.cgroup,
            mount: Some(self.mount(&layers.source, &tree)?),
            file_limit: self.request.image_limit,
        };
        let mut told = Duration::ZERO;
        tool.run(self.limits, |elapsed| {
            if elapsed >= told + PROGRESS {
                told = elapsed;
                let written_mib = size_on_disk(file) >> 20;
                info!(%identity, written_mib, seconds = elapsed.as_secs(), "packing the rootfs goes on");
            }
        })?;
        let opened = fs::File::open(file).map_err(failed("cannot open", file))?;
        opened.sync_all().map_err(failed("cannot write out", file))?;
        let (mib, took_ms) = (size_on_disk(file) >> 20, begun.elapsed().as_millis());
        info!(%identity, mib, took_ms, "the rootfs is packed");
        Ok(())
    }

    /// Whether what is to be packed is as large as may be, and has room, before anything is written: an image
    /// comes from whoever may run one, and a few kilobytes of it may unpack to terabytes, or be a sparse file that
    /// has them, for mkfs.erofs writes holes out.
    fn check_room(&self, source: &Source) -> Result<(), RootfsError> {
        let limit = self.request.image_limit;
        let mut measure = Measure { limit, ..Measure::default() };
        for dir in source.dirs() {
            measure.add(dir, self.limits)?;
        }
        if measure.bytes > limit {
            return Err(RootfsError::TooLarge { limit });
        }
        let dir = &self.request.cache_dir;
        let disk = statvfs(dir).map_err(|errno| failed("cannot look at the disk of", dir)(errno.into()))?;
        let available = disk.blocks_available().saturating_mul(disk.fragment_size());
        match measure.bytes <= available {
            true => Ok(()),
            false => Err(RootfsError::NoRoom { needed: measure.bytes, available, dir: dir.clone() }),
        }
    }

    fn mount(&self, source: &Source, tree: &Path) -> Result<PrivateMount, RootfsError> {
        let made = match source {
            Source::Bind { dir, recursive } => {
                let flags = libc::MS_BIND | if *recursive { libc::MS_REC } else { 0 };
                PrivateMount::new((dir, tree), "none", flags, ("", Path::new("/")))
            }
            Source::Overlay { dirs, options } => {
                let (data, base) = overlay_data(dirs, options, &self.cache.empty()?)?;
                let flags = libc::MS_RDONLY;
                PrivateMount::new((Path::new("overlay"), tree), "overlay", flags, (&data, &base))
            }
        };
        made.map_err(failed("cannot mount", tree))
    }
}

impl Source {
    fn dirs(&self) -> &[PathBuf] {
        match self {
            Source::Overlay { dirs, .. } => dirs,
            Source::Bind { dir, .. } => std::slice::from_ref(dir),
        }
    }
}

/// Adds up the lengths of files, until they are more than `limit`.
#[derive(Debug, Default)]
struct Measure {
    limit: u64,
    bytes: u64,
    /// Device and inode of files with several names, which are packed once.
    linked: HashSet<(u64, u64)>,
}

impl Measure {
    fn add(&mut self, dir: &Path, limits: &Limits) -> Result<(), RootfsError> {
        for entry in fs::read_dir(dir).map_err(failed("cannot read", dir))? {
            if self.bytes > self.limit {
                break;
            }
            limits.check("measuring the rootfs")?;
            let entry = entry.map_err(failed("cannot read", dir))?;
            // Not that of what a link leads to.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                self.add(&entry.path(), limits)?;
            } else if meta.is_file() && (meta.nlink() == 1 || self.linked.insert((meta.dev(), meta.ino()))) {
                self.bytes = self.bytes.saturating_add(meta.len());
            }
        }
        Ok(())
    }
}

/// The data of an overlay of `dirs`, and the directory that they are relative to. Below them `empty`:
/// without an upper directory, overlayfs takes two lower ones at least.
fn overlay_data(
    dirs: &[PathBuf],
    options: &[String],
    empty: &Path,
) -> Result<(String, PathBuf), RootfsError> {
    let names: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    let empty = if dirs.len() == 1 { format!(":{}", empty.display()) } else { String::new() };
    let mut data = vec![format!("lowerdir={}{empty}", names.join(":"))];
    data.extend_from_slice(options);
    let text = data.join(",");
    if text.len() <= DATA_MAX {
        return Ok((text, "/".into()));
    }
    relative_lower_dirs(&data)
        .map(|(base, text)| (text, base))
        .filter(|(text, _)| text.len() < 4096)
        .ok_or_else(|| RootfsError::Unsupported {
            what: format!("packing {} layers, whose paths are longer than the kernel takes,", dirs.len()),
            hint: "use an image of fewer layers",
        })
}

fn size_on_disk(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |meta| meta.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const LONG: u64 = 1 << 40;

    fn request(dir: &Path, image_limit: u64) -> BlockRequest {
        BlockRequest {
            cache_dir: dir.join("cache"),
            cache_limit: 1,
            image_limit,
            mkfs_erofs: "/nosuch/mkfs.erofs".into(),
            mke2fs: "mke2fs".into(),
            size: 1 << 20,
            cgroup: dir.into(),
            cancel: super::super::Cancel::default(),
        }
    }

    /// What comes of packing the directory `layer` in `dir`. There is no packer: no error here is its.
    fn pack(dir: &Path, image_limit: u64) -> RootfsError {
        let request = request(dir, image_limit);
        let limits =
            Limits { deadline: Instant::now() + Duration::from_secs(60), cancel: request.cancel.clone() };
        let cache = Cache::open(&request.cache_dir).unwrap();
        let source = Source::Bind { dir: dir.join("layer"), recursive: true };
        let layers = Layers { source, identity: None, writable: false };
        let file = dir.join("packed");
        let identity = Identity::of_file(&file);
        let packer = Packer { request: &request, cache: &cache, limits: &limits };
        let error = packer.pack(&layers, &identity, &file).unwrap_err();
        assert!(!file.exists(), "nothing is written before");
        error
    }

    fn layer() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("layer/a/b")).unwrap();
        dir
    }

    #[test]
    fn a_sparse_file_of_a_terabyte_is_refused_with_the_limit_before_anything_is_packed() {
        let dir = layer();
        File::create(dir.path().join("layer/a/b/sparse")).unwrap().set_len(LONG).unwrap();
        let error = pack(dir.path(), 1 << 30);
        assert!(matches!(error, RootfsError::TooLarge { limit } if limit == 1 << 30), "{error}");
        // A limit that no disk has.
        let error = pack(dir.path(), u64::MAX);
        assert!(matches!(&error, RootfsError::NoRoom { needed, .. } if *needed == LONG), "{error}");
    }

    #[test]
    fn a_file_with_many_names_is_one_file_and_links_are_not_followed() {
        let dir = layer();
        let file = dir.path().join("layer/file");
        File::create(&file).unwrap().set_len(1000).unwrap();
        for n in 0..10 {
            fs::hard_link(&file, dir.path().join(format!("layer/a/{n}"))).unwrap();
        }
        File::create(dir.path().join("outside")).unwrap().set_len(LONG).unwrap();
        std::os::unix::fs::symlink("../outside", dir.path().join("layer/link")).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("layer/root")).unwrap();
        // As large as may be, so it is the packer that is missing.
        assert!(matches!(pack(dir.path(), 1000), RootfsError::Program(_)));
        assert!(matches!(pack(dir.path(), 999), RootfsError::TooLarge { .. }));
    }
}
