//! What a call can fail with, and the one place where that becomes a ttrpc status.

use std::{io, time::Duration};

use cube_protocol::{environment::EnvironmentError, version::Mismatch};
use ttrpc::{Code, get_status};

use super::tasks::GivenUp;
use crate::{
    container::ContainerError,
    errors,
    guest::{network::NetworkError, quiesce::QuiesceError, storage::StorageError},
    stdio::{ProcessId, StdioError},
};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An id that breaks containerd's rules for identifiers.
    #[error("{what} {id:?} {reason}")]
    Id {
        /// "container id" or "exec id".
        what: &'static str,
        /// The id, cut if it is too long.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A field of the request that makes no sense.
    #[error("{field} is {value}: {reason}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        reason: &'static str,
    },
    /// A message of another type than the call needs.
    #[error("{field} is of type {found:?}, {needed} is needed")]
    Type {
        /// The field of the request.
        field: &'static str,
        /// Its type.
        found: String,
        /// The right one.
        needed: &'static str,
    },
    /// A field of the request that cannot be decoded.
    #[error("{field} cannot be decoded")]
    Undecodable {
        /// The field of the request.
        field: &'static str,
        /// What the decoder says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No such container.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No such exec.
    #[error("container {:?} has no exec {:?}", .0.container, .0.exec)]
    NoProcess(ProcessId),
    /// The process has ended, which a signal cannot reach any more.
    #[error("{} has already finished", describe(.0))]
    Finished(ProcessId),
    /// The id is taken.
    #[error("{} already exists", describe(.0))]
    AlreadyExists(ProcessId),
    /// A config.json that is longer than any may be.
    #[error("config.json has {bytes} bytes, {max} are possible", max = cube_protocol::spec::BYTES_MAX)]
    SpecTooLong {
        /// Its length.
        bytes: u64,
    },
    /// A config.json that the guest cannot work with.
    #[error(
        "config.json has {bytes} bytes, for which the {available} bytes of memory that the guest has left are not enough: give the sandbox more memory"
    )]
    SpecNeedsMemory {
        /// Its length.
        bytes: u64,
        /// Memory that the guest has.
        available: u64,
    },
    /// A part of a config.json that does not follow what is here.
    #[error(
        "of the config.json of {container:?} {have} bytes are here, what follows {offset} was given or asked for"
    )]
    SpecPart {
        /// The container.
        container: String,
        /// Where the part begins, or should end.
        offset: u64,
        /// Bytes that are here.
        have: u64,
    },
    /// Not in this state.
    #[error("{} is {state}: {needed}", describe(.process))]
    State {
        /// The process.
        process: ProcessId,
        /// Its state.
        state: &'static str,
        /// What the call needs.
        needed: &'static str,
    },
    /// A start that was under way, and is no more.
    #[error("the start of {} was given up, {}", describe(.process), .why.reason())]
    GivenUp {
        /// The process.
        process: ProcessId,
        /// By whom.
        why: GivenUp,
    },
    /// The sandbox was prepared otherwise before.
    #[error(
        "the sandbox is prepared already, with other content: PrepareSandbox may only be repeated as it was"
    )]
    PreparedOtherwise,
    /// The guest is at rest.
    #[error("the sandbox is quiesced: {call} has to wait until it is thawed")]
    Quiesced {
        /// The call that would change its state.
        call: &'static str,
    },
    /// A timeline that begins in mid-run.
    #[error(
        "timeline {timeline:#018x} cannot begin: the sandbox is not quiesced, and on timeline {ours:#018x}"
    )]
    NotQuiesced {
        /// Of the guest.
        ours: u64,
        /// Of the request.
        timeline: u64,
    },
    /// The host means another run of this guest.
    #[error("the request is for timeline {theirs:#018x}, this guest is on {ours:#018x}")]
    Timeline {
        /// Of the guest.
        ours: u64,
        /// Of the request.
        theirs: u64,
    },
    /// A call that the agent does not have.
    #[error("{call} is not supported by the agent: {reason}")]
    Unimplemented {
        /// Its name.
        call: &'static str,
        /// Why, and what to do instead.
        reason: &'static str,
    },
    /// Something took too long.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was awaited.
        what: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// A system call of the agent failed.
    #[error("cannot {action}")]
    System {
        /// What was done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// From the protocol.
    #[error(transparent)]
    Version(#[from] Mismatch),
    /// From the environment of a Thaw.
    #[error("the environment cannot be delivered")]
    Environment(#[from] EnvironmentError),
    /// From the container.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// From its stdio.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// From its file systems.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// From the guest's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// On the way to rest or back.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// A defect: the code that served the call panicked.
    #[error("the call ended unexpectedly")]
    Panicked(#[from] tokio::task::JoinError),
}

fn describe(process: &ProcessId) -> String {
    match process.exec.as_str() {
        "" => format!("container {:?}", process.container),
        exec => format!("exec {exec:?} of container {:?}", process.container),
    }
}

impl Error {
    /// The status code, chosen so that containerd's `errdefs` make of it what they would of runc's.
    pub fn code(&self) -> Code {
        match self {
            Error::Id { .. }
            | Error::Invalid { .. }
            | Error::Type { .. }
            | Error::Undecodable { .. }
            | Error::Environment(_) => Code::INVALID_ARGUMENT,
            Error::NoContainer(_) | Error::NoProcess(_) | Error::Finished(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::State { .. }
            | Error::GivenUp { .. }
            | Error::PreparedOtherwise
            | Error::Quiesced { .. }
            | Error::NotQuiesced { .. }
            | Error::Timeline { .. }
            | Error::Version(_) => Code::FAILED_PRECONDITION,
            Error::SpecTooLong { .. } => Code::INVALID_ARGUMENT,
            Error::SpecNeedsMemory { .. } => Code::RESOURCE_EXHAUSTED,
            Error::SpecPart { .. } => Code::FAILED_PRECONDITION,
            Error::Unimplemented { .. } => Code::UNIMPLEMENTED,
            Error::Timeout { .. } => Code::DEADLINE_EXCEEDED,
            Error::System { source, .. } => io_code(source),
            Error::Container(error) => container_code(error),
            Error::Stdio(error) => stdio_code(error),
            Error::Storage(error) => storage_code(error),
            Error::Network(error) => network_code(error),
            Error::Quiesce(error) => quiesce_code(error),
            Error::Panicked(_) => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(get_status(error.code(), errors::chain(&error)))
    }
}

fn container_code(error: &ContainerError) -> Code {
    match error {
        // Not UNIMPLEMENTED: containerd takes that for a shim without the call and tries another
        // version of the API.
        ContainerError::Unsupported { .. } | ContainerError::Invalid { .. } | ContainerError::Json(_) => {
            Code::INVALID_ARGUMENT
        }
        ContainerError::Stage { action, source } if action.starts_with("exec ") => exec_code(source),
        ContainerError::Stage { source, .. } => io_code(source),
        ContainerError::Cgroup { source, .. } => match source.raw_os_error() {
            // No such file in the group: the controller is not enabled in this guest.
            Some(libc::ENOENT) => Code::FAILED_PRECONDITION,
            Some(libc::EINVAL | libc::ERANGE) => Code::INVALID_ARGUMENT,
            _ => io_code(source),
        },
        ContainerError::NotFrozen { .. } | ContainerError::SlowStart { .. } => Code::DEADLINE_EXCEEDED,
        ContainerError::State { .. } => Code::FAILED_PRECONDITION,
    }
}

/// execve(2) tells about the program that the user named.
fn exec_code(error: &io::Error) -> Code {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Code::NOT_FOUND,
        Some(libc::EACCES | libc::EPERM) => Code::PERMISSION_DENIED,
        Some(libc::ENOEXEC | libc::EISDIR | libc::E2BIG | libc::ELOOP | libc::ENAMETOOLONG) => {
            Code::INVALID_ARGUMENT
        }
        _ => io_code(error),
    }
}

fn stdio_code(error: &StdioError) -> Code {
    match error {
        StdioError::AlreadyExists(_) => Code::ALREADY_EXISTS,
        StdioError::NotFound(_) => Code::NOT_FOUND,
        StdioError::Exhausted(_) => Code::RESOURCE_EXHAUSTED,
        StdioError::NoTerminal(_) => Code::FAILED_PRECONDITION,
        StdioError::Io { source, .. } => io_code(source),
    }
}

fn storage_code(error: &StorageError) -> Code {
    match error {
        StorageError::NoMount | StorageError::Option { .. } | StorageError::Target { .. } => {
            Code::INVALID_ARGUMENT
        }
        StorageError::NoDevice { .. } => Code::NOT_FOUND,
        StorageError::Mount { source, .. } => match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENOTDIR) => Code::NOT_FOUND,
            Some(libc::EINVAL | libc::ENODEV | libc::ENOTBLK) => Code::INVALID_ARGUMENT,
            _ => io_code(source),
        },
        StorageError::Io { source, .. } => io_code(source),
    }
}

fn network_code(error: &NetworkError) -> Code {
    match error {
        NetworkError::Invalid { .. } => Code::INVALID_ARGUMENT,
        NetworkError::NoDevice { .. } => Code::NOT_FOUND,
        NetworkError::System { source, .. } => io_code(source),
    }
}

fn quiesce_code(error: &QuiesceError) -> Code {
    match error {
        QuiesceError::Busy { .. } | QuiesceError::SlowDisks { .. } => Code::DEADLINE_EXCEEDED,
        QuiesceError::Freezer(error) => container_code(error),
        QuiesceError::Disks(error) => storage_code(error),
        QuiesceError::Panicked(_) => Code::INTERNAL,
    }
}

fn io_code(error: &io::Error) -> Code {
    match error.raw_os_error() {
        Some(
            libc::ENOMEM
            | libc::EAGAIN
            | libc::ENOSPC
            | libc::EDQUOT
            | libc::EMFILE
            | libc::ENFILE
            | libc::EUSERS,
        ) => Code::RESOURCE_EXHAUSTED,
        Some(libc::EIO | libc::ENOTCONN | libc::ESTALE | libc::EBUSY) => Code::UNAVAILABLE,
        Some(libc::ETIMEDOUT) => Code::DEADLINE_EXCEEDED,
        _ => Code::INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: impl Into<Error>) -> (Code, String) {
        match ttrpc::Error::from(error.into()) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("not a status: {other:?}"),
        }
    }

    fn stage(action: &str, errno: i32) -> ContainerError {
        ContainerError::Stage { action: action.into(), source: io::Error::from_raw_os_error(errno) }
    }

    #[test]
    fn a_command_that_does_not_exist_is_not_found_and_named() {
        let expected = (Code::NOT_FOUND, "exec /bin/nosuch: no such file or directory".to_owned());
        assert_eq!(status(stage("exec /bin/nosuch", libc::ENOENT)), expected);
        assert_eq!(status(stage("exec /etc/passwd", libc::EACCES)).0, Code::PERMISSION_DENIED);
        assert_eq!(status(stage("exec /bin/text", libc::ENOEXEC)).0, Code::INVALID_ARGUMENT);
    }

    #[test]
    fn a_missing_file_is_not_found_only_where_the_user_named_it() {
        assert_eq!(status(stage("mount proc on /proc", libc::ENOENT)).0, Code::INTERNAL);
        assert_eq!(status(stage("clone", libc::EAGAIN)).0, Code::RESOURCE_EXHAUSTED);
    }

    #[test]
    fn what_the_spec_asks_and_we_cannot_do_never_looks_like_a_missing_call() {
        let error = ContainerError::Unsupported { field: "linux.intelRdt".into(), hint: None };
        assert_eq!(status(error), (Code::INVALID_ARGUMENT, "linux.intelRdt is not supported".into()));
    }

    #[test]
    fn states_and_ids_are_told_as_containerd_expects() {
        let id = |exec: &str| ProcessId { container: "c1".into(), exec: exec.into() };
        let finished = status(Error::Finished(id("e1")));
        assert_eq!(finished, (Code::NOT_FOUND, r#"exec "e1" of container "c1" has already finished"#.into()));
        let taken = status(Error::AlreadyExists(id("")));
        assert_eq!(taken, (Code::ALREADY_EXISTS, r#"container "c1" already exists"#.into()));
        let state =
            Error::State { process: id(""), state: "running", needed: "it must be stopped to be deleted" };
        let (code, text) = status(state);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert_eq!(text, r#"container "c1" is running: it must be stopped to be deleted"#);
        assert_eq!(status(StdioError::Exhausted(300)).0, Code::RESOURCE_EXHAUSTED);
        assert_eq!(status(StorageError::NoMount).0, Code::INVALID_ARGUMENT);
    }
}
