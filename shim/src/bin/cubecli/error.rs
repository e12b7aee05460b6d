//! What can go wrong, and the exit codes that scripts rely on.

use std::{io, process::ExitCode};

use cube_shim::{
    config::ConfigError,
    log::{locate::LocateError, reader::ReadError},
    state::StateError,
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Locate(#[from] LocateError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    #[error("cannot wait for the log to grow")]
    Wait(#[source] io::Error),
    #[error("there is no process {0}")]
    NoProcess(u32),
    #[error("cannot enter the mount namespace of process {pid}")]
    Namespace {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the runtime that talks to the shims")]
    Runtime(#[source] io::Error),
    #[error("{0} of the things to remove could not be removed, see above")]
    Incomplete(usize),
}

impl CliError {
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            CliError::Locate(LocateError::Invalid { .. }) => 2,
            CliError::Locate(LocateError::NotFound { .. }) | CliError::NoProcess(_) => 3,
            CliError::Locate(LocateError::Ambiguous { .. }) => 4,
            _ => 1,
        })
    }
}
