//! One tree of files into one erofs file.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

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
        info!(%identity, layers = layers.source.count(), "packing the rootfs");
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
    fn count(&self) -> usize {
        match self {
            Source::Overlay { dirs, .. } => dirs.len(),
            Source::Bind { .. } => 1,
        }
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
