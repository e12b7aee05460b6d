//! Logs on disks that are full, and logs that are large.

use std::process::ExitCode;

use cube_tests::runner;

fn main() -> ExitCode {
    runner::main([])
}
