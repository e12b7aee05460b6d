//! stdio of the processes in the guest: pipes, retention rings, and the server of the stream port.

use std::{os::fd::OwnedFd, sync::Arc};

use cube_protocol::guest::StreamInfo;
use tokio::io::{AsyncRead, AsyncWrite};

/// Names a process: its container, and its exec id or "" for the init process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the init process.
    pub exec: String,
}

/// What happens to a writer whose output nobody takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// It waits when ring and pipe are full.
    Block,
    /// It never waits; the oldest unacknowledged output is dropped and counted.
    DropOldest,
}

/// Which streams a process gets. The others are /dev/null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// A pseudo terminal: `stdin` and `stdout` are its two directions, `stderr` must be false.
    pub terminal: bool,
    /// Input from the host.
    pub stdin: bool,
    /// Output to the host.
    pub stdout: bool,
    /// Error output to the host.
    pub stderr: bool,
    /// For both output streams.
    pub policy: Policy,
}

/// The ends of the pipes that the child gets. Whoever holds this closes it right after the child
/// is spawned: an end that stays open in the agent would keep EOF from ever coming.
#[derive(Debug)]
pub enum ChildStdio {
    /// fds 0, 1 and 2 of the child; blocking.
    Pipes([OwnedFd; 3]),
    /// The init stage allocates the terminal in the container's devpts and sends the master.
    Terminal,
}

/// Bounds on memory; see docs/architecture.md.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes that all rings together may hold beyond their floors.
    pub ring_budget: usize,
    /// Processes with stdio at once.
    pub processes: usize,
}

/// Why a process cannot have the stdio it asked for.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The id is in use.
    #[error("process {0:?} has stdio already")]
    AlreadyExists(ProcessId),
    /// There is no such process.
    #[error("process {0:?} has no stdio")]
    NotFound(ProcessId),
    /// [`Limits::processes`] is reached.
    #[error("{0} processes have stdio already, which is the limit: delete one first")]
    Exhausted(usize),
    /// Resize of a process without a terminal.
    #[error("process {0:?} has no terminal")]
    NoTerminal(ProcessId),
    /// A system call failed.
    #[error("{action}")]
    Io {
        /// What was done.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// All streams of the guest. One per agent; needs a tokio runtime.
#[derive(Debug)]
pub struct Hub {}

impl Hub {
    /// A hub without processes on `timeline`.
    pub fn new(_limits: Limits, _timeline: u64) -> Arc<Hub> {
        todo!()
    }

    /// Makes the streams of a process that is about to be spawned. Undo with [`Hub::close`].
    pub fn open(self: &Arc<Self>, _process: &ProcessId, _request: Request) -> Result<ChildStdio, StdioError> {
        todo!()
    }

    /// Hands over the master of the terminal that [`ChildStdio::Terminal`] promised.
    pub fn attach_terminal(
        self: &Arc<Self>,
        _process: &ProcessId,
        _master: OwnedFd,
    ) -> Result<(), StdioError> {
        todo!()
    }

    /// Sets the window size in characters.
    pub fn resize(&self, _process: &ProcessId, _width: u16, _height: u16) -> Result<(), StdioError> {
        todo!()
    }

    /// The process has exited. Streams that another process still holds end after 2 s, TRUNCATED.
    pub fn exited(self: &Arc<Self>, _process: &ProcessId) {
        todo!()
    }

    /// Forgets a process and drops what the host has not taken: Delete, or a spawn that failed.
    pub fn close(&self, _process: &ProcessId) {
        todo!()
    }

    /// Serves one connection of the stream port until it ends. The caller has checked the peer.
    pub async fn serve<S>(self: Arc<Self>, _connection: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        todo!()
    }

    /// Every stream, for `Guest.Info`.
    pub fn streams(&self) -> Vec<StreamInfo> {
        todo!()
    }

    /// Bytes that the rings hold, and connections refused for malformed frames.
    pub fn totals(&self) -> Totals {
        todo!()
    }
}

/// Figures over all streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Bytes allocated by rings.
    pub ring_bytes: usize,
    /// Connections closed because of a malformed frame, or silent for 10 s.
    pub refused_connections: u64,
}
