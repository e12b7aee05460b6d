//! Whether a container is ready, and the job that asks the guest until it is.

use std::time::Duration;

use cube_protocol::guest::{ProbeRequest, probe_response::Outcome};
use futures::FutureExt;
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::sleep,
};
use ttrpc::Code;

use super::{Message, ProcessId, Request, job::Guest};
use crate::{
    agent::{AgentError, printable},
    annotations::Probe,
    errors::chain,
    state::now_ns,
};

/// Time for one attempt, and how much longer the guest's answer may take.
const ATTEMPT: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(2));

/// First and longest time between two attempts. It doubles: what starts quickly is found quickly, what
/// does not is not kept from it.
const PERIOD: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// How far a container has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Why it is not ready, as far as that is known; printable.
    Waiting(String),
    /// Since this time, nanoseconds since 1970. It stays so: a probe that has once succeeded is done.
    Since(u64),
}

/// What is known of a container's readiness.
#[derive(Debug)]
pub(super) struct Ready {
    /// `None`: it is ready when it runs.
    pub(super) probe: Option<Probe>,
    pub(super) state: Readiness,
    job: Option<AbortHandle>,
}

impl Ready {
    /// Of a container that does not run yet.
    pub(super) fn new(probe: Option<Probe>) -> Ready {
        Ready { probe, state: Readiness::Waiting("it has not been started".into()), job: None }
    }

    /// The container runs in `guest` now, for the first time or again: it is ready, or [`watch`] begins.
    pub(super) fn begin(&mut self, guest: Guest, container: String, owner: mpsc::Sender<Message>) {
        if let Some(job) = self.job.take() {
            job.abort();
        }
        self.state = match self.probe.clone() {
            None => Readiness::Since(now_ns()),
            Some(probe) => {
                self.job = Some(tokio::spawn(watch(guest, container, probe, owner)).abort_handle());
                Readiness::Waiting("it has not been probed yet".into())
            }
        };
    }
}

/// Whether a whole sandbox is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxReadiness {
    /// Every container is.
    Ready,
    /// What it waits for, printable.
    Waiting(String),
}

/// Tries until the container is ready or has ended, and tells `owner` what has come of it whenever that
/// changes. Pauses and lost connections are waited out.
async fn watch(guest: Guest, container: String, probe: Probe, owner: mpsc::Sender<Message>) {
    tokio::select! {
        () = ended(&owner, &container) => {}
        () = probe_until_ready(&guest, &container, &probe, &owner) => {}
    }
}

async fn ended(owner: &mpsc::Sender<Message>, container: &str) {
    let (reply, exit) = oneshot::channel();
    let init = ProcessId { container: container.into(), exec: String::new() };
    // If one of the two fails, the owner is gone, or has forgotten the container.
    if owner.send(Message::Request(Request::Wait(init, reply))).await.is_ok() {
        let _ = exit.await;
    }
}

async fn probe_until_ready(guest: &Guest, container: &str, probe: &Probe, owner: &mpsc::Sender<Message>) {
    let (mut period, mut last) = (PERIOD.0, None);
    loop {
        guest.agent.following().await;
        let news = attempt(guest, container, probe).await.filter(|found| last.as_ref() != Some(found));
        if let Some(found) = news {
            let over = found.is_ok();
            last = Some(found.clone());
            if owner.send(Message::Probed(container.into(), found)).await.is_err() || over {
                return;
            }
        }
        sleep(period).await;
        period = (period * 2).min(PERIOD.1);
    }
}

/// Tries once. `None` if that tells nothing about the container.
async fn attempt(guest: &Guest, container: &str, probe: &Probe) -> Option<Result<(), String>> {
    let (limit, margin) = ATTEMPT;
    let request = ProbeRequest {
        container_id: guest.inside(container.into()),
        timeout_ms: limit.as_millis() as u32,
        attempt: Some(probe.attempt()),
        ..Default::default()
    };
    let answer = guest.agent.call("Probe", limit + margin, request, |c, ctx, call| async move {
        c.guest.probe(ctx, &call).await
    });
    match answer.await {
        Ok(answer) => match answer.outcome {
            Some(Outcome::Ready(_)) => Some(Ok(())),
            Some(Outcome::NotReady(not)) => Some(Err(printable(&not.reason))),
            _ => Some(Err("the guest answers what this version does not know".into())),
        },
        // The guest is at rest, or the container has just ended: both are the owner's to tell.
        Err(AgentError::Refused { status, .. }) if status.code() == Code::FAILED_PRECONDITION => None,
        Err(AgentError::Transport { .. }) => None,
        // Unless it was paused while it was being asked.
        Err(e) => guest.agent.following().now_or_never().map(|()| Err(printable(&chain(&e)))),
    }
}
