//! Making a log survive the death of the host.

use std::{io, path::Path};

use super::dir::{LogDir, LogError, is_log_file};

/// Waits until everything that is in the log directory `path` is on the disk, names included: what was
/// acknowledged to a guest before the call is then in the log whatever happens to the host. Its writers may be
/// at work meanwhile; what they add may be left out.
///
/// Blocks for as long as the disk takes. An error names the file that could not be synced.
pub fn sync(path: &Path) -> Result<(), LogError> {
    let dir = match LogDir::open(path) {
        // Somebody has removed it, and there is nothing to wait for.
        Err(e) if e.source.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for name in dir.names()?.iter().filter(|name| is_log_file(name)) {
        let file = match dir.open_file(name) {
            // Rotated away, or renamed: whoever does that at rest has nothing new in it.
            Err(e) if e.source.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        file.sync_data().map_err(|e| dir.error("cannot sync the log file", name, e))?;
    }
    dir.sync()
}
