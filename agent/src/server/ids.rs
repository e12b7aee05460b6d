//! Rules for ids, those of containerd's `pkg/identifiers`. They become path components.

use super::error::Error;

/// Longest id in bytes.
const MAX: usize = 76;

/// Checks the id of a container.
pub fn container(id: &str) -> Result<(), Error> {
    check("container id", id)
}

/// Checks the id of an exec.
pub fn exec(id: &str) -> Result<(), Error> {
    check("exec id", id)
}

fn check(what: &'static str, id: &str) -> Result<(), Error> {
    let refused = |reason| Err(Error::Id { what, id: id.chars().take(MAX).collect(), reason });
    if id.is_empty() {
        return refused("is empty");
    }
    if id.len() > MAX {
        return refused("is longer than 76 bytes");
    }
    // Groups of letters and digits, joined by single separators.
    let group = |group: &str| !group.is_empty() && group.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !id.split(['-', '_', '.']).all(group) {
        return refused("must be letters and digits, joined by single '-', '_' or '.'");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_takes_is_taken() {
        for id in ["a", "Z9", "web-1", "a.b_c-d", &"x".repeat(76)] {
            container(id).unwrap();
        }
    }

    #[test]
    fn nothing_that_could_leave_its_directory_is_taken() {
        for id in
            ["", ".", "..", "../a", "a/b", "a..b", "-a", "a-", "a b", "a\0", "ä", "a\n", &"x".repeat(77)]
        {
            let error = exec(id).unwrap_err().to_string();
            assert!(error.starts_with("exec id"), "{error}");
        }
    }
}
