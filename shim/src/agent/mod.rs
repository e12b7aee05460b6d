//! The shim's side of the connections to the agent.

pub mod client;
pub mod dial;

pub use client::{Agent, AgentError, Clients, GuestEvent, Link, LinkStatus};
pub use dial::{Dial, DialError};

/// Longest text of the guest's that is kept, in characters.
const TEXT_MAX: usize = 200;

/// What the guest says, fit for a log and a terminal: not at any length, and without control characters.
pub fn printable(text: &str) -> String {
    text.chars().take(TEXT_MAX).flat_map(char::escape_debug).collect()
}
