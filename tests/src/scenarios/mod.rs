//! What runs on more than one backend. Each function is a test, and its name is the contract.

pub mod exactness;
pub mod exits;
pub mod isolation;
pub mod lifecycle;
pub mod memory;
pub mod output;
pub mod rest;
pub mod survival;
pub mod terminal;

use crate::lab::Lab;

/// A container that only waits. A shell, for the first process of a pid namespace ignores SIGTERM
/// unless it handles it.
pub const WAIT: [&str; 3] = ["sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.1; done"];

/// A lab with the container `c` that only waits.
pub fn lab_with_waiting_container(backend: crate::needs::Backend) -> Lab {
    let lab = Lab::new(backend);
    lab.detached("c", &WAIT);
    lab
}
