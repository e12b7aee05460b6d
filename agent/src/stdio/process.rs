//! The streams of one process, by name.

use std::{os::fd::OwnedFd, sync::Arc};

use cube_protocol::{guest::StreamInfo, stream};
use tokio::io::unix::AsyncFd;

use super::{ProcessId, input::Input, output::Output};

/// The streams of one process.
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) stdin: Option<Arc<Input>>,
    /// The output of a terminal, too.
    pub(super) stdout: Option<Arc<Output>>,
    pub(super) stderr: Option<Arc<Output>>,
    pub(super) terminal: Option<Terminal>,
}

/// A terminal, before and after its master has come from the container's devpts.
#[derive(Debug)]
pub(super) enum Terminal {
    /// With the window size, width and height, that it is to have.
    Promised {
        window: Option<(u16, u16)>,
    },
    Attached(Arc<AsyncFd<OwnedFd>>),
}

/// What a connection may open.
#[derive(Debug)]
pub(super) enum Endpoint {
    Input(Arc<Input>),
    Output(Arc<Output>),
}

impl Endpoint {
    pub(super) fn epoch(&self) -> u64 {
        match self {
            Endpoint::Input(input) => input.epoch(),
            Endpoint::Output(output) => output.epoch(),
        }
    }
}

impl Process {
    pub(super) fn outputs(&self) -> impl Iterator<Item = &Arc<Output>> {
        self.stdout.iter().chain(&self.stderr)
    }

    pub(super) fn infos(&self, process: &ProcessId) -> Vec<StreamInfo> {
        let info = |stream: &str| StreamInfo {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            stream: stream.into(),
            ..Default::default()
        };
        let stdin = self.stdin.iter().map(|stdin| {
            let figures = stdin.figures();
            StreamInfo {
                end_offset: figures.received,
                acked_offset: figures.consumed,
                connections: figures.connections,
                epoch: stdin.epoch(),
                attempt: figures.attempt,
                ..info("stdin")
            }
        });
        let stdout_name = if self.terminal.is_some() { "terminal" } else { "stdout" };
        let stdout = self.stdout.iter().map(|output| (stdout_name, output));
        let stderr = self.stderr.iter().map(|output| ("stderr", output));
        let outputs = stdout.chain(stderr).map(|(name, output)| {
            let figures = output.figures();
            StreamInfo {
                end_offset: figures.end,
                acked_offset: figures.acked,
                lost_bytes: figures.lost,
                connections: figures.connections,
                epoch: output.epoch(),
                attempt: figures.attempt,
                ..info(name)
            }
        });
        stdin.chain(outputs).collect()
    }

    /// The stream that the host calls `wanted`.
    pub(super) fn endpoint(&self, wanted: stream::Stream) -> Option<Endpoint> {
        let output = match (wanted, &self.terminal) {
            (stream::Stream::STDIN, _) => return self.stdin.clone().map(Endpoint::Input),
            (stream::Stream::STDOUT, None) | (stream::Stream::TERMINAL, Some(_)) => &self.stdout,
            (stream::Stream::STDERR, None) => &self.stderr,
            _ => return None,
        };
        output.clone().map(Endpoint::Output)
    }
}
