//! Snapshots on their way to another host: a tar archive, compressed with zstd.
//!
//! The manifest comes first, then its files in its order, each as a sparse file of GNU tar, so that neither
//! holes nor the guest's unused memory are shipped. `tar --sparse -x --zstd` unpacks one, too.

mod export;
mod import;
#[cfg(test)]
mod tests;

/// What zstd begins with (RFC 8878, 3.1.1).
const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();
