//! Snapshots on their way to another host: a tar archive, compressed with zstd.
//!
//! The manifest comes first, then its files in its order, each as a sparse file of GNU tar, so that neither
//! holes nor the guest's unused memory are shipped. `tar --sparse -x --zstd` unpacks one, too.
//!
//! What an import costs is known before it is paid: each step is checked against what the manifest and the next
//! header say, and these against the limit and the free space.

mod export;
mod import;
mod members;
mod room;
#[cfg(test)]
mod tests;

pub use import::Import;

use super::SnapshotError;

/// What zstd begins with (RFC 8878, 3.1.1).
const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();

fn bad(what: &str) -> SnapshotError {
    SnapshotError::Archive { what: what.into() }
}
