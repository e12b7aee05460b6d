//! Steps on the way into a wall: one system call or a few each, and nothing else, for they are taken between
//! clone(2) and execve(2), where nothing may be allocated and no lock be taken.

use std::{
    ffi::{CStr, CString},
    fmt,
};

use nix::errno::Errno;

use super::{User, landlock::Rules};

/// `CAP_LAST_CAP` of any kernel is below: prctl(2) refuses those that it does not know.
const CAPABILITIES: libc::c_ulong = 64;

/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

// From linux/mount.h.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

/// What is done. Its text says what failed.
#[derive(Debug)]
pub(super) enum Step {
    /// What the host mounts appears; nothing that is mounted here appears there.
    FollowHost,
    Tmpfs {
        at: CString,
    },
    Dir {
        at: CString,
    },
    File {
        at: CString,
    },
    Link {
        at: CString,
        to: CString,
    },
    Node {
        at: CString,
        kind: libc::mode_t,
        device: libc::dev_t,
        mode: libc::mode_t,
        owner: User,
    },
    Bind {
        from: CString,
        at: CString,
        /// `MOUNT_ATTR_*`.
        attributes: u64,
        recursive: bool,
    },
    Proc {
        at: CString,
    },
    Pivot {
        root: CString,
    },
    SealRoot,
    Landlock(Rules),
    Limit {
        resource: libc::__rlimit_resource_t,
        name: &'static str,
        value: u64,
    },
    Rights {
        user: User,
        capabilities: u64,
    },
    Filter(Vec<libc::sock_filter>),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |path: &CString| path.to_string_lossy().into_owned();
        match self {
            Step::FollowHost => write!(f, "make its mounts its own"),
            Step::Tmpfs { at } => write!(f, "mount a tmpfs on {}", text(at)),
            Step::Dir { at } | Step::File { at } | Step::Link { at, .. } => write!(f, "make {}", text(at)),
            Step::Node { at, .. } => write!(f, "make the device node {}", text(at)),
            Step::Bind { from, at, .. } => write!(f, "show {} at {}", text(from), text(at)),
            Step::Proc { at } => write!(f, "mount proc on {}", text(at)),
            Step::Pivot { root } => write!(f, "make {} its root", text(root)),
            Step::SealRoot => write!(f, "make its root read-only"),
            Step::Landlock(_) => write!(f, "restrict itself with Landlock"),
            Step::Limit { name, .. } => write!(f, "set its {name} limit"),
            Step::Rights { user, .. } => write!(f, "become user {} without capabilities", user.uid),
            Step::Filter(_) => write!(f, "install its system call filter"),
        }
    }
}

impl Step {
    /// Does it. Allocates nothing.
    pub(super) fn take(&self) -> Result<(), Errno> {
        match self {
            Step::FollowHost => mount(None, c"/", None, libc::MS_REC | libc::MS_SLAVE, None),
            Step::Tmpfs { at } => {
                let flags = libc::MS_NOSUID | libc::MS_NOEXEC;
                mount(Some(c"cube"), at, Some(c"tmpfs"), flags, Some(c"mode=755,size=1m,nr_inodes=4k"))
            }
            Step::Dir { at } => {
                // SAFETY: the path ends with a zero and outlives the call, as do all below.
                existing(unsafe { libc::mkdir(at.as_ptr(), 0o755) })
            }
            Step::File { at } => {
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW;
                // SAFETY: as above; the descriptor is closed at once.
                unsafe {
                    let fd = Errno::result(libc::open(at.as_ptr(), flags, 0o644))?;
                    Errno::result(libc::close(fd)).map(drop)
                }
            }
            // SAFETY: as above.
            Step::Link { at, to } => existing(unsafe { libc::symlink(to.as_ptr(), at.as_ptr()) }),
            Step::Node { at, kind, device, mode, owner } => {
                // SAFETY: as above.
                unsafe {
                    Errno::result(libc::mknod(at.as_ptr(), kind | mode, *device))?;
                    Errno::result(libc::chown(at.as_ptr(), owner.uid, owner.gid)).map(drop)
                }
            }
            Step::Bind { from, at, attributes, recursive } => bind(from, at, *attributes, *recursive),
            Step::Proc { at } => {
                let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
                mount(Some(c"proc"), at, Some(c"proc"), flags, None)
            }
            Step::Pivot { root } => pivot(root),
            Step::SealRoot => {
                let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOSUID;
                mount(None, c"/", None, flags | libc::MS_NOEXEC, None)
            }
            Step::Landlock(rules) => rules.apply(),
            Step::Limit { resource, value, .. } => limit(*resource, *value),
            Step::Rights { user, capabilities } => rights(*user, *capabilities),
            Step::Filter(program) => filter(program),
        }
    }
}

