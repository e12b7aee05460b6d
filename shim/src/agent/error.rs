//! Why calls to the agent fail.

use std::time::Duration;

use cube_protocol::version;

use super::{DialError, printable};

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent could not be reached in time.
    #[error("the agent did not answer within {limit:?}; the last attempt failed")]
    Unreachable {
        /// How long was tried.
        limit: Duration,
        /// Why the last attempt failed, if any ended by itself.
        source: Option<Box<AgentError>>,
    },
    /// A connection could not be opened.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The agent refused a call; its code is passed on.
    #[error("{call} in the guest: {}", status.message())]
    Refused {
        /// Name of the method.
        call: &'static str,
        /// What the agent answered.
        status: ttrpc::Status,
        /// Whether an earlier request of the same call was lost with its connection: the refusal may
        /// be for what that one did.
        repeated: bool,
    },
    /// The guest did not answer a call in time.
    #[error("the guest did not answer {call} within {limit:?}")]
    Deadline {
        /// Name of the method.
        call: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// A request that no connection would carry.
    #[error("the request of {call} has {size} bytes, a message to the guest can have {limit}")]
    Large {
        /// Name of the method.
        call: &'static str,
        /// Its length.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// The connection ended during a call, whose effect is unknown.
    #[error("the connection to the guest was lost during {call}")]
    Transport {
        /// Name of the method.
        call: &'static str,
        /// Why.
        source: ttrpc::Error,
    },
    /// The agent speaks a protocol that we do not.
    #[error(transparent)]
    Version(#[from] version::Mismatch),
    /// Another guest is behind the same address.
    #[error("the guest has restarted: its boot id is {found:016x}, it was {expected:016x}")]
    OtherGuest {
        /// From the first Hello.
        expected: u64,
        /// From this Hello.
        found: u64,
    },
}

impl AgentError {
    /// Whether the agent refused with `code` what it may have done for an earlier request of the same
    /// call, whose answer was lost.
    pub fn may_be_done(&self, code: ttrpc::Code) -> bool {
        matches!(self, AgentError::Refused { status, repeated: true, .. } if status.code() == code)
    }

    /// The agent's text goes to logs and terminals: not at any length, and not with control characters.
    pub(super) fn refused(call: &'static str, mut status: ttrpc::Status) -> AgentError {
        status.set_message(printable(status.message()));
        // Nobody decodes them, and they may be anything.
        status.details.clear();
        AgentError::Refused { call, status, repeated: false }
    }

    /// Whether the agent says that there is no such process.
    pub fn is_not_found(&self) -> bool {
        matches!(self, AgentError::Refused { status, .. } if status.code() == ttrpc::Code::NOT_FOUND)
    }

    /// Whether trying again cannot help.
    pub(super) fn is_final(&self) -> bool {
        match self {
            AgentError::Version(_) | AgentError::OtherGuest { .. } => true,
            AgentError::Refused { status, .. } => status.code() == ttrpc::Code::FAILED_PRECONDITION,
            _ => false,
        }
    }
}
