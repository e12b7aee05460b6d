//! The sandboxes of this host, as their state files describe them.

use std::path::Path;

use cube_shim::{
    errors::chain,
    log::locate::Name,
    state::{ContainerState, RunDir, State},
};

use crate::error::CliError;

/// A sandbox that has a run directory.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) dir: RunDir,
    pub(crate) state: State,
}

/// Every sandbox with a readable state; the others are named on standard error.
pub(crate) fn all(run_dir: &Path) -> Result<Vec<Sandbox>, CliError> {
    let mut sandboxes = Vec::new();
    for dir in RunDir::all(run_dir)? {
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
