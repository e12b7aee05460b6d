//! Many of everything, for long.

use std::process::ExitCode;

use cube_tests::runner;

fn main() -> ExitCode {
    runner::main([])
}
