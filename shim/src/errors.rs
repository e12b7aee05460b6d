//! What the Task service can fail with, and the one place where that becomes a ttrpc status.

use std::{error::Error as StdError, io};

use cube_protocol::environment::EnvironmentError;
use ttrpc::Code;

use crate::{
    agent::AgentError, annotations::AnnotationError, cgroup::CgroupError, config::ConfigError,
    options::OptionsError, rootfs::RootfsError, sandbox::spec::SpecError, snapshot::SnapshotError,
    state::StateError, stdio::StdioError, users::UserError, vmm::VmmError,
};

/// The text of an error with all of its causes, "outer: inner: innermost".
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let inner = error.to_string();
        // Transparent wrappers repeat their cause.
        if !text.ends_with(&inner) {
            text.push_str(": ");
            text.push_str(&inner);
        }
        cause = error.source();
    }
    text
}

/// Why a call of the Task service failed. The codes are those of containerd's own shim.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An id that is not an identifier as containerd defines it.
    #[error("{what} {id:?} is not valid: {rule}")]
    Id {
        /// "container id" or "exec id".
        what: &'static str,
        /// The id.
        id: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// A field of a request that makes no sense.
    #[error("{field} is {value:?}: {reason}")]
    Argument {
        /// The field.
        field: &'static str,
        /// The value found.
        value: String,
        /// What is wrong, and what is accepted.
        reason: &'static str,
    },
    /// No such container or exec, or it has exited already.
    #[error("{what} {id:?} {state}")]
    NotFound {
        /// "container" or "exec".
        what: &'static str,
        /// Its id.
        id: String,
        /// "does not exist" or "has exited already".
        state: &'static str,
    },
    /// The id is taken.
    #[error("{what} {id:?} exists already")]
    AlreadyExists {
        /// "container" or "exec".
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The call does not fit the state.
    #[error("{what} {id:?} is {state}, {needed}")]
    State {
        /// "container", "exec" or "sandbox".
        what: &'static str,
        /// Its id.
        id: String,
        /// Its state.
        state: &'static str,
        /// What the call needs.
        needed: &'static str,
    },
    /// A container has exited that somebody wants to be ready.
    #[error("container {id:?} has exited with status {status}, and will not be ready")]
    NotReady {
        /// Its id.
        id: String,
        /// 0 to 255; 128 + n for death by signal n.
        status: u32,
    },
    /// A template that cannot be snapshotted, because it is not ready.
    #[error("the template {id:?} is not ready{after}: {waits_for}")]
    TemplateNotReady {
        /// Its id.
        id: String,
        /// " after" a time, or empty.
        after: String,
        /// Which container is not ready, and why.
        waits_for: String,
    },
    /// Something that this version cannot do.
    #[error("{what} is not supported by this version of Cubebox{hint}")]
    Unimplemented {
        /// What was asked.
        what: String,
        /// What to do instead, beginning with ": ", or empty.
        hint: &'static str,
    },
    /// The call was ended by a SIGKILL or a `shim delete`.
    #[error("the sandbox was killed while it was being created")]
    Killed,
    /// No sandbox can be made from the snapshot, as it was asked for.
    #[error("cannot restore: {reason}")]
    Restore {
        /// Why, and what would work.
        reason: String,
    },
    /// A sandbox cannot be put back to a snapshot, and is as it was.
    #[error("cannot roll back to the snapshot {snapshot:?}: {reason}")]
    Rollback {
        /// The snapshot.
        snapshot: String,
        /// Why.
        reason: String,
    },
    /// A sandbox was to be put back to a snapshot, and has ended by that.
    #[error(
        "the rollback to the snapshot {snapshot:?} failed after the VM was given up, and the sandbox has ended; the snapshot is as it was: {why}"
    )]
    RollbackEnded {
        /// The snapshot.
        snapshot: String,
        /// What failed.
        why: String,
    },
    /// The create-time environment cannot be delivered to a guest that is restored.
    #[error("process.env in config.json cannot be given to a restored sandbox")]
    Environment {
        /// Which entry, or how much; nothing of its content.
        source: EnvironmentError,
    },
    /// The VMM ended unexpectedly.
    #[error("the VM of sandbox {id:?} has ended: {description}")]
    VmmEnded {
        /// The sandbox.
        id: String,
        /// As the VMM backend describes it.
        description: String,
    },
    /// The owner task is gone: the shim is about to exit.
    #[error("the shim is shutting down")]
    ShuttingDown,
    /// A panic in a task of the shim.
    #[error("a task of the shim failed")]
    Task(#[from] tokio::task::JoinError),
    /// config.json cannot be used.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// An annotation cannot be honoured.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The runtime options cannot be honoured.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The stdio of a process cannot be set up.
    #[error("cannot set up stdio")]
    Stdio(#[from] StdioError),
    /// The VMM cannot do what was asked, or not run the VM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// No user of the host is left for the sandbox.
    #[error(transparent)]
    Users(#[from] UserError),
    /// The agent cannot be reached or refuses.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The state on disk cannot be kept.
    #[error(transparent)]
    StateFile(#[from] StateError),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The rootfs or a volume cannot be given to the guest.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A snapshot cannot be made or used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The sandbox's cgroup cannot be made or removed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl Error {
    /// The code that containerd gets.
    pub fn code(&self) -> Code {
        match self {
            Error::Id { .. }
            | Error::Argument { .. }
            | Error::Annotation(_)
            | Error::Environment { .. }
            | Error::Options(_)
            | Error::Stdio(StdioError::Uri { .. }) => Code::INVALID_ARGUMENT,
            Error::Spec(spec) => spec.code(),
            Error::NotFound { .. } => Code::NOT_FOUND,
            Error::AlreadyExists { .. } => Code::ALREADY_EXISTS,
            Error::State { .. }
            | Error::NotReady { .. }
            | Error::TemplateNotReady { .. }
            | Error::Restore { .. }
            | Error::Rollback { .. } => Code::FAILED_PRECONDITION,
            Error::RollbackEnded { .. } => Code::ABORTED,
            Error::Stdio(StdioError::Io { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                Code::FAILED_PRECONDITION
            }
            Error::Unimplemented { .. } => Code::UNIMPLEMENTED,
            Error::Killed => Code::ABORTED,
            Error::VmmEnded { .. } | Error::ShuttingDown => Code::UNAVAILABLE,
            Error::Vmm(vmm) => vmm_code(vmm),
            Error::Users(_) => Code::RESOURCE_EXHAUSTED,
            Error::Agent(agent) => agent_code(agent),
            Error::Rootfs(rootfs) => rootfs_code(rootfs),
            Error::Snapshot(snapshot) => snapshot_code(snapshot),
            Error::Cgroup(CgroupError::NotMounted | CgroupError::NoSystemd { .. }) => {
                Code::FAILED_PRECONDITION
            }
            Error::Cgroup(CgroupError::Path { .. } | CgroupError::ShimCgroup) => Code::INVALID_ARGUMENT,
            Error::Stdio(_) | Error::StateFile(_) | Error::Config(_) | Error::Cgroup(_) | Error::Task(_) => {
                Code::UNKNOWN
            }
        }
    }
}

fn vmm_code(error: &VmmError) -> Code {
    match error {
        VmmError::Unsupported { .. } => Code::UNIMPLEMENTED,
        VmmError::MissingProgram { .. }
        | VmmError::MissingImage { .. }
        | VmmError::TooOld { .. }
        | VmmError::CannotSnapshot { .. }
        | VmmError::Restore { .. } => Code::FAILED_PRECONDITION,
        VmmError::Ended { .. } => Code::UNAVAILABLE,
        _ => Code::UNKNOWN,
    }
}

fn snapshot_code(error: &SnapshotError) -> Code {
    match error {
        SnapshotError::Name(_) | SnapshotError::Outside { .. } | SnapshotError::Archive { .. } => {
            Code::INVALID_ARGUMENT
        }
        SnapshotError::Limit { .. } | SnapshotError::Space { .. } => Code::RESOURCE_EXHAUSTED,
        SnapshotError::Exists { .. } => Code::ALREADY_EXISTS,
        SnapshotError::NotFound { .. } | SnapshotError::NotOwned { .. } => Code::NOT_FOUND,
        SnapshotError::Manifest { .. }
        | SnapshotError::Format { .. }
        | SnapshotError::Protocol { .. }
        | SnapshotError::Foreign { .. }
        | SnapshotError::Length { .. }
        | SnapshotError::Damaged { .. }
        | SnapshotError::Many { .. }
        | SnapshotError::NoDigest { .. }
        | SnapshotError::Spec { .. }
        | SnapshotError::InUse { .. } => Code::FAILED_PRECONDITION,
        SnapshotError::Io { .. } | SnapshotError::Input(_) | SnapshotError::Output(_) => Code::UNKNOWN,
    }
}

fn rootfs_code(error: &RootfsError) -> Code {
    match error {
        RootfsError::Unsupported { .. } => Code::UNIMPLEMENTED,
        RootfsError::Option { .. } | RootfsError::Id(_) => Code::INVALID_ARGUMENT,
        RootfsError::Program(_) => Code::FAILED_PRECONDITION,
        RootfsError::Slow { .. } => Code::DEADLINE_EXCEEDED,
        RootfsError::Cancelled => Code::ABORTED,
        RootfsError::Source { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NOT_FOUND,
        _ => Code::UNKNOWN,
    }
}

fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { status, .. } => status.code(),
        AgentError::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        AgentError::Version(_) => Code::FAILED_PRECONDITION,
        AgentError::Large { .. } => Code::INVALID_ARGUMENT,
        AgentError::Unreachable { .. }
        | AgentError::Dial(_)
        | AgentError::Transport { .. }
        | AgentError::OtherGuest { .. } => Code::UNAVAILABLE,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_gets_the_code_of_the_agent_and_every_cause() {
        let status = ttrpc::get_status(Code::NOT_FOUND, "exec /bin/nosuch: No such file or directory");
        let error = Error::from(AgentError::Refused { call: "Start", status, repeated: false });
        let ttrpc::Error::RpcStatus(status) = error.into() else { panic!("not a status") };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert!(status.message().ends_with("exec /bin/nosuch: No such file or directory"), "{status:?}");
    }

    #[test]
    fn a_cause_is_named_once() {
        let source = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = Error::from(StdioError::Io { action: "cannot open", path: "/x".into(), source });
        assert_eq!(
            chain(&error),
            "cannot set up stdio: cannot open /x: No such file or directory (os error 2)"
        );
    }
}
