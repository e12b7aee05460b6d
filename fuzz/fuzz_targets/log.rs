//! Readers and recovery of a log, on files that anybody may have written.

#![no_main]

use std::{env::temp_dir, path::Path};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    // In memory, where there is such a place.
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { temp_dir() };
    let dir = tempfile::tempdir_in(parent).expect("a directory for the log");
    cube_shim::log::fuzzing::log(dir.path(), input);
});
