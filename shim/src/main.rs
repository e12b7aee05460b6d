//! containerd-shim-cube-v2: run by containerd, never by hand. See [`cube_shim::bootstrap`].

use std::{env, process::ExitCode};

use cube_shim::{bootstrap, errors::chain, vmm::keeper};

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    if let Some(code) = keeper::run(&arguments) {
        return code;
    }
    match bootstrap::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-cube-v2: {}", chain(&e));
            ExitCode::FAILURE
        }
    }
}
