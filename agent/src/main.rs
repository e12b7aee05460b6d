//! cube-agent: PID 1 of a Cubebox guest.

use std::{
    convert::Infallible,
    ffi::OsString,
    io,
    path::PathBuf,
    process::{self, ExitCode},
    time::Duration,
};

use cube_agent::{
    boot::{self, BootError, cgroup, console, limits, power, process as process_backend},
    container,
    errors::chain,
    server::{self, Config, ServeError, listen::Listener},
};
use tracing::level_filters::LevelFilter;

const USAGE: &str = "\
cube-agent, PID 1 of a Cubebox guest

  cube-agent                  as PID 1: boots the guest and serves its host over vsock
  cube-agent process --listen <unix socket> --cgroup <cgroup v2 directory> --state <directory>
                              as PID 1 of fresh namespaces: serves on a Unix socket, without a VM
  cube-agent init             internal: the first stage of a process in a container
  cube-agent --version        prints the version";

/// Exit status for a command line that makes no sense, as in most shells.
const USAGE_ERROR: u8 = 2;

/// Why the agent ends.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot boot")]
    Boot(#[from] BootError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot serve")]
    Serve(#[from] ServeError),
}

fn main() -> ExitCode {
    // Nobody has anything to look for in the memory of the agent or its stages. execve makes the program of
    // a container dumpable again.
    if let Err(errno) = nix::sys::prctl::set_dumpable(false) {
        eprintln!("cube-agent: cannot protect its memory: {errno}");
        return ExitCode::FAILURE;
    }
    let mut args = std::env::args_os().skip(1);
    match args.next().as_deref().and_then(|arg| arg.to_str()) {
        Some("process") => process_backend(args),
        Some("init") => container::init_stage(),
        Some("--version") => {
            println!("cube-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--help") => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        // The kernel hands words of its command line that it does not know to PID 1.
        _ if process::id() == 1 => match guest() {
            Err(error) => console::fatal(&chain(&error)),
        },
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(USAGE_ERROR)
        }
    }
}

fn guest() -> Result<Infallible, Error> {
    console::power_off_on_panic();
    boot::guest()?;
    serve(Config { listener: Listener::Vsock, cgroup: PathBuf::from(cgroup::CONTAINERS), host_run: None })?;
    power::sync_and_off();
    // Reached only if the kernel cannot power off.
    console::fatal("the kernel did not power off")
}

fn process_backend(args: impl Iterator<Item = OsString>) -> ExitCode {
    let options = match process_backend::Options::parse(args) {
        Ok(options) => options,
        Err(usage) => {
            eprintln!("cube-agent: {usage}");
            return ExitCode::from(USAGE_ERROR);
        }
    };
    console::init_logging(LevelFilter::INFO);
    match serve_process_backend(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve_process_backend(options: process_backend::Options) -> Result<(), Error> {
    limits::raise();
    let (listener, host_run) = process_backend::set_up(&options)?;
    serve(Config { listener: Listener::Unix(listener), cgroup: options.cgroup, host_run: Some(host_run) })
}

/// One thread does all I/O. The others, for calls that block (mounts), are few, small and short-lived.
fn serve(config: Config) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .thread_stack_size(256 * 1024)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(Error::Runtime)?;
    let result = runtime.block_on(server::run(config));
    // A mount that hangs must not keep the guest from ending.
    runtime.shutdown_background();
    Ok(result?)
}
