//! Users of the host that the processes of sandboxes run as: two numbers for each sandbox, which no other living
//! sandbox has.
//!
//! `<run_dir>/users/<uid>` is a link to the run directory of the sandbox that has the number: made atomically,
//! so that no two can have it, and of no effect once that run directory is gone.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use crate::{
    config::Users,
    files::{self, LOCK_LIMIT, Lock},
    state::RunDir,
};

/// Name of the directory of all claims.
const DIR: &str = "users";

/// No user for a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Every number of the range is taken.
    #[error(
        "all {count} users from {first} on are taken by other sandboxes: set users.count in the configuration file"
    )]
    Taken {
        /// The range's first number.
        first: u32,
        /// Its length.
        count: u32,
    },
    /// A file operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> UserError + 'a {
    move |source| UserError::Io { action, path: path.into(), source }
}

/// Takes two numbers for the sandbox with this run directory, which exists; gives the first. A sandbox that has
/// some keeps them.
pub fn claim(users: &Users, run_dir: &RunDir) -> Result<u32, UserError> {
    let dir = claims(run_dir);
    files::make_dir(&dir).map_err(failed("cannot create", &dir))?;
    // Beginning where nobody else does is what makes the first attempt succeed.
    let pairs = users.pairs();
    let begin =
        run_dir.key().bytes().fold(0_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    for number in 0..pairs {
        let uid = users.first_of_pair(begin.wrapping_add(number) % pairs);
        if take(&dir, uid, run_dir)? {
            return Ok(uid);
        }
    }
    Err(UserError::Taken { first: users.first, count: users.count })
}

fn take(dir: &Path, uid: u32, run_dir: &RunDir) -> Result<bool, UserError> {
    let link = dir.join(uid.to_string());
    let wanted = Path::new("..").join(run_dir.key());
    match symlink(&wanted, &link) {
        Ok(()) => return Ok(true),
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed("cannot create", &link)(e)),
        Err(_) => {}
    }
    match fs::read_link(&link) {
        Ok(of) if of == wanted => return Ok(true),
        // Followed: whoever had it is gone.
        _ if link.exists() => return Ok(false),
        _ => {}
    }
    // Two that find it free must not take it from each other.
    let lock = File::open(dir).map_err(failed("cannot open", dir))?;
    let _lock = files::lock(lock, Lock::Exclusive, LOCK_LIMIT).map_err(failed("cannot lock", dir))?;
    if link.exists() {
        return Ok(false);
    }
    files::remove(&link).map_err(failed("cannot remove", &link))?;
    match symlink(&wanted, &link) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(failed("cannot create", &link)(e)),
    }
}

fn release(uid: u32, run_dir: &RunDir) -> Result<(), UserError> {
    let dir = claims(run_dir);
    let link = dir.join(uid.to_string());
    if fs::read_link(&link).is_ok_and(|of| of == Path::new("..").join(run_dir.key())) {
        files::remove(&link).map_err(failed("cannot remove", &link))?;
    }
    // Unless there are others.
    let _ = fs::remove_dir(&dir);
    Ok(())
}

/// Gives back what the sandbox with this run directory had. Needs no state file. May be repeated.
pub fn release_all(run_dir: &RunDir) -> Result<(), UserError> {
    let dir = claims(run_dir);
    let links = match files::entries(&dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        links => links.map_err(failed("cannot list", &dir))?,
    };
    let mut numbers = links.iter().filter_map(|link| link.file_name()?.to_str()?.parse().ok());
    numbers.try_for_each(|uid: u32| release(uid, run_dir))
}

fn claims(run_dir: &RunDir) -> PathBuf {
    run_dir.path().parent().unwrap_or(run_dir.path()).join(DIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: Users = Users { first: 1000, count: 7 };

    fn sandbox(root: &Path, id: &str) -> RunDir {
        let dir = RunDir::of(root, "/c", "default", id);
        dir.create().unwrap();
        dir
    }

    #[test]
    fn no_two_living_sandboxes_have_the_same_users_and_those_of_dead_ones_are_free() {
        let root = tempfile::tempdir().unwrap();
        let dirs = ["a", "b", "c"].map(|id| sandbox(root.path(), id));
        let mut uids = dirs.each_ref().map(|dir| claim(&USERS, dir).unwrap());
        assert_eq!(claim(&USERS, &dirs[0]).unwrap(), uids[0]);
        let d = sandbox(root.path(), "d");
        assert!(claim(&USERS, &d).unwrap_err().to_string().contains("users.count"));
        release(uids[1], &dirs[0]).unwrap();
        assert!(claim(&USERS, &d).is_err(), "nobody gives back what another has");
        release(uids[1], &dirs[1]).unwrap();
        assert_eq!(claim(&USERS, &d).unwrap(), uids[1]);
        dirs[2].remove().unwrap();
        assert_eq!(claim(&USERS, &dirs[1]).unwrap(), uids[2]);
        uids.sort_unstable();
        assert_eq!(uids, [1001, 1003, 1005]);
    }

    #[test]
    fn all_that_a_sandbox_had_is_given_back_without_its_state_and_nothing_of_others() {
        let root = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|id| sandbox(root.path(), id));
        release_all(&a).unwrap();
        let (_, kept) = (claim(&USERS, &a).unwrap(), claim(&USERS, &b).unwrap());
        release_all(&a).unwrap();
        let left: Vec<_> =
            fs::read_dir(root.path().join(DIR)).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [kept.to_string().as_str()]);
        release_all(&b).unwrap();
        assert!(!root.path().join(DIR).exists());
    }

    #[test]
    fn many_at_once_get_one_each() {
        let root = tempfile::tempdir().unwrap();
        let users = Users { first: 5000, count: 101 };
        let dirs: Vec<_> = (0..50).map(|n| sandbox(root.path(), &n.to_string())).collect();
        // Claims of sandboxes that are gone.
        fs::create_dir(root.path().join(DIR)).unwrap();
        (0..50)
            .for_each(|n| symlink("../gone", root.path().join(format!("{DIR}/{}", 5001 + 2 * n))).unwrap());
        let mut uids: Vec<u32> = std::thread::scope(|scope| {
            let claims: Vec<_> = dirs.iter().map(|dir| scope.spawn(|| claim(&users, dir).unwrap())).collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).collect()
        });
        uids.sort_unstable();
        uids.dedup();
        assert_eq!(uids.len(), 50);
    }
}
