//! The configuration file, `/etc/cube/config.toml`.
//!
//! `docs/configuration.md` describes every key for operators; a key that is not known is an error.

mod limits;
mod policy;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use self::{limits::Limits, policy::Policy};
use crate::files;

/// Where the configuration is read from when nothing else names a file.
pub const DEFAULT_PATH: &str = "/etc/cube/config.toml";

/// Environment variable that names another configuration file.
pub const PATH_VARIABLE: &str = "CUBE_CONFIG";

/// The value of `log.dir` that puts logs into the containers' bundles.
const BUNDLE: &str = "bundle";

/// The whole file. Every key has a default, so an empty or absent file is valid.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which VMM runs the sandboxes.
    pub vmm: VmmChoice,
    /// Where sockets, mounts and state files of running sandboxes are. Lost at reboot, mode 0700.
    pub run_dir: PathBuf,
    /// What the guest boots.
    pub guest: Guest,
    /// Size of a VM whose spec and annotations do not say.
    pub vm: Vm,
    /// Programs that the shim runs: names to look for on `PATH`, or absolute paths.
    pub tools: Tools,
    /// Logs of containers.
    pub log: Log,
    /// Disks of sandboxes whose rootfs is packed.
    pub rootfs: Rootfs,
    /// Snapshots of sandboxes.
    pub snapshot: Snapshot,
    /// What the authors of pods may ask for.
    pub policy: Policy,
    /// What a sandbox may take of its host.
    pub limits: Limits,
    /// Users of the host that VMMs and their helpers run as.
    pub users: Users,
}

/// The `vmm` key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmChoice {
    /// Cloud Hypervisor if it is installed and KVM can run a virtual CPU, else QEMU.
    Auto,
    /// Cloud Hypervisor, or an error.
    CloudHypervisor,
    /// QEMU: with KVM if that works, else emulated.
    Qemu,
    /// No VM: the agent in fresh namespaces of the host. For tests and benchmarks; isolates nothing
    /// that namespaces do not isolate.
    Process,
}

/// The `[guest]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guest {
    /// Compressed kernel for QEMU.
    pub kernel: PathBuf,
    /// Uncompressed ELF kernel with a PVH entry for Cloud Hypervisor.
    pub vmlinux: PathBuf,
    /// Initramfs with cube-agent as /init.
    pub initrd: PathBuf,
    /// Appended to the kernel command line.
    pub cmdline: String,
}

/// The `[vm]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// Virtual CPUs, 1 to 255.
    pub vcpus: u32,
    /// Memory in MiB, at least 64.
    pub memory_mib: u64,
}

/// The `[tools]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tools {
    /// The Cloud Hypervisor VMM.
    pub cloud_hypervisor: PathBuf,
    /// The QEMU system emulator.
    pub qemu: PathBuf,
    /// Exports directories to a VM.
    pub virtiofsd: PathBuf,
    /// Hybrid vsock for QEMU.
    pub vhost_device_vsock: PathBuf,
    /// cube-agent for the `process` backend.
    pub agent: PathBuf,
    /// Packs a rootfs, of erofs-utils.
    pub mkfs_erofs: PathBuf,
    /// Makes the disk that a sandbox writes to, of e2fsprogs.
    pub mke2fs: PathBuf,
}

/// The `[log]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A directory, or the word `bundle` for the container's bundle.
    pub dir: PathBuf,
    /// A directory of its own for the logs of template builds.
    pub template_dir: PathBuf,
    /// Size in bytes at which a segment is closed; at least 64 KiB.
    pub segment_bytes: u64,
    /// Segments kept per stream, the one being written included; at least 2.
    pub segments: u32,
    /// How long the log of a deleted container is kept, in hours.
    pub retention_hours: u64,
    /// Bytes beyond which logs of deleted containers are removed before that, the oldest first.
    pub total_limit: u64,
    /// Whether containers of pods have logs, beside those that kubelet keeps.
    pub pods: bool,
}

