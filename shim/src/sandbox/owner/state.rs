//! The states of a sandbox.

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SandboxState {
    /// No VM yet.
    Creating,
    /// The guest answers.
    Running,
    /// A job is bringing everything to rest.
    Pausing,
    /// The VM stands still.
    Paused,
    /// A job is writing memory to disk, and ends the VM.
    Suspending,
    /// The memory is on disk, and there is no VM.
    Suspended,
    /// A job is setting everything going again.
    Resuming,
    /// A job is putting the sandbox back to a snapshot, with another VM.
    RollingBack,
    /// A job is taking a snapshot.
    Snapshotting,
    /// The main container is being deleted, and everything with it.
    Stopping,
    /// The VM has ended, or could not be booted.
    Stopped,
}

impl SandboxState {
    /// For programs.
    pub(super) fn label(self) -> &'static str {
        match self {
            SandboxState::Creating => "creating",
            SandboxState::Running => "running",
            SandboxState::Pausing => "pausing",
            SandboxState::Paused => "paused",
            SandboxState::Suspending => "suspending",
            SandboxState::Suspended => "suspended",
            SandboxState::Resuming => "resuming",
            SandboxState::RollingBack => "rolling-back",
            SandboxState::Snapshotting => "snapshotting",
            SandboxState::Stopping => "stopping",
            SandboxState::Stopped => "stopped",
        }
    }

    /// For sentences.
    pub(super) fn name(self) -> &'static str {
        match self {
            SandboxState::Creating => "being created",
            SandboxState::Running => "running",
            SandboxState::Pausing => "being paused",
            SandboxState::Paused => "paused",
            SandboxState::Suspending => "being paused to disk",
            SandboxState::Suspended => "paused to disk",
            SandboxState::Resuming => "being resumed",
            SandboxState::RollingBack => "being rolled back",
            SandboxState::Snapshotting => "being snapshotted",
            SandboxState::Stopping => "being stopped",
            SandboxState::Stopped => "stopped",
        }
    }

    /// Whether nothing can be asked of the guest for a while.
    pub(super) fn is_pause(self) -> bool {
        match self {
            SandboxState::Pausing
            | SandboxState::Paused
            | SandboxState::Suspending
            | SandboxState::Suspended
            | SandboxState::Resuming
            | SandboxState::RollingBack
            | SandboxState::Snapshotting => true,
            SandboxState::Creating
            | SandboxState::Running
            | SandboxState::Stopping
            | SandboxState::Stopped => false,
        }
    }
}
