//! What `make build` made. `scripts/env` names the same files for the scripts.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Directory of `containerd-shim-cube-v2` and `cubecli`: `CUBE_BIN`.
pub fn bin_dir() -> PathBuf {
    named("CUBE_BIN", "release")
}

/// The static agent: `CUBE_AGENT`.
pub fn agent() -> PathBuf {
    built(named("CUBE_AGENT", "x86_64-unknown-linux-gnu/agent/cube-agent"))
}

/// The static program of the tests' image, which runs on the host as well: `CUBE_WRITER`.
pub fn writer() -> PathBuf {
    built(named("CUBE_WRITER", "x86_64-unknown-linux-gnu/agent/cube-test-writer"))
}

/// Directory of `vmlinuz`, `vmlinux` and `initrd.img`: `CUBE_GUEST`.
pub fn guest_dir() -> PathBuf {
    named("CUBE_GUEST", "guest")
}

/// The image that the tests run, as an OCI layout in a tar: `CUBE_IMAGE`.
pub fn image() -> PathBuf {
    built(named("CUBE_IMAGE", "test-image.tar"))
}

/// The script of `make demo`: `CUBE_DEMO`.
pub fn demo() -> PathBuf {
    built(named("CUBE_DEMO", "../scripts/demo"))
}

/// The shim.
pub fn shim() -> PathBuf {
    built(bin_dir().join("containerd-shim-cube-v2"))
}

/// Directory of a shim and an agent with fault points: `CUBE_FAULTS`.
pub fn fault_dir() -> PathBuf {
    built(named("CUBE_FAULTS", "faults/debug"))
}

/// The operator's tool.
pub fn cubecli() -> PathBuf {
    built(bin_dir().join("cubecli"))
}

fn named(variable: &str, default: &str) -> PathBuf {
    env::var_os(variable)
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(default))
}

/// A file that is not there is a failure, not a reason to skip: it is ours to build.
fn built(path: PathBuf) -> PathBuf {
    path.canonicalize().unwrap_or_else(|e| panic!("{}: {e}: run `make build` first", path.display()))
}
