//! stdio of one process: from the agent's streams to the log, FIFOs, files and log programs, and
//! from the stdin FIFO to the agent.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::agent::Dial;

/// What to do with the stdio of one process, as containerd's Create or Exec asks.
#[derive(Debug, Clone)]
pub struct StdioConfig {
    /// containerd namespace; given to log programs.
    pub namespace: String,
    /// Container whose process it is.
    pub container_id: String,
    /// Empty for the init process.
    pub exec_id: String,
    /// One stream for both directions of output, and no stderr.
    pub terminal: bool,
    /// Path of the FIFO, or empty.
    pub stdin: String,
    /// Path of a FIFO, a `fifo://`, `file://` or `binary://` URI, or empty.
    pub stdout: String,
    /// As `stdout`; empty if `terminal`.
    pub stderr: String,
    /// Log directory of the container, to be created; `None` for execs, terminals and containers
    /// with log forwarding off.
    pub log: Option<LogConfig>,
}

/// Where and how the log of an init process is kept.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// `<log dir>/<namespace>/<container id>`, or the bundle.
    pub dir: PathBuf,
    /// Size in bytes at which a segment is closed.
    pub segment_bytes: u64,
    /// Segments kept, the one being written included.
    pub segments: u32,
}

/// Which streams the process needs; the others are /dev/null in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Whether the agent must make a stdin stream.
    pub stdin: bool,
    /// Whether the agent must make a stdout (or terminal) stream.
    pub stdout: bool,
    /// Whether the agent must make a stderr stream.
    pub stderr: bool,
}

/// How much [`ProcessIo::finish`] could deliver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FinishReport {
    /// Whether every stream reached its EOF and its sinks took everything.
    pub complete: bool,
    /// Bytes known to exist that were discarded because a sink took them too slowly.
    pub discarded_bytes: u64,
}

/// Why the stdio of a process could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A stdio URI of an unknown or refused kind.
    #[error("{name} is {uri:?}: {reason}")]
    Uri {
        /// "stdin", "stdout" or "stderr".
        name: &'static str,
        /// As containerd gave it.
        uri: String,
        /// What is wrong, and what is accepted.
        reason: &'static str,
    },
    /// A file, FIFO or program failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot open" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The stdio of one process. Dropping it aborts its tasks and closes its sinks.
#[derive(Debug)]
pub struct ProcessIo {}

impl ProcessIo {
    /// Validates the URIs, opens what must exist before the process starts (log files with mode
    /// 0600, FIFOs, log programs), and keeps the far ends of the FIFOs. Nothing goes to the guest.
    pub async fn prepare(_config: StdioConfig) -> Result<ProcessIo, StdioError> {
        todo!()
    }

    /// Which streams to ask the agent for.
    pub fn wanted(&self) -> Wanted {
        todo!()
    }

    /// Begins to relay, once the agent has made the streams (after its Create or Exec).
    pub fn start(&mut self, _dial: Arc<dyn Dial>, _timeline: u64) {
        todo!()
    }

    /// containerd's CloseIO: EOF goes to the process once the FIFO is drained. Idempotent; nothing
    /// happens on a terminal.
    pub fn close_stdin(&self) {
        todo!()
    }

    /// The process has exited: from now on its sinks have 2 s of no progress before FIFOs are closed.
    pub fn process_exited(&self) {
        todo!()
    }

    /// Delivers what is left for at most `limit`, then closes everything. Called by Delete.
    pub async fn finish(self, _limit: Duration) -> FinishReport {
        todo!()
    }
}