/// The `[rootfs]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rootfs {
    /// Packed images, and the disks of sandboxes: outlives a reboot, so not on a tmpfs. Mode 0700.
    pub cache_dir: PathBuf,
    /// Size in bytes beyond which packed images that no sandbox uses are removed; at least 1.
    pub cache_limit: u64,
    /// Bytes that the files of an image may have together which is packed, holes counted in; at least 1.
    pub image_limit: u64,
}

/// The `[snapshot]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snapshot {
    /// The snapshot store: as large as the memory of the sandboxes, so not on a tmpfs. Mode 0700. On the
    /// file system of `rootfs.cache_dir`, packed layers are shared, and disks where it can share blocks.
    pub dir: PathBuf,
    /// Bytes of data that a snapshot may have that is imported; at least 1.
    pub import_limit: u64,
}

/// The `[users]` table: a range of numbers, as users and groups, that nothing else on the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Users {
    /// The first number: the group of all VMMs. The users follow.
    pub first: u32,
    /// How many numbers: two for each sandbox that lives at the same time, and one.
    pub count: u32,
}

impl Users {
    /// How many sandboxes can live at the same time.
    pub(crate) fn pairs(self) -> u32 {
        self.count.saturating_sub(1) / 2
    }

    /// The first number of a pair.
    pub(crate) fn first_of_pair(self, pair: u32) -> u32 {
        self.first + 1 + 2 * pair
    }
}

impl Default for Users {
    /// Behind those that systemd gives to containers, and below what is negative for some.
    fn default() -> Self {
        Users { first: 1_900_000_000, count: 100_001 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            vmm: VmmChoice::Auto,
            run_dir: "/run/cube".into(),
            guest: Guest::default(),
            vm: Vm::default(),
            tools: Tools::default(),
            log: Log::default(),
            rootfs: Rootfs::default(),
            snapshot: Snapshot::default(),
            policy: Policy::default(),
            limits: Limits::default(),
            users: Users::default(),
        }
    }
}

impl Default for Snapshot {
    fn default() -> Self {
        Snapshot { dir: "/var/lib/cube/snapshots".into(), import_limit: 64 << 30 }
    }
}

impl Default for Guest {
    fn default() -> Self {
        Guest {
            kernel: "/usr/share/cube/guest/vmlinuz".into(),
            vmlinux: "/usr/share/cube/guest/vmlinux".into(),
            initrd: "/usr/share/cube/guest/initrd.img".into(),
            cmdline: String::new(),
        }
    }
}

impl Default for Vm {
    fn default() -> Self {
        Vm { vcpus: 1, memory_mib: 256 }
    }
}

impl Default for Tools {
    fn default() -> Self {
        Tools {
            cloud_hypervisor: "cloud-hypervisor".into(),
            qemu: "qemu-system-x86_64".into(),
            virtiofsd: "virtiofsd".into(),
            vhost_device_vsock: "vhost-device-vsock".into(),
            agent: "cube-agent".into(),
            mkfs_erofs: "mkfs.erofs".into(),
            mke2fs: "mke2fs".into(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Log {
            dir: "/var/log/cube".into(),
            template_dir: "/data/log/template".into(),
            segment_bytes: 16 << 20,
            segments: 4,
            retention_hours: 24,
            total_limit: 1 << 30,
            pods: true,
        }
    }
}

impl Default for Rootfs {
    fn default() -> Self {
        Rootfs { cache_dir: "/var/lib/cube/rootfs".into(), cache_limit: 10 << 30, image_limit: 64 << 30 }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or value that is not known.
    #[error("the configuration file {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: Box<toml::de::Error>,
    },
    /// A directory that is nowhere.
    #[error(
        "{key} is {value} in the configuration file {path}, which leads nowhere: a link or .. in it has no target"
    )]
    Directory {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: &'static str,
        /// The value found.
        value: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A value is outside of its range.
    #[error("{key} is {value} in the configuration file {path}: it must be {rule}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: &'static str,
        /// The value found.
        value: String,
        /// What is allowed.
        rule: &'static str,
    },
}

