//! Mounts on the host, with the options that containerd writes.
//!
//! containerd's list of options is that of mount(8) as its `mount` package understands it: flags by
//! name, and everything else is data for the file system.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::chdir,
};

use super::{RootfsError, bind::Bind};

/// mount(2) takes one page of data; containerd, too, leaves some room.
pub(super) const DATA_MAX: usize = 4096 - 512;

/// A mount that this process makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    /// "bind", "overlay", "tmpfs".
    pub fs_type: String,
    /// A path, or what the file system takes instead.
    pub source: String,
    /// Options as containerd gives them.
    pub options: Vec<String>,
}

/// Options, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Parsed {
    flags: MsFlags,
    /// `rro`: read-only all the way down.
    recursively_read_only: bool,
    /// `slave`, `rslave`: what the host mounts there later appears, too.
    follow_host: bool,
    data: Vec<String>,
}

/// Flag options: `true` sets the flag, `false` clears it.
const FLAGS: [(&str, bool, MsFlags); 24] = [
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("atime", false, MsFlags::MS_NOATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("defaults", true, MsFlags::empty()),
    ("dev", false, MsFlags::MS_NODEV),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("nodev", true, MsFlags::MS_NODEV),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("suid", false, MsFlags::MS_NOSUID),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
];

/// Propagation from the host to the guest, and none. There is none from the guest to the host.
const FOLLOW_HOST: [&str; 2] = ["slave", "rslave"];
const KEEP_APART: [&str; 4] = ["private", "rprivate", "unbindable", "runbindable"];

impl HostMount {
    /// Whether it makes another directory visible rather than a file system.
    pub(super) fn is_bind(&self) -> bool {
        matches!(self.fs_type.as_str(), "bind" | "rbind")
            || self.options.iter().any(|option| option == "bind" || option == "rbind")
    }

    /// Finds options that cannot be honoured, without mounting anything.
    pub(super) fn check(&self) -> Result<(), RootfsError> {
        self.parse().map(|_| ())
    }

    /// Mounts it on `target`, which exists. Blocks as long as the file system takes.
    pub(super) fn mount_on(&self, target: &Path) -> Result<(), RootfsError> {
        let parsed = self.parse()?;
        self.try_mount(target, &parsed).map_err(|source| RootfsError::Mount {
            fs_type: self.fs_type.clone(),
            mount_source: self.source.clone(),
            target: target.into(),
            source,
        })
    }

    fn try_mount(&self, target: &Path, parsed: &Parsed) -> io::Result<()> {
        if parsed.flags.contains(MsFlags::MS_BIND) {
            return parsed.as_bind().attach(Path::new(&self.source), target);
        }
        if parsed.data.join(",").len() > DATA_MAX && self.fs_type == "overlay" {
            return self.mount_from_common_dir(target, parsed);
        }
        let (source, fs_type, data) = (self.source.as_str(), self.fs_type.as_str(), parsed.data.join(","));
        Ok(mount(Some(source), target, Some(fs_type), parsed.flags, Some(data.as_str()))?)
    }

    /// An image of many layers has more `lowerdir` than fits into a page. They are named relative to
    /// the directory that they have in common, by a thread with a working directory of its own.
    fn mount_from_common_dir(&self, target: &Path, parsed: &Parsed) -> io::Result<()> {
        let too_long = || io::Error::new(io::ErrorKind::ArgumentListTooLong, "too many lower directories");
        let (dir, data) = relative_lower_dirs(&parsed.data).ok_or_else(too_long)?;
        if data.len() >= 4096 {
            return Err(too_long());
        }
        let (source, fs_type, flags) = (self.source.clone(), self.fs_type.clone(), parsed.flags);
        let target = target.to_owned();
        let worker = thread::spawn(move || -> io::Result<()> {
            unshare(CloneFlags::CLONE_FS)?;
            chdir(&dir)?;
            Ok(mount(Some(source.as_str()), &target, Some(fs_type.as_str()), flags, Some(data.as_str()))?)
        });
        worker.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    }

    fn parse(&self) -> Result<Parsed, RootfsError> {
        let mut parsed = Parsed {
            flags: MsFlags::empty(),
            recursively_read_only: false,
            follow_host: false,
            data: Vec::new(),
        };
        match self.fs_type.as_str() {
            "bind" => parsed.flags |= MsFlags::MS_BIND,
            "rbind" => parsed.flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            _ => {}
        }
        for option in self.options.iter().map(|option| option.trim()) {
            if let Some((_, set, flag)) = FLAGS.iter().find(|(name, ..)| *name == option) {
                parsed.flags.set(*flag, *set);
            } else if FOLLOW_HOST.contains(&option) {
                parsed.follow_host = true;
            } else if KEEP_APART.contains(&option) {
                parsed.follow_host = false;
            } else if option == "rro" {
                parsed.recursively_read_only = true;
            } else if let Some(reason) = refusal(option) {
                let (option, source_path) = (option.to_owned(), self.source.clone());
                return Err(RootfsError::Option { option, source_path, reason });
            } else if !option.is_empty() {
                parsed.data.push(option.to_owned());
            }
        }
        if let (true, Some(option)) = (parsed.flags.contains(MsFlags::MS_BIND), parsed.data.first()) {
            return Err(RootfsError::Option {
                option: option.clone(),
                source_path: self.source.clone(),
                reason: "a bind mount takes flags only",
            });
        }
        Ok(parsed)
    }
}

fn refusal(option: &str) -> Option<&'static str> {
    let name = option.split_once('=').map_or(option, |(name, _)| name);
    match name {
        "idmap" | "ridmap" | "uidmap" | "gidmap" => Some("mounts with mapped ids are not supported yet"),
        "shared" | "rshared" => Some("what a guest mounts cannot propagate to the host"),
        "remount" => Some("a rootfs is mounted, not remounted"),
        "loop" => Some("loop devices are not used: give the file as the source of its file system type"),
        _ if name.starts_with("X-containerd.") => Some("it is meant for a newer containerd's mount manager"),
        _ => None,
    }
}

