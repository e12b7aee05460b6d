//! Connections and readers that fail.

use std::process::ExitCode;

use cube_tests::runner;

fn main() -> ExitCode {
    runner::main([])
}
