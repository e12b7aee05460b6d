//! Parts of the shim, shared by its two programs `containerd-shim-cube-v2` and `cubecli`.
//!
//! `docs/architecture.md` tells which module does what, and follows one log byte and one `Start`
//! through them.

pub mod agent;
pub mod annotations;
pub mod bootstrap;
pub mod cgroup;
pub mod config;
pub mod containerd;
pub mod control;
pub mod device;
pub mod errors;
pub mod events;
mod files;
pub mod log;
pub mod logging;
pub mod options;
pub mod rootfs;
pub mod sandbox;
pub mod snapshot;
pub mod state;
pub mod stdio;
pub mod task;
pub mod tenant;
pub mod text;
pub mod users;
pub mod vmm;
