//! Where the streams of a guest at rest are, as it tells.

use std::collections::{HashMap, hash_map::Entry};

use cube_protocol::{
    guest::{QuiesceResponse, StreamInfo},
    stream::Stream,
};
use tracing::warn;

use crate::{agent::STREAMS_MAX, stdio::Begin};

/// The streams of a guest, each once, by container and exec.
#[derive(Debug, Default)]
pub(super) struct Positions {
    processes: HashMap<(String, String), Begin>,
    /// With a connection each on the host.
    outputs: Vec<Output>,
}

/// An output stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Output {
    /// In the guest.
    pub(super) container: String,
    pub(super) exec: String,
    pub(super) stream: Stream,
}

impl Positions {
    /// Those that are in `rest`: no more than an honest guest can have, for each costs the host a connection.
    pub(super) fn of(rest: &QuiesceResponse) -> Positions {
        if rest.streams.len() > STREAMS_MAX {
            let (told, kept) = (rest.streams.len(), STREAMS_MAX);
            warn!(told, kept, "the guest tells of more streams than it can have");
        }
        let mut positions = Positions::default();
        let mut known = HashMap::new();
        for info in rest.streams.iter().take(STREAMS_MAX) {
            let key = (info.container_id.clone(), info.exec_id.clone());
            let begin = positions.processes.entry(key.clone()).or_default();
            begin.attempt = begin.attempt.max(info.attempt);
            match info.stream.as_str() {
                "stdin" => begin.stdin = info.acked_offset,
                "stderr" => begin.stderr = info.acked_offset,
                _ => begin.stdout = info.acked_offset,
            }
            let Some(stream) = output(info) else { continue };
            if let Entry::Vacant(new) = known.entry((key, stream as i32)) {
                new.insert(());
                let (container, exec) = (info.container_id.clone(), info.exec_id.clone());
                positions.outputs.push(Output { container, exec, stream });
            }
        }
        positions
    }

    /// Where the streams of a process begin; at 0 if there are none.
    pub(super) fn begin(&self, container: &str, exec: &str) -> Begin {
        self.processes.get(&(container.to_owned(), exec.to_owned())).copied().unwrap_or_default()
    }

    pub(super) fn outputs(&self) -> &[Output] {
        &self.outputs
    }
}

fn output(stream: &StreamInfo) -> Option<Stream> {
    match stream.stream.as_str() {
        "stdout" => Some(Stream::STDOUT),
        "stderr" => Some(Stream::STDERR),
        "terminal" => Some(Stream::TERMINAL),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(exec: &str, stream: &str, acked_offset: u64) -> StreamInfo {
        let (container_id, exec_id, stream) = ("c".into(), exec.into(), stream.into());
        StreamInfo {
            container_id,
            exec_id,
            stream,
            acked_offset,
            attempt: acked_offset,
            ..Default::default()
        }
    }

    fn positions(streams: Vec<StreamInfo>) -> Positions {
        Positions::of(&QuiesceResponse { streams, ..Default::default() })
    }

    #[test]
    fn each_process_begins_where_its_streams_are() {
        let streams = vec![
            info("", "stdin", 1),
            info("", "stdout", 2),
            info("", "stderr", 3),
            info("sh", "terminal", 7),
            info("sh", "what", 9),
        ];
        let positions = positions(streams);
        assert_eq!(positions.begin("c", ""), Begin { stdin: 1, stdout: 2, stderr: 3, attempt: 3 });
        assert_eq!(positions.begin("c", "none"), Begin::default());
        let outputs: Vec<_> = positions.outputs().iter().map(|o| (o.exec.as_str(), o.stream)).collect();
        assert_eq!(outputs, [("", Stream::STDOUT), ("", Stream::STDERR), ("sh", Stream::TERMINAL)]);
    }

    #[test]
    fn a_guest_does_not_decide_how_many_streams_are_opened() {
        let begun = std::time::Instant::now();
        let distinct = positions((0..200_000).map(|n| info(&n.to_string(), "stdout", n)).collect());
        assert_eq!(distinct.outputs().len(), STREAMS_MAX);
        let again = positions((0..200_000).map(|_| info("e", "stdout", 1)).collect());
        assert_eq!(again.outputs().len(), 1, "each once");
        // One look at all for each would be some ten billion comparisons.
        assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
    }
}
