//! Errors as text: the whole chain of causes in one line.

use std::{error::Error, io, sync::PoisonError};

use nix::errno::Errno;

/// `error` and its causes, outermost first, joined by ": ".
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = one(error);
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&one(error));
        cause = error.source();
    }
    text
}

/// An errno as runc and containerd print it, "no such file or directory"; anything else as it says.
fn one(error: &(dyn Error + 'static)) -> String {
    let errno = match error.downcast_ref::<io::Error>() {
        Some(error) => error.raw_os_error().map(Errno::from_raw),
        None => error.downcast_ref::<Errno>().copied(),
    };
    match errno {
        Some(errno) => lower_first(errno.desc()),
        None => error.to_string(),
    }
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    // "RFS specific error" begins with a name, not with a word.
    match (chars.next(), chars.next()) {
        (Some(first), Some(second)) if second.is_lowercase() => {
            format!("{}{second}{}", first.to_lowercase(), chars.as_str())
        }
        _ => text.to_owned(),
    }
}

/// Locks a mutex whose data stays valid when a holder panics: every critical section in this crate
/// changes it in one step.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("exec /bin/nosuch")]
    struct Exec(#[source] io::Error);

    #[test]
    fn a_chain_names_every_cause_and_reads_like_runc() {
        let error = Exec(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(chain(&error), "exec /bin/nosuch: no such file or directory");
        let error = Exec(io::Error::other("the pipe broke"));
        assert_eq!(chain(&error), "exec /bin/nosuch: the pipe broke");
        assert_eq!(chain(&Errno::EBUSY), "device or resource busy");
    }
}
