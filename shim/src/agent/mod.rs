//! The shim's side of the connections to the agent.

mod bounded;
pub mod client;
pub mod dial;
mod error;
mod pace;

pub use client::{Agent, Clients, GuestEvent, Link, LinkStatus};
pub use dial::{Dial, DialError};
pub use error::AgentError;

/// Longest text of the guest's that is kept, in characters.
const TEXT_MAX: usize = 1000;

/// What the guest says, fit for a log and a terminal: not at any length, and without control characters.
pub fn printable(text: &str) -> String {
    let mut printable = String::new();
    for c in text.chars().take(TEXT_MAX) {
        match c.is_control() {
            true => printable.extend(c.escape_default()),
            false => printable.push(c),
        }
    }
    printable
}
