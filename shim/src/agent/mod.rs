//! The shim's side of the connections to the agent.

mod bounded;
pub mod client;
pub mod dial;
mod pace;

pub use client::{Agent, AgentError, GuestEvent, Link};
pub use dial::{Dial, DialError};
