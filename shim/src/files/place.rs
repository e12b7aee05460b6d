//! Where a path leads.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::stat::fstat;

/// `path` without links and `..`, the part of it that does not exist yet included. So the same place always has
/// the same text.
///
/// # Errors
///
/// If a link on the way leads nowhere, or there is a `..` behind what does not exist: what that will mean is
/// decided by whoever makes it.
pub(crate) fn canonical(path: &Path) -> io::Result<PathBuf> {
    let mut missing = Vec::new();
    let mut there = path;
    loop {
        let error = match fs::canonicalize(there) {
            Ok(found) => return Ok(missing.iter().rev().fold(found, |path, name| path.join(name))),
            Err(e) => e,
        };
        let is_link = fs::symlink_metadata(there).is_ok_and(|meta| meta.is_symlink());
        match (there.parent(), there.file_name()) {
            (Some(parent), Some(name)) if error.kind() == io::ErrorKind::NotFound && !is_link => {
                missing.push(name);
                there = parent;
            }
            _ => return Err(error),
        }
    }
}

/// Whether both paths lead to the same place, which need not exist.
pub(crate) fn is_same(a: &Path, b: &Path) -> bool {
    a == b || matches!((canonical(a), canonical(b)), (Ok(a), Ok(b)) if a == b)
}

/// Whether what is open is still what is at `path`.
pub(crate) fn is_at(open: impl AsFd, path: &Path) -> bool {
    match (fstat(open), fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.st_dev, open.st_ino) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_same_place_has_the_same_text_whether_it_exists_or_not() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("real/run")).unwrap();
        symlink(root.join("real"), root.join("link")).unwrap();
        symlink("real/run", root.join("relative")).unwrap();
        for (given, expected) in [
            ("real/run", "real/run"),
            ("link/run", "real/run"),
            ("relative", "real/run"),
            ("link/../real//run/", "real/run"),
            ("link/run/./../new/deep", "real/new/deep"),
            ("link/new", "real/new"),
            ("relative/../..", ""),
        ] {
            let expected = root.join(expected);
            assert_eq!(
                canonical(&root.join(given)).unwrap().as_os_str(),
                expected.components().as_path(),
                "{given}"
            );
        }
        assert!(is_same(&root.join("link/new"), &root.join("real/new")));
        assert!(!is_same(&root.join("link/new"), &root.join("real/run")));
    }

    #[test]
    fn what_is_up_to_others_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        symlink(root.join("nowhere"), root.join("dangling")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        for path in ["dangling", "dangling/run", "missing/../run", "loop", "file/run"] {
            assert!(canonical(&root.join(path)).is_err(), "{path}");
        }
    }
}