impl Config {
    /// Reads the file that `explicit` names, else the one that [`PATH_VARIABLE`] names, else
    /// [`DEFAULT_PATH`]. Only the last may be absent.
    pub fn load(explicit: Option<&Path>) -> Result<Config, ConfigError> {
        let named = explicit.map(Path::to_owned).or_else(|| std::env::var_os(PATH_VARIABLE).map(Into::into));
        let path = named.clone().unwrap_or_else(|| DEFAULT_PATH.into());
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if named.is_none() && e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        Config::parse(&text, &path)
    }

    /// Parses and checks `text`, the contents of `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let mut config: Config = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.resolve(path)?;
        config.check(path)?;
        Ok(config)
    }

    /// Gives every directory the path that has neither links nor `..`: once and for all, so that it is the same text
    /// in state files, in command lines and in the kernel's tables.
    fn resolve(&mut self, path: &Path) -> Result<(), ConfigError> {
        let in_bundle = self.log.dir.as_os_str() == BUNDLE;
        let dirs = [
            ("run_dir", Some(&mut self.run_dir)),
            ("rootfs.cache_dir", Some(&mut self.rootfs.cache_dir)),
            ("snapshot.dir", Some(&mut self.snapshot.dir)),
            ("log.template_dir", Some(&mut self.log.template_dir)),
            ("log.dir", Some(&mut self.log.dir).filter(|_| !in_bundle)),
        ];
        for (key, dir) in dirs.into_iter().filter_map(|(key, dir)| Some((key, dir?))) {
            if !dir.is_absolute() {
                let (path, value, rule) = (path.into(), format!("{dir:?}"), "an absolute path");
                return Err(ConfigError::Range { path, key, value, rule });
            }
            match files::canonical(dir) {
                Ok(found) => *dir = found,
                // Who may not look there may not change anything there, either.
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {}
                Err(source) => {
                    return Err(ConfigError::Directory {
                        path: path.into(),
                        key,
                        value: dir.clone(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let must = |key, value: String, valid, rule| {
            if valid { Ok(()) } else { Err(ConfigError::Range { path: path.into(), key, value, rule }) }
        };
        let range = |key, value: u64, valid, rule| must(key, value.to_string(), valid, rule);
        let Config { vm, log, rootfs, snapshot, policy, limits, users, .. } = self;
        // A log below log.dir would be taken for that of a container of the namespace "template".
        let apart = log.template_dir.is_absolute() && !log.template_dir.starts_with(&log.dir);
        let rule = "an absolute path outside of log.dir";
        must("log.template_dir", format!("{:?}", log.template_dir), apart, rule)?;
        let last = users.first.checked_add(users.count).is_some_and(|end| end <= i32::MAX as u32);
        range(
            "users.first",
            users.first.into(),
            users.first >= 1000 && last,
            "from 1000 to 2147483647 - users.count",
        )?;
        range("users.count", users.count.into(), users.count >= 3, "at least 3")?;
        range("vm.vcpus", vm.vcpus.into(), (1..=255).contains(&vm.vcpus), "from 1 to 255")?;
        range("vm.memory_mib", vm.memory_mib, vm.memory_mib >= 64, "at least 64")?;
        range("log.segment_bytes", log.segment_bytes, log.segment_bytes >= 64 << 10, "at least 65536")?;
        range("log.segments", log.segments.into(), log.segments >= 2, "at least 2")?;
        range("rootfs.cache_limit", rootfs.cache_limit, rootfs.cache_limit >= 1, "at least 1")?;
        range("rootfs.image_limit", rootfs.image_limit, rootfs.image_limit >= 1, "at least 1")?;
        range("snapshot.import_limit", snapshot.import_limit, snapshot.import_limit >= 1, "at least 1")?;
        if let Some(pattern) = policy.meaningless() {
            let rule =
                "a list of annotations that this version knows, or of beginnings of such with a star behind";
            must("policy.pod_annotations", format!("{pattern:?} in a list"), false, rule)?;
        }
        let vcpus = policy.max_vcpus;
        range("policy.max_vcpus", vcpus.into(), (1..=255).contains(&vcpus), "from 1 to 255")?;
        let (memory, disk) = (policy.max_memory_mib, policy.max_rootfs_mib);
        range("policy.max_memory_mib", memory, memory >= 64, "at least 64")?;
        range("policy.max_rootfs_mib", disk, disk >= 16, "at least 16")?;
        let overhead = limits.memory_overhead_mib;
        range("limits.memory_overhead_mib", overhead, overhead >= 64, "at least 64")?;
        match limits.wrong_io() {
            None => Ok(()),
            Some(line) => must("limits.io_max", format!("{line:?} in a list"), false, limits::IO_RULE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = parse("[log]\ndirectory = '/x'\n").unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("directory"), "{cause}");
    }

    #[test]
    fn a_directory_has_one_path_however_it_was_named() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("real")).unwrap();
        symlink("real", root.join("link")).unwrap();
        let config = |dir: &str| {
            let dir = format!("{}/{dir}", root.display());
            parse(&format!(
                "run_dir = '{dir}/run'\n[rootfs]\ncache_dir = '{dir}/cache'\n[snapshot]\ndir = '{dir}/s'\n\
                 [log]\ndir = '{dir}/log'\ntemplate_dir = '{dir}/templates/'\n"
            ))
        };
        let expected = config("real").unwrap();
        assert_eq!(expected.run_dir, root.join("real/run"));
        for dir in ["link", "link/../real", "real/../link/.", "real//"] {
            assert_eq!(config(dir).unwrap(), expected, "{dir}");
        }
        symlink("nowhere", root.join("dangling")).unwrap();
        for dir in ["dangling", "nowhere/../real"] {
            let error = config(dir).unwrap_err().to_string();
            assert!(error.contains("run_dir") && error.contains("leads nowhere"), "{error}");
        }
        assert_eq!(parse("[log]\ndir = 'bundle'").unwrap().log.dir, Path::new("bundle"));
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_the_rule() {
        for (text, rule) in [
            ("[log]\nsegments = 0", "at least 2"),
            ("[log]\nsegment_bytes = 0", "at least 65536"),
            ("[rootfs]\ncache_limit = 0", "at least 1"),
            ("[rootfs]\nimage_limit = 0", "at least 1"),
            ("[snapshot]\nimport_limit = 0", "at least 1"),
            ("[log]\ntemplate_dir = 'templates'", "an absolute path"),
            ("run_dir = 'run'", "an absolute path"),
            ("[rootfs]\ncache_dir = 'cache'", "an absolute path"),
            ("[snapshot]\ndir = './snapshots'", "an absolute path"),
            ("[log]\ndir = 'log'", "an absolute path"),
            ("[log]\ndir = '/l'\ntemplate_dir = '/l/template'", "outside of log.dir"),
            ("[users]\nfirst = 0", "from 1000"),
            ("[users]\nfirst = 4294967295", "from 1000"),
            ("[users]\ncount = 2", "at least 3"),
            ("[vm]\nvcpus = 0", "from 1 to 255"),
            ("[vm]\nmemory_mib = 8", "at least 64"),
            ("[limits]\nmemory_overhead_mib = 0", "at least 64"),
            ("[limits]\nio_max = ['/dev/sda wbps=1']", "8:0 rbps="),
            ("[policy]\nmax_vcpus = 0", "from 1 to 255"),
            ("[policy]\nmax_memory_mib = 63", "at least 64"),
            ("[policy]\nmax_rootfs_mib = 15", "at least 16"),
            ("[policy]\npod_annotations = ['cube.sandbox.vcpu']", "that this version knows"),
            ("[policy]\npod_annotations = ['cube.ready.*', 'cube.x*']", "\"cube.x*\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(rule), "{error}");
        }
    }
}
