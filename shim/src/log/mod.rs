//! Logs on disk: raw bytes in segments, an index beside each.

pub mod dir;
pub mod format;
mod recover;
pub mod retained;
mod segment;
pub mod writer;