impl Parsed {
    fn as_bind(&self) -> Bind {
        let attributes = [
            (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
            (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
            (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
            (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
            (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        ];
        let set = attributes.iter().filter(|(flag, _)| self.flags.contains(*flag));
        Bind {
            recursive: self.flags.contains(MsFlags::MS_REC),
            attributes: set.fold(0, |all, (_, attribute)| all | attribute),
            recursive_attributes: if self.recursively_read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
            follow_host: self.follow_host,
        }
    }
}

/// The directory that all lower directories have in common, and the data with them relative to it.
pub(super) fn relative_lower_dirs(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let first = dirs.first()?;
    let common = first.ancestors().skip(1).find(|a| dirs.iter().all(|dir| dir.starts_with(a) && dir != a))?;
    let relative: Option<Vec<&str>> =
        dirs.iter().map(|dir| dir.strip_prefix(common).ok()?.to_str()).collect();
    let lower = format!("lowerdir={}", relative?.join(":"));
    let options = data.iter().map(|option| if option.starts_with("lowerdir=") { &lower } else { option });
    Some((fs::canonicalize(common).ok()?, options.cloned().collect::<Vec<_>>().join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(options: &[&str]) -> HostMount {
        HostMount {
            fs_type: "bind".into(),
            source: "/a".into(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn flags_are_told_from_data_and_the_last_word_counts() {
        let mount = HostMount {
            fs_type: "overlay".into(),
            source: "overlay".into(),
            options: ["ro", "nosuid", "rw", "index=off", "lowerdir=/a:/b", "rslave"].map(String::from).into(),
        };
        let parsed = mount.parse().unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID);
        assert!(parsed.follow_host);
        assert_eq!(parsed.data, ["index=off", "lowerdir=/a:/b"]);
    }

    #[test]
    fn bind_is_a_type_or_an_option() {
        let expected = MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY;
        assert_eq!(bind(&["rbind", "ro"]).parse().unwrap().flags, expected);
        let none = HostMount { fs_type: "none".into(), ..bind(&["rbind"]) };
        assert!(none.is_bind());
        assert!(bind(&["rro"]).parse().unwrap().recursively_read_only);
    }

    #[test]
    fn an_option_that_cannot_be_honoured_is_refused_by_name() {
        for option in ["uidmap=0:1:2", "X-containerd.mkfs.fs=ext4", "loop", "remount", "size=1m", "rshared"] {
            let error = bind(&[option]).check().unwrap_err().to_string();
            assert!(error.contains(option), "{error}");
        }
    }

    #[test]
    fn lower_directories_are_named_from_what_they_have_in_common() {
        let data = ["lowerdir=/usr/bin:/usr/lib:/usr", "upperdir=/u"].map(String::from);
        let (dir, text) = relative_lower_dirs(&data).unwrap();
        assert_eq!(
            (dir.as_path(), text.as_str()),
            (Path::new("/"), "lowerdir=usr/bin:usr/lib:usr,upperdir=/u")
        );
        let data = ["lowerdir=/usr/bin:/usr/sbin"].map(String::from);
        let (dir, text) = relative_lower_dirs(&data).unwrap();
        assert_eq!((dir.as_path(), text.as_str()), (Path::new("/usr"), "lowerdir=bin:sbin"));
    }
}
