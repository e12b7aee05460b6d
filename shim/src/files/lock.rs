//! flock(2) with a time limit, which it has not by itself.

use std::{
    io::{self, ErrorKind},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, Flockable},
};

/// How long a lock is waited for that is held for some system calls, or for the removal of a directory: so
/// long only if its holder hangs, on a disk for example.
pub(crate) const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// How often a lock that somebody holds is tried.
const POLL: Duration = Duration::from_millis(10);

/// Locks `file`, for whoever reads it alone or with others, waiting for at most `limit`. Blocks.
///
/// # Errors
///
/// Of kind [`TimedOut`](ErrorKind::TimedOut) if somebody else holds it all that time.
pub(crate) fn lock<T: Flockable>(mut file: T, kind: Lock, limit: Duration) -> io::Result<Flock<T>> {
    let deadline = Instant::now() + limit;
    let kind = match kind {
        Lock::Exclusive => FlockArg::LockExclusiveNonblock,
        Lock::Shared => FlockArg::LockSharedNonblock,
    };
    loop {
        match Flock::lock(file, kind) {
            Ok(lock) => return Ok(lock),
            Err((unlocked, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = unlocked,
            Err((_, Errno::EWOULDBLOCK)) => {
                let text = format!("another process has held the lock for {limit:?}");
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            Err((_, errno)) => return Err(errno.into()),
        }
        thread::sleep(POLL);
    }
}

/// With whom a lock is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// With nobody.
    Exclusive,
    /// With others who share it.
    Shared,
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_lock_that_is_never_given_up_is_an_error_after_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::open(dir.path()).unwrap();
        let held = lock(open(), Lock::Exclusive, LOCK_LIMIT).unwrap();
        for kind in [Lock::Exclusive, Lock::Shared] {
            let error = lock(open(), kind, Duration::from_millis(30)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        }
        drop(held);
        let _one = lock(open(), Lock::Shared, LOCK_LIMIT).unwrap();
        let _other = lock(open(), Lock::Shared, LOCK_LIMIT).unwrap();
    }

    #[test]
    fn a_lock_that_is_given_up_meanwhile_is_had() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(File::open(dir.path()).unwrap(), Lock::Exclusive, LOCK_LIMIT).unwrap();
        let waiting = {
            let file = File::open(dir.path()).unwrap();
            thread::spawn(move || lock(file, Lock::Exclusive, Duration::from_secs(60)).map(drop))
        };
        drop(held);
        waiting.join().unwrap().unwrap();
    }
}
