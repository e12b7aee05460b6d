//! What containerd mounts for a container, and how it gets into the guest.
//!
//! containerd names the root file system as a list of mounts and leaves making them to the shim.
//! Directories (overlay, bind) are mounted on the host, below the sandbox's [`Share`], which
//! virtiofsd exports. A file system on a block device or in a file goes to the guest as a disk, and
//! with `cube.rootfs.mode=block` so do directories, after they were packed ([`block`]).
//! Volumes, which are the bind mounts in the container's spec, go through the share.

mod bind;
pub mod block;
mod mount;
pub mod mountinfo;
mod plan;
mod share;

use std::{io, path::PathBuf};

pub use self::{
    mount::HostMount,
    plan::{Plan, Prepared, Rootfs, Volume},
    share::{GUEST_SHARE, Share},
};

/// Why a container's file systems cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A mount that cannot be done, or not across the boundary of a VM.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// The mount, with its type and source.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
    /// An option that makes no sense where it is.
    #[error("the mount option {option:?} of {source_path:?} is not valid: {reason}")]
    Option {
        /// The option.
        option: String,
        /// The mount's source.
        source_path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A mount's source that is not there.
    #[error("the source {path} of {what} cannot be used")]
    Source {
        /// The source.
        path: PathBuf,
        /// "the rootfs", "the volume /data".
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A container id that is not a file name.
    #[error("the container id {0:?} is not a file name")]
    Id(String),
    /// A mount failed.
    #[error("cannot mount {mount_source:?} on {target} as {fs_type}")]
    Mount {
        /// File system type.
        fs_type: String,
        /// What was mounted.
        mount_source: String,
        /// Where.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program of `[tools]` is not there.
    #[error(transparent)]
    Program(#[from] Box<crate::vmm::VmmError>),
    /// A program of `[tools]` cannot be started.
    #[error("cannot start {program}, or mount what it shall pack")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why. What is done between fork and exec fails as exec does.
        source: io::Error,
    },
    /// A program of `[tools]` failed.
    #[error("{program} ended with {status}: {output}")]
    Failed {
        /// The program.
        program: PathBuf,
        /// Exit status or signal.
        status: String,
        /// What it printed first.
        output: String,
    },
    /// More than may be packed.
    #[error(
        "the rootfs has more than {limit} bytes, which is rootfs.image_limit: raise that, or use cube.rootfs.mode=share"
    )]
    TooLarge {
        /// `rootfs.image_limit`.
        limit: u64,
    },
    /// No room for what is to be packed.
    #[error("packing the rootfs takes {needed} bytes, and {dir} has {available} left")]
    NoRoom {
        /// Bytes that the files have.
        needed: u64,
        /// Bytes that are free.
        available: u64,
        /// `rootfs.cache_dir`.
        dir: PathBuf,
    },
    /// It took too long.
    #[error("{what} took longer than {limit:?}")]
    Slow {
        /// What.
        what: &'static str,
        /// The limit.
        limit: std::time::Duration,
    },
    /// The create was ended by a SIGKILL.
    #[error("the rootfs was given up while it was being packed")]
    Cancelled,
    /// A file system operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot create" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// For `map_err`.
fn failed(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> RootfsError {
    move |source| RootfsError::Io { action, path: path.into(), source }
}
