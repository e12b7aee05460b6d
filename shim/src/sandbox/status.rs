//! A sandbox at one moment, as `cubecli cubebox status` shows it.

use std::time::Duration;

use cube_protocol::{guest::HelloResponse, version::Version};
use tokio::time::Instant;

use super::{process::Exit, ready::Readiness};
use crate::{
    agent::{Agent, LinkStatus, printable},
    cgroup::Limited,
    events::PublisherStatus,
    stdio::StreamStatus,
};

/// What the shim knows without asking anybody.
#[derive(Debug)]
pub struct SandboxStatus {
    /// containerd namespace.
    pub namespace: String,
    /// Id of the pod, or of the only container.
    pub id: String,
    /// "creating", "running", "pausing", "paused", "suspending", "suspended", "resuming",
    /// "rolling-back", "snapshotting", "stopping" or "stopped".
    pub state: &'static str,
    /// When the shim began, nanoseconds since 1970.
    pub created_ns: u64,
    /// `None` before the VM runs; stays when it has ended.
    pub vm: Option<VmStatus>,
    /// To ask the guest for more; `None` if it cannot be asked.
    pub agent: Option<Agent>,
    /// Events for containerd.
    pub events: PublisherStatus,
    /// By container and exec, the init process of each container first.
    pub processes: Vec<ProcessStatus>,
    /// Stream connections closed because the guest broke the protocol.
    pub refused: u64,
}

/// A VM that was booted, and the agent in it.
#[derive(Debug, Clone)]
pub struct VmStatus {
    /// The backend's name in the configuration.
    pub backend: String,
    /// Why this one.
    pub reason: String,
    /// Of the VMM, on the host.
    pub pid: u32,
    /// The timeline that the guest is on.
    pub timeline: u64,
    /// As it says; printable.
    pub agent_version: String,
    /// Of the protocol, as it speaks it.
    pub agent_protocol: Version,
    /// As it says; printable.
    pub kernel_release: String,
    /// What its processes on the host may take; `None` if there is no VM to be limited.
    pub limited: Option<Limited>,
    /// The control connection; when the VM has ended, as it was then.
    pub link: LinkStatus,
    /// When the guest was ready.
    since: Instant,
    /// How long it ran, if it has ended.
    ran: Option<Duration>,
}

impl VmStatus {
    /// A VM whose guest has just said `hello`.
    pub(super) fn new(
        backend: String,
        reason: String,
        pid: u32,
        hello: &HelloResponse,
        limited: Option<Limited>,
    ) -> VmStatus {
        VmStatus {
            backend,
            reason,
            pid,
            limited,
            timeline: hello.timeline,
            agent_version: printable(&hello.agent_version),
            agent_protocol: hello.protocol.get_or_default().into(),
            kernel_release: printable(&hello.kernel_release),
            link: LinkStatus::default(),
            since: Instant::now(),
            ran: None,
        }
    }

    /// It has ended.
    pub(super) fn end(&mut self, link: LinkStatus) {
        self.ran.get_or_insert_with(|| self.since.elapsed());
        self.link = LinkStatus { connected: false, ..link };
    }

    /// How long it has been running, or was.
    pub fn uptime(&self) -> Duration {
        self.ran.unwrap_or_else(|| self.since.elapsed())
    }
}

/// A process at one moment.
#[derive(Debug, Clone)]
pub struct ProcessStatus {
    /// Its container.
    pub container: String,
    /// Empty for the init process.
    pub exec: String,
    /// "creating", "created", "starting", "running", "stopped" or "deleting"; "paused" with its container, but
    /// not with the whole sandbox.
    pub state: &'static str,
    /// Pid in the guest; 0 if it is not known.
    pub guest_pid: u32,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// None while it is being created or deleted.
    pub streams: Vec<StreamStatus>,
    /// Of an init process whose container has a ready probe.
    pub ready: Option<ReadyStatus>,
}

/// A ready probe at one moment.
#[derive(Debug, Clone)]
pub struct ReadyStatus {
    /// What is tried, printable.
    pub probe: String,
    /// What has come of it.
    pub state: Readiness,
}
