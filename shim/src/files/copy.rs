//! Copies of large files that share their blocks with the original where the file system can.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read, Seek, SeekFrom},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

nix::ioctl_write_int_bad!(ficlone, libc::FICLONE);

/// Copies the file `from` to the new file `to`, mode 0600: by reflink (ioctl_ficlone(2)) if both are on
/// a file system that can, else what is not a hole of it.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    copy_told(from, to, &mut |_| Ok(()))
}

/// As [`copy`]; `told` is told how many bytes were copied, and may end it.
pub(crate) fn copy_told(
    from: &Path,
    to: &Path,
    told: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    // SAFETY: FICLONE takes the number of a descriptor, and both live.
    match unsafe { ficlone(target.as_raw_fd(), source.as_raw_fd()) } {
        Ok(_) => return Ok(()),
        Err(Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY | Errno::ENOSYS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let len = source.metadata()?.len();
    target.set_len(len)?;
    copy_data(&source, &target, len, told)
}

/// Bytes between two looks at whether to go on.
const STEP: i64 = 16 << 20;

fn copy_data(
    source: &File,
    target: &File,
    len: u64,
    told: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while let Some(begin) = seek(source, at, Whence::SeekData)? {
        let end = seek(source, begin, Whence::SeekHole)?.unwrap_or(len as i64);
        at = end.min(begin + STEP);
        copy_range(source, target, begin, at)?;
        told((at - begin).unsigned_abs())?;
    }
    Ok(())
}

/// lseek(2) to the next data or hole; `None` behind the last data.
pub(crate) fn seek(file: &File, from: i64, whence: Whence) -> io::Result<Option<i64>> {
    match lseek(file, from, whence) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn copy_range(mut source: &File, mut target: &File, begin: i64, end: i64) -> io::Result<()> {
    let (from, len) = (begin.unsigned_abs(), (end - begin).unsigned_abs());
    source.seek(SeekFrom::Start(from))?;
    target.seek(SeekFrom::Start(from))?;
    // copy_file_range(2), in effect.
    match io::copy(&mut source.take(len), &mut target)? {
        copied if copied == len => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn a_copy_has_every_byte_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", (20 << 20) + 3).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        copy(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        let meta = std::fs::metadata(&to).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    }

    #[test]
    fn an_empty_file_and_one_without_data_can_be_copied_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        for (name, len) in [("empty", 0), ("hole", 1 << 20)] {
            let (from, to) = (dir.path().join(name), dir.path().join(format!("{name}.copy")));
            File::create(&from).unwrap().set_len(len).unwrap();
            copy(&from, &to).unwrap();
            assert_eq!(std::fs::metadata(&to).unwrap().len(), len);
            assert_eq!(copy(&from, &to).unwrap_err().kind(), ErrorKind::AlreadyExists);
        }
    }
}
