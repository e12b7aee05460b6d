//! What README.md tells newcomers to run first.

use std::{process::Command, time::Duration};

use crate::{command::start, needs::Backend, paths};

/// `scripts/demo` looks by itself for what it leaves behind, and fails if it finds anything.
pub fn the_demo_comes_to_its_end_and_leaves_nothing(backend: Backend) {
    // Ended by SIGTERM it cleans up.
    let mut demo = Command::new("timeout");
    demo.args(["-k", "10", "380"]).arg(paths::demo());
    demo.env("CUBE_VMM", backend.name());
    demo.env("CUBE_BIN", paths::bin_dir());
    demo.env("CUBE_AGENT", paths::agent());
    demo.env("CUBE_GUEST", paths::guest_dir());
    demo.env("CUBE_IMAGE", paths::image());
    let shown = start(&mut demo).wait(Duration::from_secs(400)).succeeds().out();
    assert!(shown.contains("The demo took"), "{shown}");
}