fn pointer(text: Option<&CStr>) -> *const libc::c_char {
    text.map_or(std::ptr::null(), CStr::as_ptr)
}

fn mount(
    source: Option<&CStr>,
    at: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> Result<(), Errno> {
    // SAFETY: every text ends with a zero and outlives the call, or is null where that is allowed.
    let result =
        unsafe { libc::mount(pointer(source), at.as_ptr(), pointer(kind), flags, pointer(data).cast()) };
    Errno::result(result).map(drop)
}

/// What is there already is as good.
fn existing(result: libc::c_int) -> Result<(), Errno> {
    match Errno::result(result) {
        Err(Errno::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

/// A copy of `from` that nobody has seen, with `attributes`.
pub(super) fn detached(from: &CStr, attributes: u64, recursive: bool) -> Result<libc::c_int, Errno> {
    let recursive = if recursive { libc::AT_RECURSIVE as libc::c_uint } else { 0 };
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | recursive;
    let wanted = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: paths end with a zero, the structure has the size that is told, and both outlive the calls.
    unsafe {
        let tree = Errno::result(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags))?;
        let set = libc::syscall(
            libc::SYS_mount_setattr,
            tree,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as libc::c_uint | recursive,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        );
        Errno::result(set)?;
        Ok(tree as libc::c_int)
    }
}

/// Mounts what [`detached`] gave on `at`.
pub(super) fn attach(tree: libc::c_int, at: &CStr) -> Result<(), Errno> {
    // SAFETY: as in `detached`.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            libc::AT_FDCWD,
            at.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    Errno::result(moved).map(drop)
}

fn bind(from: &CStr, at: &CStr, attributes: u64, recursive: bool) -> Result<(), Errno> {
    let tree = detached(from, attributes, recursive)?;
    let attached = attach(tree, at);
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(tree) };
    attached
}

/// The old root is gone then, with all that was mounted in it.
fn pivot(root: &CStr) -> Result<(), Errno> {
    // SAFETY: paths that end with a zero.
    unsafe {
        Errno::result(libc::chdir(root.as_ptr()))?;
        Errno::result(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        // The old root is on top of the new one.
        Errno::result(libc::umount2(c".".as_ptr(), libc::MNT_DETACH))?;
        Errno::result(libc::chdir(c"/".as_ptr())).map(drop)
    }
}

/// Never raises what is in force: that would take a capability.
fn limit(resource: libc::__rlimit_resource_t, value: u64) -> Result<(), Errno> {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure outlives both calls.
    unsafe {
        Errno::result(libc::getrlimit(resource, &raw mut now))?;
        let value = value.min(now.rlim_max);
        let wanted = libc::rlimit { rlim_cur: value, rlim_max: value };
        Errno::result(libc::setrlimit(resource, &raw const wanted)).map(drop)
    }
}

/// System calls, not the C library's functions of the same names: those tell the other threads, of which the
/// library believes in some that this process does not have.
fn rights(User { uid, gid }: User, capabilities: u64) -> Result<(), Errno> {
    // SAFETY: numbers, and structures of the size that the kernel expects which outlive the call.
    unsafe {
        for number in (0..CAPABILITIES).filter(|number| capabilities & (1 << number) == 0) {
            match Errno::result(libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0)) {
                Err(Errno::EINVAL) => break,
                other => other?,
            };
        }
        Errno::result(libc::syscall(libc::SYS_setgroups, 0_usize, std::ptr::null::<libc::gid_t>()))?;
        Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        let header = [CAPABILITY_VERSION, 0];
        let (low, high) = (capabilities as u32, (capabilities >> 32) as u32);
        // Effective, permitted, inheritable; the low half of each, then the high one.
        let sets = [low, low, 0, high, high, 0];
        Errno::result(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()))?;
        Errno::result(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)).map(drop)
    }
}

fn filter(program: &[libc::sock_filter]) -> Result<(), Errno> {
    let length = libc::c_ushort::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads the program, which outlives the call.
    let set =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    Errno::result(set).map(drop)
}
