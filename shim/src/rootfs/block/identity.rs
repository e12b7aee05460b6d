//! What makes two lists of layers the same.

use std::{
    ffi::OsStr,
    fmt, fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use sha2::{Digest, Sha256};

use super::super::{RootfsError, failed};

/// Changed when the same layers would be packed into something else.
const FORMAT: &str = "cube rootfs 1";

/// Names packed layers: 64 hex digits.
///
/// A snapshotter numbers its directories, and begins anew when its metadata is lost: a path alone
/// may name another layer tomorrow. So each directory counts with its path, device, inode, birth,
/// and times of change: a directory that was removed and made again, or another file system at the
/// same place, differs in one of them at least. What is inside a directory does not count: committed
/// layers never change, and reading them all would cost what packing costs. An identity that
/// differs needlessly, after a reboot that renumbers devices for example, costs one packing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity(String);

impl Identity {
    /// The identity of `dirs`, in the order of overlayfs's `lowerdir`, mounted with `options`.
    pub(super) fn of<P: AsRef<Path>>(dirs: &[P], options: &[String]) -> Result<Identity, RootfsError> {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        add(FORMAT.as_bytes());
        options.iter().for_each(|option| add(option.as_bytes()));
        for dir in dirs.iter().map(AsRef::as_ref) {
            let path = fs::canonicalize(dir).map_err(failed("cannot find the layer", dir))?;
            let meta = fs::metadata(&path).map_err(failed("cannot look at the layer", &path))?;
            // Not every file system knows it.
            let birth = meta.created().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            add(path.as_os_str().as_bytes());
            for number in [meta.dev(), meta.ino()] {
                add(&number.to_le_bytes());
            }
            for number in [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()] {
                add(&number.to_le_bytes());
            }
            add(&birth.map_or(0, |birth| birth.as_nanos()).to_le_bytes());
        }
        Ok(Identity(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The identity of what is packed into `file` for one sandbox.
    pub(super) fn of_file(file: &Path) -> Identity {
        let mut hash = Sha256::new_with_prefix(FORMAT);
        hash.update(file.as_os_str().as_bytes());
        Identity(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The identity that a directory is named after.
    pub(super) fn from_name(name: &OsStr) -> Option<Identity> {
        let name = name.to_str()?;
        let valid = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        valid.then(|| Identity(name.into()))
    }

    /// 64 hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A file system UUID, of version 8 in RFC 9562: a name of our own making.
    pub(super) fn uuid(&self) -> String {
        let digits = |range| self.0.get(range).unwrap_or_default();
        let (a, b, c, d, e) = (digits(0..8), digits(8..12), digits(12..15), digits(15..18), digits(18..30));
        format!("{a}-{b}-8{c}-8{d}-{e}")
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.get(..12).unwrap_or(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_directories_are_the_same_and_order_and_options_count() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = |dirs: &[&Path], options: &[&str]| {
            let options: Vec<_> = options.iter().map(ToString::to_string).collect();
            Identity::of(dirs, &options).unwrap()
        };
        let both = of(&[a.path(), b.path()], &[]);
        assert_eq!(both, of(&[a.path(), b.path()], &[]));
        assert_ne!(both, of(&[b.path(), a.path()], &[]));
        assert_ne!(both, of(&[a.path()], &[]));
        assert_ne!(both, of(&[a.path(), b.path()], &["userxattr"]));
        assert_eq!(both.uuid().len(), 36);
        assert_eq!(Identity::from_name(both.as_str().as_ref()), Some(both));
    }

    #[test]
    fn a_directory_that_was_made_again_at_the_same_place_is_another() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("1");
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..5 {
            fs::create_dir(&dir).unwrap();
            assert!(seen.insert(Identity::of(&[&dir], &[]).unwrap()));
            fs::remove_dir(&dir).unwrap();
            // File times have the resolution of a timer tick.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
