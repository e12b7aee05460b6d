//! The directory that a VMM may write a snapshot to, while it does.

use std::{fs, path::PathBuf};

use super::super::{VmmError, access::Shown, helper::give, wall::User};

/// Where a snapshot is written. It is root's before and after.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) dir: PathBuf,
    pub(super) shown: Shown,
}

impl Place {
    /// Gives it to the VMM.
    pub(super) fn open(&self) -> Result<(), VmmError> {
        give(&self.dir, self.shown.user)?;
        self.shown.show(&self.dir, false)
    }

    /// Takes it back, with what is in it: from then on nothing in it can be made, removed or exchanged.
    pub(super) fn close(&self) -> Result<(), VmmError> {
        let root = User { uid: 0, gid: 0 };
        give(&self.dir, root)?;
        let io = |source| VmmError::Io { action: "cannot list", path: self.dir.clone(), source };
        for entry in fs::read_dir(&self.dir).map_err(io)? {
            give(&entry.map_err(io)?.path(), root)?;
        }
        self.shown.hide(&self.dir)
    }
}
