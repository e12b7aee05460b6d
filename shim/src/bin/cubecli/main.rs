//! `cubecli`: what operators ask about sandboxes and their logs.

mod archive;
mod args;
mod containerd;
mod cp;
mod end;
mod error;
mod gc;
mod info;
mod interrupt;
mod logs;
mod ls;
mod namespace;
mod pause;
mod print;
mod progress;
mod restore;
mod rollback;
mod sandboxes;
mod shim;
mod snapshot;
mod status;
mod table;
mod task;
mod time;
mod wait;

use std::{fs::File, io, os::fd::AsFd, process::ExitCode};

use clap::Parser;
use cube_shim::config::Config;

use args::{Cli, Command, CubeboxCommand};
use error::CliError;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has had enough of it: that is how `| head` ends, and no failure.
        Err(CliError::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => {
            error::complain(&e);
            e.exit_code()
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    let config = Config::load(cli.config.as_deref())?;
    let output = output()?;
    match cli.command {
        Command::Logs(args) | Command::Cubebox { command: CubeboxCommand::Logs(args) } => {
            logs::run(&config, &args, output)
        }
        Command::Cubebox { command: CubeboxCommand::Ls(args) } => ls::run(&config, &args, output),
        Command::Cubebox { command: CubeboxCommand::Status(args) } => status::run(&config, &args, output),
        Command::Cubebox { command: CubeboxCommand::Wait(args) } => wait::run(&config, &args),
        Command::Cubebox { command: CubeboxCommand::Pause(args) } => pause::pause(&config, &args),
        Command::Cubebox { command: CubeboxCommand::Resume(args) } => pause::resume(&config, &args),
        Command::Cubebox { command: CubeboxCommand::Cp(args) } => cp::run(&config, &args, output),
        Command::Cubebox { command: CubeboxCommand::Kill(args) } => end::kill(&config, &args),
        Command::Cubebox { command: CubeboxCommand::Rm(args) } => end::rm(&config, &args),
        Command::Cubebox { command: CubeboxCommand::Rollback(args) } => rollback::run(&config, &args),
        Command::Cubebox { command: CubeboxCommand::Snapshot(args) } => {
            snapshot::take(&config, &args, output)
        }
        Command::Cubebox { command: CubeboxCommand::Snapshots(args) } => {
            snapshot::list(&config, &args, output)
        }
        Command::Cubebox { command: CubeboxCommand::Restore(args) } => restore::run(&config, &args, output),
        Command::Cubebox { command: CubeboxCommand::Export(args) } => archive::export(&config, &args, output),
        Command::Cubebox { command: CubeboxCommand::Import(args) } => archive::import(&config, &args, output),
        Command::Cubebox { command: CubeboxCommand::Gc(args) } => gc::run(&config, &args, output),
        Command::Info => info::run(&config, cli.config.as_deref(), output),
    }
}

/// Standard output without the line buffer of [`io::stdout`], which would cut logs into lines.
fn output() -> Result<File, CliError> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned().map_err(CliError::Output)?))
}
