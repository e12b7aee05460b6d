//! Finding the log of a container, running or deleted.
//!
//! A log directory is `<root>/<namespace>/<container id>/`. Roots are the configured log directory,
//! the directory of containerd's bundles (which has the same layout), and what the state files of
//! running sandboxes name. Those of template builds are `<template_dir>/<template id>/`: the last name of
//! `template_dir` stands in the place of a namespace. When an id is used again, its older log is renamed to `<id>.<time>`.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use super::reader::{Dir, ReadError, Stream};
use crate::text::printable;

/// The value of `log.dir` that puts logs into the containers' bundles.
pub const BUNDLE: &str = "bundle";

/// Where containerd keeps the bundles of running tasks, unless its `state` is configured otherwise.
pub const TASK_DIR: &str = "/run/containerd/io.containerd.runtime.v2.task";

/// Most bytes of a containerd identifier.
const ID_MAX: usize = 76;

/// Names a log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// containerd namespace; of a template, the name of the directory that it is in.
    pub namespace: String,
    /// Container or template id, or `<id>.<time>`.
    pub id: String,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The names of directories may be anything.
        write!(f, "{}/{}", printable(&self.namespace), printable(&self.id))
    }
}

/// A log directory that was found.
#[derive(Debug)]
pub struct Log {
    /// Whose it is.
    pub name: Name,
    /// The open directory.
    pub dir: Dir,
}

/// Why no log was found.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// Not an identifier of containerd, and so possibly a path.
    #[error(
        "{value:?} is not a valid {what}: it has letters, digits, '.', '_' and '-', begins with a letter or digit, and is at most {ID_MAX} long"
    )]
    Invalid {
        /// "container ID", "template ID" or "namespace".
        what: &'static str,
        /// As given.
        value: String,
    },
    /// No log has this name.
    #[error(
        "no log whose ID begins with {id:?} in {}{}", list(.roots.iter().map(|r| r.display())), hint(.older)
    )]
    NotFound {
        /// As given.
        id: String,
        /// Where was looked.
        roots: Vec<PathBuf>,
        /// Older logs, which must be named in full.
        older: Vec<Name>,
    },
    /// Several logs have this name.
    #[error("{id:?} is ambiguous, it could be:\n  {}", .candidates.iter().map(Name::to_string).collect::<Vec<_>>().join("\n  "))]
    Ambiguous {
        /// As given.
        id: String,
        /// What it could mean.
        candidates: Vec<Name>,
    },
    /// A directory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

fn list(items: impl Iterator<Item = impl fmt::Display>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn hint(older: &[Name]) -> String {
    if older.is_empty() {
        return String::new();
    }
    format!("; older logs must be named in full: {}", list(older.iter()))
}

/// Finds the log of the container whose id is, or begins with, `id`; in `namespace` if given. A full
/// name wins over names that it begins.
pub fn find(roots: &[PathBuf], namespace: Option<&str>, id: &str) -> Result<Log, LocateError> {
    check("container ID", id)?;
    if let Some(namespace) = namespace {
        check("namespace", namespace)?;
    }
    look_for(roots, namespace, id)
}

/// The same for the log of a template build.
pub fn find_template(template_dir: &Path, id: &str) -> Result<Log, LocateError> {
    check("template ID", id)?;
    let (root, name) = templates(template_dir);
    match look_for(&[root.into()], Some(name), id) {
        Err(LocateError::NotFound { id, older, .. }) => {
            Err(LocateError::NotFound { id, roots: vec![template_dir.into()], older })
        }
        found => found,
    }
}

fn look_for(roots: &[PathBuf], namespace: Option<&str>, id: &str) -> Result<Log, LocateError> {
    let mut found = BTreeMap::new();
    for root in roots {
        for name in names(root, namespace)? {
            if name.id.starts_with(id) && has_log(root, &name) {
                found.entry(name).or_insert_with(|| root.clone());
            }
        }
    }
    let exact: Vec<Name> = found.keys().filter(|name| name.id == id).cloned().collect();
    let (older, current): (Vec<Name>, Vec<Name>) = found.keys().cloned().partition(|n| is_older(&n.id));
    let mut matches = if exact.is_empty() { current } else { exact };
    match (matches.pop(), matches.is_empty()) {
        (Some(name), true) => {
            let root = found.remove(&name).unwrap_or_default();
            let dir = open(&root, &name)?;
            Ok(Log { name, dir })
        }
        (Some(last), false) => {
            matches.push(last);
            Err(LocateError::Ambiguous { id: id.into(), candidates: matches })
        }
        (None, _) => Err(LocateError::NotFound { id: id.into(), roots: roots.into(), older }),
    }
}

/// Every name below `root`, in `namespace` if given. Nothing if `root` does not exist. What cannot be
/// the id of a container is left out.
pub fn names(root: &Path, namespace: Option<&str>) -> Result<Vec<Name>, ReadError> {
    let root = match Dir::open(root) {
        Ok(root) => root,
        Err(e) if e.is_not_found() => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in root.names()? {
        if namespace.is_some_and(|wanted| wanted != entry) {
            continue;
        }
        // What is not a directory, or is one behind a link, is no namespace of ours.
        let Ok(dir) = root.open_dir(&entry) else { continue };
        let ids = dir.names()?.into_iter().filter(|id| is_identifier(id));
        names.extend(ids.map(|id| Name { namespace: entry.clone(), id }));
    }
    Ok(names)
}

/// Where the logs of template builds are as [`names`] has it: the root, and what stands for the namespace.
pub fn templates(template_dir: &Path) -> (&Path, &str) {
    let name = template_dir.file_name().and_then(|name| name.to_str());
    (template_dir.parent().unwrap_or(template_dir), name.unwrap_or_default())
}

/// Opens the log directory `name` below `root`.
pub fn open(root: &Path, name: &Name) -> Result<Dir, ReadError> {
    Dir::open(root)?.open_dir(&name.namespace)?.open_dir(&name.id)
}

/// The root that `log_dir`, the log directory of `name`, is below, if it has the usual layout.
pub fn root_of(log_dir: &Path, name: &Name) -> Option<PathBuf> {
    let suffix = Path::new(&name.namespace).join(&name.id);
    let root = log_dir.ends_with(suffix).then(|| log_dir.parent()?.parent())??;
    Some(root.into())
}

/// Whether `id` is the name of a log that was renamed when its id was used again.
pub fn is_older(id: &str) -> bool {
    id.rsplit_once('.').is_some_and(|(_, time)| time.len() >= 10 && time.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a candidate holds a log. One that cannot be examined stays a candidate, for the error.
fn has_log(root: &Path, name: &Name) -> bool {
    match open(root, name).and_then(|dir| dir.names()) {
        Ok(files) => files.iter().any(|file| Stream::is_log_file(file)),
        Err(_) => true,
    }
}

fn check(what: &'static str, value: &str) -> Result<(), LocateError> {
    if is_identifier(value) { Ok(()) } else { Err(LocateError::Invalid { what, value: value.into() }) }
}

/// Whether `value` can be a name of a log or of a namespace, or the beginning of one.
fn is_identifier(value: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    let begins_well = value.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    // An older log's name is longer than an id by its time.
    begins_well && value.len() <= ID_MAX + 24 && value.bytes().all(allowed)
}

#[cfg(test)]
mod tests;
