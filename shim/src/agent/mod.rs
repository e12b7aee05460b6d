//! The shim's side of the connections to the agent.

pub mod dial;

pub use dial::{Dial, DialError};
