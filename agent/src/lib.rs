//! The agent of a Cubebox guest, as a library so that tests and fuzzers can drive its parts.
//!
//! `docs/architecture.md` tells which module does what.

pub mod boot;
pub mod container;
pub mod errors;
pub mod guest;
pub mod server;
pub mod stdio;
