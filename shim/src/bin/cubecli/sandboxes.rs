//! The sandboxes of this host, as their state files describe them.

use std::{fs, io, path::Path};

use cube_shim::{
    log::locate::Name,
    state::{ContainerState, RunDir, State},
};

use crate::error::{CliError, chain};

/// A sandbox that has a run directory.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) dir: RunDir,
    pub(crate) state: State,
}

/// Every run directory below `run_dir`. None if that does not exist.
pub(crate) fn run_dirs(run_dir: &Path) -> Result<Vec<RunDir>, CliError> {
    let failed = |source| CliError::Io { action: "cannot list", path: run_dir.into(), source };
    let entries = match fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let is_key = |name: &str| name.len() == 20 && name.bytes().all(|b| b.is_ascii_hexdigit());
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && entry.file_name().to_str().is_some_and(is_key) {
            dirs.extend(RunDir::of_socket(&entry.path().join("shim.sock")));
        }
    }
    dirs.sort_by(|a, b| a.key().cmp(b.key()));
    Ok(dirs)
}

/// Every sandbox with a readable state; the others are named on standard error.
pub(crate) fn all(run_dir: &Path) -> Result<Vec<Sandbox>, CliError> {
    let mut sandboxes = Vec::new();
    for dir in run_dirs(run_dir)? {
        match dir.load() {
            Ok(Some(state)) => sandboxes.push(Sandbox { dir, state }),
            Ok(None) => {}
            Err(e) => eprintln!("cubecli: {}", chain(&e)),
        }
    }
    Ok(sandboxes)
}

impl Sandbox {
    /// Its containers.
    pub(crate) fn containers(&self) -> impl Iterator<Item = (Name, &ContainerState)> {
        let name = |id: &String| Name { namespace: self.state.namespace.clone(), id: id.clone() };
        self.state.containers.iter().map(move |(id, container)| (name(id), container))
    }
}

/// The sandbox that holds container `name`.
pub(crate) fn of_container(run_dir: &Path, name: &Name) -> Result<Option<Sandbox>, CliError> {
    let holds = |sandbox: &Sandbox| sandbox.containers().any(|(container, _)| container == *name);
    Ok(all(run_dir)?.into_iter().find(holds))
}
