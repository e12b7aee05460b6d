//! Parts of the shim, shared by its two programs `containerd-shim-cube-v2` and `cubecli`.
//!
//! `docs/architecture.md` tells which module does what, and follows one log byte and one `Start`
//! through them.

pub mod agent;
pub mod cgroup;
pub mod config;
pub mod log;
pub mod rootfs;
pub mod stdio;
pub mod vmm;
