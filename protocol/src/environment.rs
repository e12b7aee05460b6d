//! The environment that `ThawRequest` carries: what may be in it, and how much.

/// Most bytes of all entries together, each with the zero that ends it: what the agent keeps for as long as
/// the guest lives, and far less than execve(2) takes.
pub const BYTES_MAX: usize = 256 << 10;

/// Most bytes of one entry, with the zero that ends it: `MAX_ARG_STRLEN` of execve(2).
pub const ENTRY_MAX: usize = 128 << 10;

/// An environment that cannot be delivered. Tells no content: that is as secret as memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// One entry is not as environ(7) has it.
    #[error("the entry at index {index} is not NAME=value")]
    Entry {
        /// Where it is.
        index: usize,
    },
    /// One entry is longer than any program can be given.
    #[error("the entry at index {index} has {bytes} bytes, {ENTRY_MAX} are possible")]
    Long {
        /// Where it is.
        index: usize,
        /// Its length, with the final zero.
        bytes: usize,
    },
    /// They are too long together.
    #[error("it has {bytes} bytes in all, {BYTES_MAX} are possible")]
    Large {
        /// Of all, each with its final zero.
        bytes: usize,
    },
}

/// Checks all `entries`.
pub fn check(entries: &[String]) -> Result<(), EnvironmentError> {
    for (index, entry) in entries.iter().enumerate() {
        let bytes = entry.len() + 1;
        match name(entry) {
            Some(name) if !name.is_empty() && !entry.contains('\0') => {}
            _ => return Err(EnvironmentError::Entry { index }),
        }
        if bytes > ENTRY_MAX {
            return Err(EnvironmentError::Long { index, bytes });
        }
    }
    match entries.iter().map(|entry| entry.len() + 1).sum() {
        bytes if bytes > BYTES_MAX => Err(EnvironmentError::Large { bytes }),
        _ => Ok(()),
    }
}

/// NAME of "NAME=value".
pub fn name(entry: &str) -> Option<&str> {
    entry.split_once('=').map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(entries: &[&str]) -> Result<(), EnvironmentError> {
        check(&entries.iter().map(|entry| String::from(*entry)).collect::<Vec<_>>())
    }

    #[test]
    fn an_entry_has_a_name() {
        assert_eq!(entries(&["A=", "A=b=c"]), Ok(()));
        for wrong in ["A", "=b", "", "A=b\0c"] {
            assert_eq!(entries(&["A=1", wrong]), Err(EnvironmentError::Entry { index: 1 }), "{wrong:?}");
        }
    }

    #[test]
    fn there_is_an_end_to_what_can_be_delivered_and_no_content_in_the_error() {
        let long = format!("SECRET={}", "x".repeat(ENTRY_MAX));
        let error = entries(&[&long]).unwrap_err();
        assert_eq!(error, EnvironmentError::Long { index: 0, bytes: ENTRY_MAX + 8 });
        assert!(!error.to_string().contains("SECRET"));
        let half = format!("A={}", "x".repeat(ENTRY_MAX - 3));
        assert_eq!(entries(&[&half, &half]), Ok(()));
        let error = entries(&[&half, &half, "B="]).unwrap_err();
        assert_eq!(error, EnvironmentError::Large { bytes: BYTES_MAX + 3 });
    }
}
