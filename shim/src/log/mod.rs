//! Logs on disk: raw bytes in segments, an index beside each.

pub mod format;
