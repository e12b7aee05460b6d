//! Readers and recovery of a log, on files that anybody may have written.

#![no_main]

use std::sync::LazyLock;

use tempfile::TempDir;

/// Made once: what is in it is removed by each run.
static DIR: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = std::path::Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
    tempfile::tempdir_in(parent).expect("a directory for the log")
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| cube_shim::log::fuzzing::log(DIR.path(), input));
