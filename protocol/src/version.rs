//! The version of the protocol, checked by `Guest.Hello` on every control connection.

use std::fmt;

use crate::guest;

/// A protocol version. Versions with the same major work together; a higher minor only adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Raised by a change that an older peer would misunderstand.
    pub major: u32,
    /// Raised by an addition that an older peer can ignore.
    pub minor: u32,
}

/// The version that this build speaks.
pub const CURRENT: Version = Version { major: 1, minor: 4 };

/// The peer speaks a protocol that this build does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this side speaks protocol {ours}, the peer speaks {theirs}: use a shim and a guest image of the same release"
)]
pub struct Mismatch {
    /// [`CURRENT`].
    pub ours: Version,
    /// What the peer announced.
    pub theirs: Version,
}

impl Version {
    /// Whether this build can talk to a peer of version `self`.
    pub fn check(self) -> Result<(), Mismatch> {
        if self.major == CURRENT.major { Ok(()) } else { Err(Mismatch { ours: CURRENT, theirs: self }) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl From<Version> for guest::Version {
    fn from(version: Version) -> Self {
        guest::Version { major: version.major, minor: version.minor, ..Default::default() }
    }
}

impl From<&guest::Version> for Version {
    fn from(version: &guest::Version) -> Self {
        Version { major: version.major, minor: version.minor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_minor_is_accepted() {
        assert_eq!(Version { major: CURRENT.major, minor: 99 }.check(), Ok(()));
    }

    #[test]
    fn another_major_is_refused_and_both_versions_are_named() {
        let error = Version { major: 7, minor: 3 }.check().unwrap_err().to_string();
        assert!(error.contains("7.3") && error.contains(&CURRENT.to_string()), "{error}");
    }
}
