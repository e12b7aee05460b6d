//! Who the process is and what it may do: limits, user, groups and capabilities.

use std::collections::HashSet;

use caps::{CapSet, CapsHashSet};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        stat::{Mode, fstat, makedev, umask},
    },
    unistd::{Gid, Uid, fchown, setgid, setgroups, setuid},
};
use oci_spec::runtime::{Capability, LinuxCapabilities, PosixRlimitType, Process, User};

use super::{Failure, Result, Step};

/// The mask that runc gives where the spec says nothing.
const DEFAULT_UMASK: u32 = 0o022;

/// Sets the limits. Raising one needs `CAP_SYS_RESOURCE`, so this comes before the capabilities go.
pub(super) fn limit(process: &Process) -> Result<()> {
    for limit in process.rlimits().iter().flatten() {
        let (soft, hard) = (limit.soft(), limit.hard());
        setrlimit(resource(limit.typ()), soft, hard)
            .step(|| format!("set {} to {soft} (soft) and {hard} (hard)", limit.typ()))?;
    }
    Ok(())
}

fn resource(typ: PosixRlimitType) -> Resource {
    match typ {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

/// Gives stdin, stdout and stderr to the user, who could otherwise not open them again by /dev/stdout.
pub(super) fn own_stdio(user: &User) -> Result<()> {
    // /dev/null is everybody's.
    let null = makedev(1, 3);
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let stdio: [&dyn std::os::fd::AsFd; 3] = [&stdin, &stdout, &stderr];
    for fd in stdio.map(std::os::fd::AsFd::as_fd) {
        let found = fstat(fd).step(|| "look at stdio".into())?;
        if found.st_uid == user.uid() || found.st_rdev == null {
            continue;
        }
        match fchown(fd, Some(Uid::from_raw(user.uid())), None) {
            // What cannot change hands (a file of a read-only or foreign file system) stays as it is.
            Ok(()) | Err(Errno::EPERM | Errno::EROFS | Errno::EINVAL) => {}
            Err(errno) => return Err(errno).step(|| "give stdio to the user".into()),
        }
    }
    Ok(())
}

/// Becomes the user, with the capabilities of the spec and no others.
pub(super) fn assume(process: &Process) -> Result<()> {
    let user = process.user();
    let wanted = Wanted::new(process.capabilities().as_ref())?;
    umask(Mode::from_bits_truncate(user.umask().unwrap_or(DEFAULT_UMASK)));
    for capability in caps::runtime::thread_all_supported().difference(&wanted.bounding) {
        capable(caps::drop(None, CapSet::Bounding, *capability))
            .step(|| format!("drop {capability} from the bounding set"))?;
    }
    // Without it, a change to another user than root would lose the permitted set.
    prctl::set_keepcaps(true).step(|| "keep capabilities".into())?;
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().copied().map(Gid::from_raw).collect();
    setgroups(&groups).step(|| format!("set the groups {groups:?}"))?;
    setgid(Gid::from_raw(user.gid())).step(|| format!("become group {}", user.gid()))?;
    setuid(Uid::from_raw(user.uid())).step(|| format!("become user {}", user.uid()))?;
    prctl::set_keepcaps(false).step(|| "stop keeping capabilities".into())?;
    // In this order no set ever exceeds one that bounds it.
    for (set, name, value) in [
        (CapSet::Inheritable, "inheritable", &wanted.inheritable),
        (CapSet::Effective, "effective", &wanted.effective),
        (CapSet::Permitted, "permitted", &wanted.permitted),
    ] {
        capable(caps::set(None, set, value)).step(|| format!("set the {name} capabilities to {value:?}"))?;
    }
    capable(caps::set(None, CapSet::Ambient, &wanted.ambient))
        .step(|| format!("set the ambient capabilities to {:?}", wanted.ambient))
}

/// The five sets, those capabilities left out that this kernel does not know.
struct Wanted {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    inheritable: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

impl Wanted {
    fn new(capabilities: Option<&LinuxCapabilities>) -> Result<Self> {
        let supported = caps::runtime::thread_all_supported();
        let set = |given: Option<&HashSet<Capability>>| -> Result<CapsHashSet> {
            let parsed: Result<CapsHashSet> = given.into_iter().flatten().map(parse).collect();
            Ok(parsed?.intersection(&supported).copied().collect())
        };
        Ok(Self {
            bounding: set(capabilities.and_then(|c| c.bounding().as_ref()))?,
            effective: set(capabilities.and_then(|c| c.effective().as_ref()))?,
            inheritable: set(capabilities.and_then(|c| c.inheritable().as_ref()))?,
            permitted: set(capabilities.and_then(|c| c.permitted().as_ref()))?,
            ambient: set(capabilities.and_then(|c| c.ambient().as_ref()))?,
        })
    }
}

fn parse(capability: &Capability) -> Result<caps::Capability> {
    let name = format!("CAP_{capability}");
    name.parse()
        .map_err(|_| Failure { action: format!("set the unknown capability {name}"), errno: Errno::EINVAL })
}

/// The caps crate reports only texts; the errno of the call that failed is still there.
fn capable(result: std::result::Result<(), caps::errors::CapsError>) -> nix::Result<()> {
    result.map_err(|_| Errno::last())
}
