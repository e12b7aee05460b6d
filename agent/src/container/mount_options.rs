//! The options of a mount in the spec, as runc and mount(8) name them.

use nix::mount::MsFlags;
use oci_spec::runtime::Mount;

use super::ContainerError;

/// The parsed `options` of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// An existing file or directory is mounted, not a file system.
    pub(super) bind: bool,
    /// With everything mounted below it.
    pub(super) recursive_bind: bool,
    /// Flags for mount(2), without those that make a bind mount.
    pub(super) flags: MsFlags,
    /// The same as attributes of the mount, for mount_setattr(2): only what an option named.
    pub(super) attributes: Attributes,
    /// Attributes of this mount and those below it (`rro` and its kin).
    pub(super) recursive_attributes: Attributes,
    /// Propagation types to set, in the order given.
    pub(super) propagation: Vec<Propagation>,
    /// Options for the file system itself.
    pub(super) data: Vec<String>,
    /// `tmpcopyup`: a tmpfs begins with a copy of what it covers.
    pub(super) copy_up: bool,
}

/// `MOUNT_ATTR_…` bits to set and to clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Attributes {
    pub(super) set: u64,
    pub(super) clear: u64,
}

/// A propagation type, `MS_SHARED` for example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Propagation {
    pub(super) kind: MsFlags,
    pub(super) recursive: bool,
}

impl Attributes {
    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Options of one mount may contradict each other; the last one counts, as for mount(8).
    fn apply(&mut self, (set, clear): (u64, u64)) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
    }
}

/// MOUNT_ATTR__ATIME: the access time modes are one field, which must be cleared as a whole before a
/// mode is set. Not in the libc crate.
const MOUNT_ATTR_ATIME_MODES: u64 = 0x70;

impl MountOptions {
    /// Parses the options of `mounts[index]`.
    pub(super) fn parse(index: usize, mount: &Mount) -> Result<Self, ContainerError> {
        let typ = mount.typ().as_deref().unwrap_or_default();
        let mut parsed = Self {
            bind: typ == "bind",
            recursive_bind: false,
            flags: MsFlags::empty(),
            attributes: Attributes::default(),
            recursive_attributes: Attributes::default(),
            propagation: Vec::new(),
            data: Vec::new(),
            copy_up: false,
        };
        for option in mount.options().iter().flatten() {
            parsed.add(index, option)?;
        }
        if is_cgroup(typ) && !mount.options().iter().flatten().any(|option| option == "rw") {
            parsed.flags |= MsFlags::MS_RDONLY;
        }
        if parsed.copy_up && (typ != "tmpfs" || parsed.bind) {
            return Err(ContainerError::Unsupported {
                field: format!("mounts[{index}].options \"tmpcopyup\" of type {typ:?}"),
                hint: Some("only a tmpfs can begin with a copy of what it covers"),
            });
        }
        if parsed.bind && !parsed.data.is_empty() {
            let reason = "it is not an option of bind mounts";
            return Err(ContainerError::invalid(
                format!("mounts[{index}].options"),
                parsed.data.join(","),
                reason,
            ));
        }
        if typ.is_empty() && !parsed.bind && !parsed.flags.contains(MsFlags::MS_REMOUNT) {
            let reason = "a mount without the option bind or rbind needs a type";
            return Err(ContainerError::invalid(format!("mounts[{index}].type"), "", reason));
        }
        Ok(parsed)
    }

    fn add(&mut self, index: usize, option: &str) -> Result<(), ContainerError> {
        match option {
            "" | "defaults" => {}
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive_bind) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => {
                return Err(ContainerError::unsupported(format!("mounts[{index}].options {option:?}")));
            }
            _ => {
                if let Some(propagation) = propagation(option) {
                    self.propagation.push(propagation);
                } else if let Some((flag, on)) = flag(option) {
                    self.flags.set(flag, on);
                    // "noatime" after "relatime" replaces it; the kernel wants one mode at most.
                    if let Some(change) = attribute(option) {
                        self.attributes.apply(change);
                    }
                } else if let Some(change) = option.strip_prefix('r').and_then(attribute) {
                    self.recursive_attributes.apply(change);
                } else {
                    self.data.push(option.to_owned());
                }
            }
        }
        Ok(())
    }
}

/// Whether a mount of this type shows the container's cgroup. What the spec calls version 1 is, in the
/// guest, version 2.
pub(super) fn is_cgroup(typ: &str) -> bool {
    matches!(typ, "cgroup" | "cgroup2")
}

fn propagation(option: &str) -> Option<Propagation> {
    let (name, recursive) = match option {
        "rprivate" | "rshared" | "rslave" | "runbindable" => (&option[1..], true),
        name => (name, false),
    };
    let kind = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(Propagation { kind, recursive })
}

