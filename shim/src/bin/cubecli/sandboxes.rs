//! The sandboxes of this host, as their state files describe them.

use std::{collections::BTreeSet, path::Path};

use cube_shim::{
    log::locate::{Log, Name},
    state::{ContainerState, RunDir, State},
};

use crate::error::{CliError, complain};

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
            Err(e) => complain(&e),
        }
    }
    Ok(sandboxes)
}

impl Sandbox {
    /// Its own name.
    pub(crate) fn name(&self) -> Name {
        Name { namespace: self.state.namespace.clone(), id: self.state.sandbox_id.clone() }
    }

    /// Whether its own ID or that of a container of its is as `wanted` says.
    fn has(&self, wanted: impl Fn(&str) -> bool) -> bool {
        wanted(&self.state.sandbox_id) || self.state.containers.keys().any(|id| wanted(id))
    }

    /// Its containers.
    pub(crate) fn containers(&self) -> impl Iterator<Item = (Name, &ContainerState)> {
        let name = |id: &String| Name { namespace: self.state.namespace.clone(), id: id.clone() };
        self.state.containers.iter().map(move |(id, container)| (name(id), container))
    }
}

/// The sandbox that has the ID `id`, or a container with it, or the only one of which an ID begins so; in
/// `namespace` if given.
pub(crate) fn find(run_dir: &Path, namespace: Option<&str>, id: &str) -> Result<Sandbox, CliError> {
    let (mut exact, mut begun) = (Vec::new(), Vec::new());
    for sandbox in all(run_dir)? {
        if namespace.is_some_and(|wanted| wanted != sandbox.state.namespace) {
            continue;
        }
        match sandbox.has(|known| known == id) {
            true => exact.push(sandbox),
            false if sandbox.has(|known| known.starts_with(id)) => begun.push(sandbox),
            false => {}
        }
    }
    let mut found = if exact.is_empty() { begun } else { exact };
    match (found.pop(), found.is_empty()) {
        (Some(sandbox), true) => Ok(sandbox),
        (None, _) => Err(CliError::NoSandbox { id: id.into() }),
        (Some(last), false) => {
            let candidates = found.iter().chain([&last]).map(Sandbox::name).collect();
            Err(CliError::Ambiguous { id: id.into(), candidates })
        }
    }
}

/// The container that has the ID `id`, or the only one whose ID begins so, with its sandbox; in `namespace` if given.
/// The ID of a sandbox is that of its main container.
pub(crate) fn find_container(
    run_dir: &Path,
    namespace: Option<&str>,
    id: &str,
) -> Result<(Sandbox, String), CliError> {
    let (mut exact, mut begun) = (Vec::new(), Vec::new());
    for sandbox in all(run_dir)? {
        if namespace.is_some_and(|wanted| wanted != sandbox.state.namespace) {
            continue;
        }
        let ids: BTreeSet<&String> =
            sandbox.state.containers.keys().chain([&sandbox.state.sandbox_id]).collect();
        let matching = ids.into_iter().filter(|known| known.starts_with(id));
        for known in matching.cloned().collect::<Vec<_>>() {
            let name = Name { namespace: sandbox.state.namespace.clone(), id: known };
            if name.id == id { &mut exact } else { &mut begun }.push((name, sandbox.dir.clone()));
        }
    }
    let mut found = if exact.is_empty() { begun } else { exact };
    match (found.pop(), found.is_empty()) {
        (Some((name, dir)), true) => match dir.load()? {
            Some(state) => Ok((Sandbox { dir, state }, name.id)),
            None => Err(CliError::NoSandbox { id: id.into() }),
        },
        (None, _) => Err(CliError::NoSandbox { id: id.into() }),
        (Some(last), false) => {
            let candidates = found.into_iter().chain([last]).map(|(name, _)| name).collect();
            Err(CliError::Ambiguous { id: id.into(), candidates })
        }
    }
}

/// The container whose log this is, with its sandbox: the one of that name, or for a template the one that
/// writes to its directory.
pub(crate) fn that_logs(run_dir: &Path, log: &Log) -> Result<Option<(Sandbox, String)>, CliError> {
    for sandbox in all(run_dir)? {
        let mut containers = sandbox.containers();
        let writer =
            containers.find(|(name, container)| *name == log.name || container.logs_to(log.dir.path()));
        if let Some((name, _)) = writer {
            drop(containers);
            return Ok(Some((sandbox, name.id)));
        }
    }
    Ok(None)
}
