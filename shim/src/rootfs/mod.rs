//! Root file systems and volumes.
pub mod mountinfo;
