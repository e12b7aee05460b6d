//! A guest that does everything it must not.

use std::process::ExitCode;

use cube_tests::runner;

fn main() -> ExitCode {
    runner::main([])
}
