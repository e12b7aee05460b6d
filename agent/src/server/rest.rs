//! `Guest.Quiesce` and `Guest.Thaw`: checks, and what a Thaw renews before anything runs again.

use std::{path::Path, time::Duration};

use cube_protocol::{
    environment,
    guest::{QuiesceRequest, QuiesceResponse, ThawRequest, ThawResponse},
};

use super::{error::Error, guest::Parts};
use crate::guest::{
    clock, entropy, identity, network, paths,
    quiesce::{Kernel, Thawed},
};

/// Longest time that a Quiesce may be given, in milliseconds.
const QUIESCE_MAX: u32 = 60_000;

/// Brings the guest to rest. Must not be cancelled.
pub(super) async fn quiesce(parts: &Parts, request: &QuiesceRequest) -> Result<QuiesceResponse, Error> {
    if !(1..=QUIESCE_MAX).contains(&request.timeout_ms) {
        let value = request.timeout_ms.to_string();
        return Err(Error::Invalid { field: "timeout_ms", value, reason: "1 to 60000 are possible" });
    }
    let limit = Duration::from_millis(request.timeout_ms.into());
    // A start that takes its time has half of it.
    parts.tasks.hurry(limit / 2, parts.quiescence.quiesce(request.sync, limit)).await?;
    tracing::info!(sync = request.sync, "the sandbox is quiesced");
    Ok(QuiesceResponse {
        streams: parts.hub.streams(),
        last_event: parts.events.last(),
        timeline: parts.hub.timeline(),
        ..Default::default()
    })
}

/// Sets the guest going again. Must not be cancelled.
pub(super) async fn thaw(parts: &Parts, request: ThawRequest) -> Result<ThawResponse, Error> {
    check(&request, parts.hub.timeline())?;
    let timeline = request.timeline;
    match parts.quiescence.thaw(renew(parts, request)).await? {
        Thawed::Now => tracing::info!(timeline = parts.hub.timeline(), "the sandbox is thawed"),
        Thawed::Before => match parts.hub.timeline() {
            ours if timeline != 0 && timeline != ours => return Err(Error::NotQuiesced { ours, timeline }),
            _ => {}
        },
    }
    Ok(ThawResponse { timeline: parts.hub.timeline(), ..Default::default() })
}

/// What can be known to fail before anything is touched.
fn check(request: &ThawRequest, timeline: u64) -> Result<(), Error> {
    let entropy = request.entropy.len();
    let new_timeline = request.timeline != 0 && request.timeline != timeline;
    let reason = match entropy {
        0 if new_timeline => Some("a new timeline needs random bytes of its own"),
        0 | entropy::LEAST..=entropy::MOST => None,
        _ => Some("none, or 32 to 512 random bytes are needed"),
    };
    if let Some(reason) = reason {
        return Err(Error::Invalid { field: "entropy", value: format!("{entropy} bytes"), reason });
    }
    Ok(environment::check(&request.environment)?)
}

/// Gives the guest its present and its identity, while nothing runs that could see the change.
async fn renew(parts: &Parts, request: ThawRequest) -> Result<(), Error> {
    if parts.quiescence.kernel() == Kernel::Own {
        renew_kernel(&request)?;
    }
    if !request.hostname.is_empty() {
        rename(parts, &request.hostname).await?;
    }
    let (servers, searches, options) = (&request.dns_servers, &request.dns_searches, &request.dns_options);
    identity::write_resolv_conf(Path::new(paths::RESOLV_CONF), servers, searches, options)
        .map_err(|source| Error::System { action: "write resolv.conf", source })?;
    network::reconfigure(&request.interfaces, &request.routes)?;
    if !request.environment.is_empty() {
        parts.tasks.set_environment(request.environment);
    }
    if request.timeline != 0 {
        parts.hub.begin_timeline(request.timeline);
    }
    Ok(())
}

fn renew_kernel(request: &ThawRequest) -> Result<(), Error> {
    if request.realtime_ns != 0 {
        clock::set(Duration::from_nanos(request.realtime_ns))
            .map_err(|source| Error::System { action: "set the clock", source })?;
    }
    if !request.entropy.is_empty() {
        entropy::add(&request.entropy)
            .map_err(|source| Error::System { action: "reseed the random generator", source })?;
    }
    Ok(())
}

/// The containers first: a repetition finds by the guest's own name which of them are left.
async fn rename(parts: &Parts, new: &str) -> Result<(), Error> {
    let failed = |source| Error::System { action: "set the host name", source };
    let old = identity::hostname().map_err(failed)?;
    parts.tasks.replace_hostname(&old, new).await?;
    identity::set_hostname(new).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(request: ThawRequest) -> String {
        crate::errors::chain(&check(&request, 7).unwrap_err())
    }

    #[test]
    fn a_new_timeline_needs_entropy_and_a_mere_resume_does_not() {
        let thaw = |timeline, entropy: usize| ThawRequest {
            timeline,
            entropy: vec![1; entropy],
            ..Default::default()
        };
        for (timeline, entropy) in [(0, 0), (7, 0), (0, 32), (8, 32), (8, 512)] {
            check(&thaw(timeline, entropy), 7).unwrap();
        }
        assert!(reason(thaw(8, 0)).contains("a new timeline"));
        for entropy in [1, 31, 513] {
            assert!(reason(thaw(8, entropy)).contains(&format!("{entropy} bytes")));
        }
    }

    #[test]
    fn what_is_wrong_with_the_environment_is_told_without_its_content() {
        let environment = vec!["A=b".to_owned(), "hunter2".to_owned()];
        let text = reason(ThawRequest { environment, ..Default::default() });
        assert!(text.contains("index 1") && !text.contains("hunter2"), "{text}");
    }
}
