//! The guest's own figures, which it may supply or not, and may make up.

use std::{collections::HashMap, time::Duration};

use cube_protocol::guest::{InfoRequest, InfoResponse};

use super::sandbox as api;
use crate::{
    agent::{Agent, STREAMS_MAX, printable},
    errors::chain,
};

/// How long the guest has. A guest that runs answers in milliseconds.
const LIMIT: Duration = Duration::from_secs(1);

/// What the guest says.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) guest: api::Guest,
    /// Bytes that one side has and the other has not acknowledged, by container, exec and stream.
    lags: HashMap<(String, String, String), u64>,
}

impl Figures {
    /// The lag of a stream by its name here, where the output of a terminal is called "stdout".
    pub(super) fn lag(&self, container: &str, exec: &str, stream: &str, terminal: bool) -> Option<u64> {
        let stream = if terminal && stream == "stdout" { "terminal" } else { stream };
        self.lags.get(&(container.into(), exec.into(), stream.into())).copied()
    }
}

/// Asks the guest, or tells why it cannot be asked or does not answer.
pub(super) async fn ask(agent: Option<&Agent>) -> Result<Figures, String> {
    let Some(agent) = agent else { return Err("there is no guest".into()) };
    let request = InfoRequest::new();
    let answer = agent
        .call("Info", LIMIT, request, |c, ctx, request| async move { c.guest.info(ctx, &request).await })
        .await;
    // The text of a refusal is the guest's.
    answer.map(figures).map_err(|e| printable(&chain(&e)))
}

fn figures(info: InfoResponse) -> Figures {
    let guest = api::Guest {
        memory_total_bytes: info.memory_total_bytes,
        memory_available_bytes: info.memory_available_bytes,
        agent_rss_bytes: info.agent_rss_bytes,
        ring_budget_bytes: info.ring_budget_bytes,
        ring_used_bytes: info.ring_used_bytes,
        containers: info.containers,
        processes: info.processes,
        refused_connections: info.refused_connections,
        ..Default::default()
    };
    let streams = info.streams.into_iter().take(STREAMS_MAX);
    let lags = streams
        .map(|stream| {
            let lag = stream.end_offset.saturating_sub(stream.acked_offset);
            ((stream.container_id, stream.exec_id, stream.stream), lag)
        })
        .collect();
    Figures { guest, lags }
}

#[cfg(test)]
mod tests {
    use cube_protocol::guest::StreamInfo;

    use super::*;

    fn stream(exec: &str, name: &str, end_offset: u64, acked_offset: u64) -> StreamInfo {
        let (exec_id, stream) = (exec.into(), name.into());
        StreamInfo {
            container_id: "c".into(),
            exec_id,
            stream,
            end_offset,
            acked_offset,
            ..Default::default()
        }
    }

    #[test]
    fn a_lag_is_what_the_other_side_has_not_acknowledged_and_never_less_than_nothing() {
        let streams = vec![
            stream("", "stdout", 10, 4),
            stream("", "stderr", 4, 10),
            stream("sh", "terminal", u64::MAX, 0),
        ];
        let figures = figures(InfoResponse { streams, ..Default::default() });
        assert_eq!(figures.lag("c", "", "stdout", false), Some(6));
        assert_eq!(figures.lag("c", "", "stderr", false), Some(0));
        assert_eq!(figures.lag("c", "sh", "stdout", true), Some(u64::MAX));
        assert_eq!(figures.lag("c", "", "stdin", false), None);
    }

    #[test]
    fn streams_without_end_are_not_kept() {
        let streams = (0..100_000).map(|n| stream(&n.to_string(), "stdout", 1, 0)).collect();
        assert_eq!(figures(InfoResponse { streams, ..Default::default() }).lags.len(), STREAMS_MAX);
    }

    #[tokio::test]
    async fn without_a_guest_there_is_a_reason() {
        assert_eq!(ask(None).await.unwrap_err(), "there is no guest");
    }
}
