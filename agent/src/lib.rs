//! The agent of a Cubebox guest, as a library so that tests and fuzzers can drive its parts.
//!
//! `docs/architecture.md` tells which module does what.

pub mod container;
pub mod stdio;
