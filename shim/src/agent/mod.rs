//! The shim's side of the connections to the agent.

mod bounded;
mod client;
mod connect;
pub mod dial;
mod error;
mod link;
mod pace;

pub use client::{Agent, LinkStatus};
pub use connect::Clients;
pub use dial::{Dial, DialError};
pub use error::AgentError;
pub use link::{GuestEvent, Link};

/// Longest text of the guest's that is kept, in characters.
const TEXT_MAX: usize = 1000;

/// What the guest says, fit for a log and a terminal: not at any length, and without control characters.
pub fn printable(text: &str) -> String {
    let shortened: String = text.chars().take(TEXT_MAX).collect();
    crate::text::printable(&shortened).into_owned()
}
