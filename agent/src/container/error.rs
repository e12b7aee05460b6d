//! What can go wrong between a spec and its running processes.

use std::{io, path::PathBuf, time::Duration};

/// What creating or running a container can fail with. Mapped to ttrpc codes by the server.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// A field of the spec that this version cannot honour.
    #[error("{field} is not supported{}", hint.map(|h| format!(": {h}")).unwrap_or_default())]
    Unsupported {
        /// Path of the field in config.json.
        field: String,
        /// What to do, if anything.
        hint: Option<&'static str>,
    },
    /// It is not a spec at all, or a field has the wrong type.
    #[error("cannot read the JSON of the spec")]
    Json(#[source] serde_json::Error),
    /// A field of the spec that makes no sense.
    #[error("{field} is {value:?}: {reason}")]
    Invalid {
        /// Path of the field in config.json.
        field: String,
        /// The value found.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The init stage failed: what it did, to what, and the errno.
    #[error("{action}")]
    Stage {
        /// "exec /bin/nosuch", "mount proc on /proc".
        action: String,
        /// The errno.
        source: io::Error,
    },
    /// A cgroup operation failed.
    #[error("{action} {path}")]
    Cgroup {
        /// "cannot write 4096 to", for example.
        action: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process does not come to a point where it can be frozen: it waits in the kernel, for a file
    /// system that does not answer for example.
    #[error("{} cannot be frozen within {limit:?}: a process waits in the kernel, \
        for a file system or device that does not answer", describe(.containers))]
    NotFrozen {
        /// Ids of the containers with such a process.
        containers: Vec<String>,
        /// How long it was given.
        limit: Duration,
    },
    /// A process did not come as far as to run its program. It has been killed.
    #[error(
        "starting the process took longer than {limit:?}, and it was killed: is its program or working \
        directory on a file system that does not answer?"
    )]
    SlowStart {
        /// How long it was given.
        limit: Duration,
    },
    /// The container is not in the state that the call needs.
    #[error("the container is {state}, it must be {needed}")]
    State {
        /// Its state.
        state: &'static str,
        /// The state needed.
        needed: &'static str,
    },
}

fn describe(ids: &[String]) -> String {
    match ids {
        // It came to rest while it was looked for.
        [] => "the containers".to_owned(),
        [id] => format!("container {id:?}"),
        ids => format!("containers {ids:?}"),
    }
}

impl ContainerError {
    pub(crate) fn unsupported(field: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), hint: None }
    }

    pub(crate) fn invalid(
        field: impl Into<String>,
        value: impl std::fmt::Display,
        reason: impl Into<String>,
    ) -> Self {
        Self::Invalid { field: field.into(), value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn stage(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Stage { action: action.into(), source: source.into() }
    }

    pub(crate) fn cgroup(
        action: impl Into<String>,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Cgroup { action: action.into(), path: path.into(), source: source.into() }
    }
}
