//! Vsock ports on which the agent listens, and the context ids that matter.

/// ttrpc: `containerd.task.v3.Task` and `cube.agent.v1.Guest`.
pub const CONTROL: u32 = 1024;

/// stdio and forwarded connections, in [`crate::frame`]s.
pub const STREAM: u32 = 1025;

/// `VMADDR_CID_HOST` of vsock(7): the only peer that the agent serves.
pub const HOST_CID: u32 = 2;
