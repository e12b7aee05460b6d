//! The shim's side of the connections to the agent.

pub mod client;
pub mod dial;

pub use client::{Agent, AgentError, Clients, GuestEvent, Link};
pub use dial::{Dial, DialError};
