//! Disks, which the host names by their virtio-blk serials.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::StorageError;

/// How long a disk may take to appear after its driver is loaded.
pub(super) const LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// What the source of a mount begins with if it names a disk.
pub(super) const SERIAL: &str = "serial:";

/// What mount(2) takes for the source of a mount. Blocks until the disk is there.
pub(super) fn resolve(source: &str) -> Result<PathBuf, StorageError> {
    match source.strip_prefix(SERIAL) {
        Some(serial) => wait_for_disk(serial),
        None => Ok(PathBuf::from(source)),
    }
}

/// The device node of the disk with `serial`. A driver finds its disks after it is loaded.
fn wait_for_disk(serial: &str) -> Result<PathBuf, StorageError> {
    const BLOCK: &str = "/sys/block";
    let deadline = Instant::now() + LIMIT;
    loop {
        let found = disk_with_serial(Path::new(BLOCK), serial).map_err(|source| StorageError::Io {
            action: "cannot list",
            path: BLOCK.into(),
            source,
        })?;
        match found {
            Some(name) => return Ok(Path::new("/dev").join(name)),
            None if Instant::now() >= deadline => {
                return Err(StorageError::NoDevice { serial: serial.to_owned() });
            }
            None => thread::sleep(POLL),
        }
    }
}

fn disk_with_serial(block: &Path, serial: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        // Not every kind of disk has the file.
        let Ok(found) = fs::read_to_string(entry.path().join("serial")) else { continue };
        if !serial.is_empty() && found.trim() == serial {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_whole_serial() {
        let block = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root-1\n"), ("vdb", "root"), ("loop0", "")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(block.path().join("sr0")).unwrap();
        assert_eq!(disk_with_serial(block.path(), "root").unwrap().as_deref(), Some("vdb"));
        assert_eq!(disk_with_serial(block.path(), "root-1").unwrap().as_deref(), Some("vda"));
        assert_eq!(disk_with_serial(block.path(), "roo").unwrap(), None);
        assert_eq!(disk_with_serial(block.path(), "").unwrap(), None);
    }
}
