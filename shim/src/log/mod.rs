//! Logs on disk: raw bytes in segments, an index beside each.

pub mod dir;
pub mod follow;
pub mod format;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod locate;
mod place;
pub mod reader;
mod recover;
pub mod retained;
pub mod retention;
mod rewind;
mod segment;
pub mod since;
pub mod sync;
pub mod tail;
pub mod writer;
