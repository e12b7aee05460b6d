//! Kernel modules that the guest image brings along.

use std::{
    ffi::CStr,
    fs::{self, File},
    io,
    path::Path,
};

use nix::kmod::{ModuleInitFlags, finit_module};

use super::BootError;

/// Names the modules to load, one path relative to / per line, in the order of loading. Uncompressed:
/// not every kernel can unpack modules itself. Written by the image builder, which knows the
/// dependencies; a guest has no modprobe.
pub const LIST: &str = "/etc/cube/modules";

/// Loads what [`LIST`] names. A kernel with everything built in has no list.
pub(super) fn load() -> Result<(), BootError> {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(BootError::Io { action: "cannot read", path: LIST.into(), source }),
    };
    for path in entries(&list) {
        let path = Path::new("/").join(path.trim_start_matches('/'));
        let failed = |source| BootError::Io { action: "cannot load the module", path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        match finit_module(&file, c"" as &CStr, ModuleInitFlags::empty()) {
            Ok(()) => tracing::debug!(module = %path.display(), "loaded"),
            Err(nix::Error::EEXIST) => tracing::debug!(module = %path.display(), "already there"),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}

fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_are_no_modules() {
        let list = "# virtio first\nlib/modules/virtio.ko\n\n  lib/modules/vsock.ko \n";
        assert_eq!(entries(list).collect::<Vec<_>>(), ["lib/modules/virtio.ko", "lib/modules/vsock.ko"]);
    }
}
