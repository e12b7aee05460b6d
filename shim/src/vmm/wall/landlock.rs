//! Landlock: what a process may do with the files that its root does show it.
//!
//! <https://docs.kernel.org/userspace-api/landlock.html>. By hand, for the rules speak of files of a root that
//! is there only in the new process, where nothing may be allocated.

use std::ffi::CString;

use nix::errno::Errno;

/// The version of the interface that knows all of [`ACCESSES`]: Linux 6.2.
const NEEDED: libc::c_long = 3;

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: libc::c_uint = 1;

/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: libc::c_uint = 1;

// LANDLOCK_ACCESS_FS_* of linux/landlock.h.
const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_REG: u64 = 1 << 8;
const MAKE_SOCK: u64 = 1 << 9;
const TRUNCATE: u64 = 1 << 14;

/// Whatever version 3 can forbid: also to make and remove directories, nodes, FIFOs and links, and to move files
/// from one directory into another.
const ACCESSES: u64 = (1 << 15) - 1;

/// What a rule may allow for something that is no directory.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE;

/// A program, or a directory of libraries.
pub(super) const RUN: u64 = EXECUTE | READ;
pub(super) const READ: u64 = READ_FILE | READ_DIR;
/// Files and sockets of its own in a directory, but nothing else.
pub(super) const WRITE: u64 = READ | WRITE_FILE | TRUNCATE | REMOVE_FILE | MAKE_REG | MAKE_SOCK;
/// What is shown later: disks, and directories for snapshots. Each has a mount that says whether it is read-only.
pub(super) const LATER: u64 = READ | WRITE_FILE | TRUNCATE | MAKE_REG;

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: libc::c_int,
}

/// What is allowed; all else is not.
#[derive(Debug, Default)]
pub(super) struct Rules(Vec<(CString, u64)>);

impl Rules {
    /// Allows `accesses` to what is at `path` in the new root: `is_dir` says what that is.
    pub(super) fn allow(&mut self, path: CString, accesses: u64, is_dir: bool) {
        self.0.push((path, if is_dir { accesses } else { accesses & OF_FILES }));
    }

    /// Restricts this process, for good, with all that it executes. Allocates nothing. Takes CAP_SYS_ADMIN or
    /// no_new_privs.
    pub(super) fn apply(&self) -> Result<(), Errno> {
        let handled = [ACCESSES];
        // SAFETY: structures that outlive their calls, with their sizes; paths that end with a zero; descriptors
        // that are closed here.
        unsafe {
            let ruleset = libc::syscall(
                libc::SYS_landlock_create_ruleset,
                handled.as_ptr(),
                size_of_val(&handled),
                0 as libc::c_uint,
            );
            let ruleset = Errno::result(ruleset)? as libc::c_int;
            for (path, allowed) in &self.0 {
                let parent = Errno::result(libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC))?;
                let rule = PathBeneath { allowed: *allowed, parent };
                let added = libc::syscall(
                    libc::SYS_landlock_add_rule,
                    ruleset,
                    PATH_BENEATH,
                    &raw const rule,
                    0 as libc::c_uint,
                );
                libc::close(parent);
                Errno::result(added)?;
            }
            let restricted = libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0 as libc::c_uint);
            libc::close(ruleset);
            Errno::result(restricted).map(drop)
        }
    }
}

/// Whether the kernel has what is needed, and whoever booted it has not turned it off.
pub(in crate::vmm) fn is_available() -> bool {
    // SAFETY: nothing is passed but the question.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u64>(), 0_usize, ASK_VERSION)
    };
    version >= NEEDED
}
