//! Processes that die at the worst moment.

use std::process::ExitCode;

use cube_tests::runner;

fn main() -> ExitCode {
    runner::main([])
}
