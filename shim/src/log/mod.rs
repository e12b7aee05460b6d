//! Logs on disk: raw bytes in segments, an index beside each.

pub mod follow;
pub mod format;
pub mod locate;
pub mod reader;
pub mod retention;
pub mod since;
pub mod tail;
