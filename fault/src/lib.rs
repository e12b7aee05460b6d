//! Named points in shim and agent at which a test lets them die, as `kill -9` would.
//!
//! With the feature `enabled`, [`VARIABLE`] names a file; while that says `<point> <n>`, whoever reaches
//! the point for the n-th time from then on removes the file and dies. So one process dies once, and
//! the file's absence says that it did. Without the feature everything here is empty, and what is
//! shipped is built so.

use std::ffi::OsString;

/// Environment variable with the path of the file.
#[cfg(feature = "enabled")]
pub const VARIABLE: &str = "CUBE_KILL_AT";

/// Ends this process if a test has asked for it.
#[cfg(feature = "enabled")]
pub fn point(name: &str) {
    enabled::point(name);
}

/// Nothing: the feature `enabled` is off.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn point(_: &str) {}

/// What the environment of a program must have that is started with an empty one, for its points to work.
#[cfg(feature = "enabled")]
pub fn environment() -> Option<(&'static str, OsString)> {
    Some((VARIABLE, std::env::var_os(VARIABLE)?))
}

/// Nothing: the feature `enabled` is off.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn environment() -> Option<(&'static str, OsString)> {
    None
}

#[cfg(feature = "enabled")]
mod enabled {
    use std::{
        env, fs,
        path::Path,
        sync::{Mutex, PoisonError},
    };

    pub(super) fn point(name: &str) {
        // Threads that write two logs reach the same points.
        static TURN: Mutex<()> = Mutex::new(());
        let Some(file) = env::var_os(super::VARIABLE) else { return };
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        if is_due(Path::new(&file), name) {
            die();
        }
    }

    fn is_due(file: &Path, name: &str) -> bool {
        let text = fs::read_to_string(file).unwrap_or_default();
        let wanted = text.trim().split_once(' ').filter(|(wanted, _)| *wanted == name);
        match wanted.and_then(|(_, times)| times.parse::<u64>().ok()) {
            Some(0 | 1) => fs::remove_file(file).is_ok(),
            Some(times) => {
                // A file that cannot be written counts no further; the test sees that it stays.
                let _ = fs::write(file, format!("{name} {}", times - 1));
                false
            }
            None => false,
        }
    }

    fn die() -> ! {
        // SAFETY: neither call touches memory, and there is no state to keep consistent after them.
        unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
            // The first process of a pid namespace cannot kill itself; this ends it as abruptly.
            libc::_exit(128 + libc::SIGKILL)
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_point_is_due_the_time_that_was_asked_for_and_once() {
            let dir = env::temp_dir().join(format!("cube-fault-{}", std::process::id()));
            fs::create_dir(&dir).unwrap();
            let file = dir.join("kill-at");
            assert!(!is_due(&file, "a"));
            fs::write(&file, "a 2\n").unwrap();
            let reached = ["b", "a", "b", "a", "a"].map(|name| is_due(&file, name));
            assert_eq!(reached, [false, false, false, true, false]);
            assert!(!file.exists());
            fs::remove_dir_all(dir).unwrap();
        }
    }
}