/// The mount(2) flag of an option, and whether the option sets or clears it.
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    // Not in the nix crate.
    const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW);
    Some(match option {
        "acl" => (MsFlags::MS_POSIXACL, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "atime" => (MsFlags::MS_NOATIME, false),
        "dev" => (MsFlags::MS_NODEV, false),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "iversion" => (MsFlags::MS_I_VERSION, true),
        "lazytime" => (MsFlags::MS_LAZYTIME, true),
        "loud" => (MsFlags::MS_SILENT, false),
        "mand" => (MsFlags::MS_MANDLOCK, true),
        "noacl" => (MsFlags::MS_POSIXACL, false),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "nodev" => (MsFlags::MS_NODEV, true),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "noiversion" => (MsFlags::MS_I_VERSION, false),
        "nolazytime" => (MsFlags::MS_LAZYTIME, false),
        "nomand" => (MsFlags::MS_MANDLOCK, false),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "nosymfollow" => (NOSYMFOLLOW, true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "remount" => (MsFlags::MS_REMOUNT, true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "silent" => (MsFlags::MS_SILENT, true),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "symfollow" => (NOSYMFOLLOW, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        _ => return None,
    })
}

/// Attributes that an option sets and clears.
fn attribute(option: &str) -> Option<(u64, u64)> {
    use libc::{
        MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID,
        MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_RELATIME, MOUNT_ATTR_STRICTATIME,
    };
    Some(match option {
        "ro" => (MOUNT_ATTR_RDONLY, 0),
        "rw" => (0, MOUNT_ATTR_RDONLY),
        "nosuid" => (MOUNT_ATTR_NOSUID, 0),
        "suid" => (0, MOUNT_ATTR_NOSUID),
        "nodev" => (MOUNT_ATTR_NODEV, 0),
        "dev" => (0, MOUNT_ATTR_NODEV),
        "noexec" => (MOUNT_ATTR_NOEXEC, 0),
        "exec" => (0, MOUNT_ATTR_NOEXEC),
        "nodiratime" => (MOUNT_ATTR_NODIRATIME, 0),
        "diratime" => (0, MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => (MOUNT_ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => (MOUNT_ATTR_NOATIME, MOUNT_ATTR_ATIME_MODES),
        "strictatime" => (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME_MODES),
        "relatime" | "atime" | "nostrictatime" => (MOUNT_ATTR_RELATIME, MOUNT_ATTR_ATIME_MODES),
        "norelatime" => (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME_MODES),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::MountBuilder;

    use super::*;

    fn parse(typ: &str, options: &[&str]) -> Result<MountOptions, ContainerError> {
        let options: Vec<String> = options.iter().map(|option| (*option).into()).collect();
        let mount = MountBuilder::default().destination("/x").typ(typ).options(options).build().unwrap();
        MountOptions::parse(0, &mount)
    }

    #[test]
    fn flags_and_file_system_options_are_told_apart() {
        let parsed = parse("tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME);
        assert_eq!(parsed.data, ["mode=755", "size=65536k"]);
    }

    #[test]
    fn only_a_tmpfs_copies_what_it_covers() {
        let parsed = parse("tmpfs", &["nosuid", "tmpcopyup"]).unwrap();
        assert!(parsed.copy_up && parsed.data.is_empty());
        for (typ, options) in [("proc", vec!["tmpcopyup"]), ("tmpfs", vec!["bind", "tmpcopyup"])] {
            let error = parse(typ, &options).unwrap_err().to_string();
            assert!(error.contains("tmpcopyup"), "{error}");
        }
    }

    #[test]
    fn the_last_of_two_contradicting_options_counts() {
        let parsed = parse("bind", &["rbind", "ro", "rw", "nosuid", "rprivate"]).unwrap();
        assert!(parsed.recursive_bind);
        assert_eq!(parsed.attributes.set, libc::MOUNT_ATTR_NOSUID);
        assert_eq!(parsed.attributes.clear, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(parsed.propagation, [Propagation { kind: MsFlags::MS_PRIVATE, recursive: true }]);
    }

    #[test]
    fn recursive_attributes_are_not_mistaken_for_propagation_or_atime() {
        let parsed = parse("bind", &["rbind", "rro", "rnoexec", "relatime", "rslave"]).unwrap();
        assert_eq!(parsed.recursive_attributes.set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC);
        assert_eq!(parsed.attributes.clear, MOUNT_ATTR_ATIME_MODES);
        assert_eq!(parsed.propagation.len(), 1);
    }

    #[test]
    fn an_unknown_option_of_a_bind_mount_is_refused_since_the_kernel_would_ignore_it() {
        let error = parse("bind", &["rbind", "size=1k"]).unwrap_err();
        assert!(error.to_string().contains("size=1k"), "{error}");
    }

    #[test]
    fn a_cgroup_is_read_only_unless_asked_otherwise() {
        assert!(parse("cgroup", &["nosuid"]).unwrap().flags.contains(MsFlags::MS_RDONLY));
        assert!(!parse("cgroup2", &["rw"]).unwrap().flags.contains(MsFlags::MS_RDONLY));
    }
}
