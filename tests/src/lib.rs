//! Harness of the end-to-end tests: a private containerd, the real shim, agent and VMM, and checks
//! of what they leave behind.
//!
//! The tests are tables of [`runner::Case`]s in `tests/tests/`; what runs on more than one VMM
//! backend is a function in [`scenarios`]. Everything here panics when it fails, with what it saw.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "all of this crate is tests")]

pub mod command;
pub mod diagnostics;
pub mod direct;
pub mod disk;
pub mod guest;
pub mod kills;
pub mod lab;
pub mod leftovers;
pub mod logs;
pub mod machine;
pub mod needs;
pub mod paths;
pub mod proxy;
pub mod pty;
pub mod runner;
pub mod scenarios;
pub mod soak;
pub mod usage;
pub mod verify;
