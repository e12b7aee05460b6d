//! What runs on more than one backend. Each function is a test, and its name is the contract.

pub mod block;
pub mod copy;
pub mod counters;
pub mod demo;
pub mod disks;
pub mod ending;
pub mod exactness;
pub mod exits;
pub mod faults;
mod full_flow;
pub mod isolation;
pub mod kills;
pub mod large_logs;
pub mod layers;
pub mod lifecycle;
pub mod limits;
pub mod machines;
pub mod memory;
pub mod output;
pub mod pause;
pub mod pauses;
pub mod pods;
pub mod ready;
pub mod removal;
pub mod rest;
pub mod restore;
pub mod rests;
pub mod rollback;
pub mod rotation;
pub mod scale;
pub mod snapshots;
pub mod specs;
pub mod store;
pub mod survival;
pub mod suspend;
pub mod taken;
pub mod templates;
pub mod terminal;
pub mod walls;

use nix::sys::signal::{Signal, kill};

use crate::{command::poll, lab::Lab};

/// A container that only waits. A shell, for the first process of a pid namespace ignores SIGTERM
/// unless it handles it.
pub const WAIT: [&str; 3] = ["sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.1; done"];

/// A lab with the container `c` that only waits.
pub fn lab_with_waiting_container(backend: crate::needs::Backend) -> Lab {
    let lab = Lab::new(backend);
    lab.detached("c", &WAIT);
    lab
}

/// Makes the empty file `path` in container `id`, which may end by that: an exec ends with it.
fn make_file(lab: &Lab, id: &str, path: &str) {
    let made = lab.exec(id, &["touch", path]);
    assert!(matches!(made.code(), 0 | 137), "{made}");
}

/// Kills the shim of task `c`, for which containerd runs `shim delete` then.
fn a_killed_shim_leaves_nothing(lab: &Lab) {
    kill(lab.shim_pid("c"), Signal::SIGKILL).unwrap();
    let over = || lab.task("c").is_none_or(|(state, _)| state == "STOPPED");
    assert!(poll(lab.limit(), over), "the task lives on");
    lab.ctr(&["task", "delete", "--force", "c"]);
    lab.ctr(&["container", "delete", "c"]).succeeds();
    lab.nothing_is_left();
}
