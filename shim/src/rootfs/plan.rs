//! From a container's mounts to what is done on the host and what the guest is told.

use std::{
    fs::{self, FileType, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    HostMount, RootfsError, Share,
    block::{BlockRequest, Layers},
    share::GUEST_SHARE,
};
use crate::{device, vmm::Disk};

/// File systems that are taken as a disk, from a block device or from a file. The guest needs the
/// file system's module: the image of `build-guest` has those of ext4 and erofs.
const BLOCK_TYPES: [&str; 5] = ["ext4", "ext3", "xfs", "btrfs", "erofs"];

/// File systems that are mounted on the host and shared.
const SHARED_TYPES: [&str; 5] = ["bind", "rbind", "overlay", "tmpfs", "none"];

/// The root file system of a container.
#[derive(Debug, Clone)]
pub enum Rootfs {
    /// Mounted on the host, one after the other, and shared.
    Shared(Vec<HostMount>),
    /// A disk of the VM; it has to be there when the VM boots.
    Block {
        /// The disk.
        serial: String,
        /// Block device or file.
        path: PathBuf,
        /// What the guest mounts it as.
        fs_type: String,
        /// Options for the guest's mount.
        options: Vec<String>,
    },
    /// Packed into disks of the VM.
    Packed {
        /// What is packed.
        layers: Layers,
        /// How.
        request: BlockRequest,
    },
}

/// How the rootfs that a [`Plan`] describes reaches the guest, once it was made.
#[derive(Debug, Clone, Default)]
pub struct Prepared {
    /// The mounts that the agent makes, for `CreateTaskRequest.rootfs`.
    pub guest_mounts: Vec<Mount>,
    /// The disks that the VM must boot with.
    pub disks: Vec<Disk>,
}

/// A bind mount of the spec whose source is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Index of the mount in the spec.
    pub index: usize,
    /// What is mounted in the share.
    pub mount: HostMount,
}

/// What a container needs of the host's file systems. Made and checked before anything is done.
#[derive(Debug, Clone)]
pub struct Plan {
    id: String,
    /// The root file system.
    pub rootfs: Rootfs,
    /// The volumes, in the order of the spec.
    pub volumes: Vec<Volume>,
    /// Bind mounts of what the guest has itself, `/dev/null` over a file for example: index in the spec, and
    /// its path in the guest.
    own_devices: Vec<(usize, &'static str)>,
}

/// What a mount of the spec is.
enum Bound {
    Volume(Volume),
    Device(usize, &'static str),
}

impl Plan {
    /// Looks at `mounts` of containerd's Create and at the bind mounts in `spec`, the contents of
    /// config.json. Without mounts, the rootfs is already in `bundle`, where runc would find it.
    /// With `packing`, directories become disks. Changes nothing.
    pub fn new(
        id: &str,
        bundle: &Path,
        mounts: &[Mount],
        spec: &Value,
        packing: Option<BlockRequest>,
    ) -> Result<Plan, RootfsError> {
        check_id(id)?;
        let mut rootfs = match mounts {
            [mount] if BLOCK_TYPES.contains(&mount.type_.as_str()) => block(id, mount)?,
            [] => Rootfs::Shared(vec![bundle_rootfs(bundle, spec)]),
            mounts => Rootfs::Shared(mounts.iter().map(shared).collect::<Result<_, _>>()?),
        };
        if let Rootfs::Shared(mounts) = &rootfs {
            for mount in mounts.iter().filter(|mount| mount.is_bind()) {
                metadata(&mount.source, || "the rootfs".into())?;
            }
            if let Some(request) = packing {
                rootfs = Rootfs::Packed { layers: Layers::of(mounts)?, request };
            }
        }
        let mounts = spec["mounts"].as_array().into_iter().flatten().enumerate();
        let (mut volumes, mut own_devices) = (Vec::new(), Vec::new());
        for (index, mount) in mounts {
            match bound(index, mount)? {
                Some(Bound::Volume(volume)) => volumes.push(volume),
                Some(Bound::Device(index, path)) => own_devices.push((index, path)),
                None => {}
            }
        }
        Ok(Plan { id: id.into(), rootfs, volumes, own_devices })
    }

    /// Whether the VM needs a virtiofs device for this container.
    pub fn needs_share(&self) -> bool {
        matches!(self.rootfs, Rootfs::Shared(_)) || !self.volumes.is_empty()
    }

    /// Makes on the host what the guest is to see. On an error nothing stays mounted; disks are for
    /// [`SandboxDisks`](super::block::SandboxDisks) to remove. Blocks, for minutes if it packs.
    pub fn prepare(&self, run_dir: &Path, share: &Share) -> Result<Prepared, RootfsError> {
        self.try_prepare(run_dir, share).inspect_err(|_| {
            if let Err(error) = share.remove_container(&self.id) {
                let error: &(dyn std::error::Error + 'static) = &error;
                tracing::warn!(error, container = self.id, "mounts of a failed create stay");
            }
        })
    }

    fn try_prepare(&self, run_dir: &Path, share: &Share) -> Result<Prepared, RootfsError> {
        self.volumes.iter().try_for_each(|volume| {
            share.mount(&self.volume_dir(volume), std::slice::from_ref(&volume.mount))
        })?;
        let (mount, disks) = match &self.rootfs {
            Rootfs::Shared(mounts) => {
                share.mount(&self.rootfs_dir(), mounts)?;
                (guest_mount("bind", guest_path(&self.rootfs_dir()), &["rbind".into()]), Vec::new())
            }
            Rootfs::Block { serial, path, fs_type, options } => {
                let read_only = fs_type == "erofs" || options.iter().any(|option| option == "ro");
                let disk = Disk { path: path.clone(), serial: serial.clone(), read_only };
                (guest_mount(fs_type, format!("serial:{serial}"), options), vec![disk])
            }
            Rootfs::Packed { layers, request } => layered(request.disks(run_dir, &self.id, layers)?),
        };
        Ok(Prepared { guest_mounts: vec![mount], disks })
    }

    /// Points the bind mounts of `spec`, the one that the plan was made from, to where the guest
    /// finds their sources. Device nodes below a volume are the host's, and would open another device, or
    /// none, in the guest: there are none.
    pub fn rewrite_spec(&self, spec: &mut Value) {
        let mut mount = |index, source: &str, without: Option<&str>| {
            let Some(mount) = spec.get_mut("mounts").and_then(|mounts| mounts.get_mut(index)) else { return };
            mount["source"] = source.into();
            if let (Some(option), Some(options)) = (without, mount["options"].as_array_mut()) {
                options.push(option.into());
            } else if let Some(option) = without {
                mount["options"] = vec![option].into();
            }
        };
        for volume in &self.volumes {
            mount(volume.index, &guest_path(&self.volume_dir(volume)), Some("rnodev"));
        }
        for (index, path) in &self.own_devices {
            mount(*index, path, None);
        }
    }

    fn rootfs_dir(&self) -> PathBuf {
        Path::new(&self.id).join("rootfs")
    }

    fn volume_dir(&self, volume: &Volume) -> PathBuf {
        Path::new(&self.id).join("mounts").join(volume.index.to_string())
    }
}

/// Refuses an id that would name something else than a directory of its own.
pub(super) fn check_id(id: &str) -> Result<(), RootfsError> {
    let mut parts = Path::new(id).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) if name == id => Ok(()),
        _ => Err(RootfsError::Id(id.into())),
    }
}

fn guest_path(relative: &Path) -> String {
    Path::new(GUEST_SHARE).join(relative).to_string_lossy().into_owned()
}

fn guest_mount(fs_type: &str, source: String, options: &[String]) -> Mount {
    Mount { type_: fs_type.into(), source, options: options.to_vec(), ..Mount::default() }
}

/// Packed layers alone, or below a disk to write to.
fn layered((image, writable): (Disk, Option<Disk>)) -> (Mount, Vec<Disk>) {
    let serial = |disk: &Disk| format!("serial:{}", disk.serial);
    match writable {
        None => (guest_mount("erofs", serial(&image), &["ro".into()]), vec![image]),
        Some(writable) => {
            let options = [format!("lowerdir={}", serial(&image)), format!("upperdir={}", serial(&writable))];
            (guest_mount("overlay", "overlay".into(), &options), vec![image, writable])
        }
    }
}

fn bundle_rootfs(bundle: &Path, spec: &Value) -> HostMount {
    let path = spec["root"]["path"].as_str().unwrap_or("rootfs");
    HostMount {
        fs_type: "bind".into(),
        source: bundle.join(path).to_string_lossy().into_owned(),
        options: vec!["rbind".into()],
    }
}

fn shared(mount: &Mount) -> Result<HostMount, RootfsError> {
    let unsupported = |hint| RootfsError::Unsupported {
        what: format!("a rootfs mount of type {:?} from {:?}", mount.type_, mount.source),
        hint,
    };
    if !mount.target.is_empty() {
        return Err(unsupported("only mounts of a whole rootfs are, not those below it"));
    }
    let host = HostMount {
        fs_type: mount.type_.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    };
    if !SHARED_TYPES.contains(&mount.type_.as_str()) || (mount.type_ == "none" && !host.is_bind()) {
        return Err(unsupported("use a snapshotter that gives overlay or bind mounts, or one block device"));
    }
    host.check()?;
    Ok(host)
}

fn block(id: &str, mount: &Mount) -> Result<Rootfs, RootfsError> {
    let what = || format!("the {} rootfs", mount.type_);
    let kind = metadata(&mount.source, what)?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(RootfsError::Unsupported {
            what: format!("a rootfs of type {:?} from {:?}", mount.type_, mount.source),
            hint: "the source must be a block device or a file",
        });
    }
    // A file needs no loop device here.
    let options = mount.options.iter().filter(|option| *option != "loop").cloned().collect();
    let path = fs::canonicalize(&mount.source).map_err(|source| RootfsError::Source {
        path: mount.source.clone().into(),
        what: what(),
        source,
    })?;
    Ok(Rootfs::Block { serial: serial(id, "rootfs"), path, fs_type: mount.type_.clone(), options })
}

/// The serial of container `id`'s disk for `role`. virtio-blk has 20 bytes for one, ids are longer.
pub(super) fn serial(id: &str, role: &str) -> String {
    let hash = Sha256::digest(format!("{role}\0{id}"));
    hash.iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// What a mount of the spec binds, if it does.
fn bound(index: usize, mount: &Value) -> Result<Option<Bound>, RootfsError> {
    let text = |key: &str| mount[key].as_str().unwrap_or("").to_owned();
    let options = mount["options"].as_array().into_iter().flatten();
    let options: Vec<String> = options.filter_map(|option| option.as_str().map(str::to_owned)).collect();
    if text("type") != "bind" && !options.iter().any(|option| option == "bind" || option == "rbind") {
        return Ok(None);
    }
    let (source, target) = (text("source"), text("destination"));
    let found = metadata(&source, || format!("the volume {target}"))?;
    let kind = found.file_type();
    let number = (u64::from(libc::major(found.rdev())), u64::from(libc::minor(found.rdev())));
    if let (true, Some(path)) = (kind.is_char_device(), device::in_guest(false, number.0, number.1)) {
        return Ok(Some(Bound::Device(index, path)));
    }
    if let Some((what, hint)) = foreign(&found, kind) {
        let what = format!("the volume {target} from {source:?}, which is {what},");
        return Err(RootfsError::Unsupported { what, hint });
    }
    // Of its options, the host takes those that protect it and those that need it; the guest gets all.
    let kept = ["rbind", "bind", "ro", "rro", "rw", "slave", "rslave", "shared", "rshared"];
    let kept = options.into_iter().filter(|option| kept.contains(&option.as_str())).collect();
    let mount = HostMount { fs_type: "bind".into(), source, options: kept };
    mount.check()?;
    Ok(Some(Bound::Volume(Volume { index, mount })))
}

/// What cannot be a volume because its other side is the host's kernel: what it is, and what to do.
fn foreign(found: &Metadata, kind: FileType) -> Option<(&'static str, &'static str)> {
    if kind.is_socket() {
        let hint = "who listens is on the host, where a guest does not get to. Run the server in the container \
                    or its pod, or leave the volume out";
        return Some(("a socket", hint));
    }
    if kind.is_fifo() {
        let hint = "a FIFO has two ends in one kernel only. Use stdin and stdout of the container, or a file";
        return Some(("a FIFO", hint));
    }
    if kind.is_block_device() || kind.is_char_device() {
        let hint = "the device is the host's. Of devices, null, zero, full, random, urandom, kmsg, tty, console, \
                    ptmx, net/tun and fuse can be bound, which the guest has itself";
        return Some(("a device", hint));
    }
    // devtmpfs is one file system, wherever it is looked at; /dev/shm and its like are others.
    let device_of = |path: &str| fs::metadata(path).map(|found| found.dev()).ok();
    let devices = device_of("/dev").filter(|device| Some(*device) != device_of("/"));
    if kind.is_dir() && devices == Some(found.dev()) {
        let hint = "they are the host's. The container has a /dev of its own; single nodes of it, null for \
                    example, can be bound";
        return Some(("a directory of devices", hint));
    }
    None
}

/// What `source`, an absolute path, is.
fn metadata(source: &str, what: impl FnOnce() -> String) -> Result<Metadata, RootfsError> {
    let path = Path::new(source);
    let found = match path.is_absolute() {
        true => fs::metadata(path),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not an absolute path")),
    };
    found.map_err(|source| RootfsError::Source { path: path.into(), what: what(), source })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mount(fs_type: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: fs_type.into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Mount::default()
        }
    }

    fn spec(volumes: &[(&str, &str)]) -> Value {
        let mut mounts = vec![json!({"destination": "/proc", "type": "proc", "source": "proc"})];
        mounts.extend(volumes.iter().map(|(source, destination)| {
            let options = ["rbind", "ro", "nosuid"];
            json!({"destination": destination, "type": "bind", "source": source, "options": options})
        }));
        json!({"ociVersion": "1.2.0", "mounts": mounts})
    }

    fn plan(mounts: &[Mount], spec: &Value) -> Result<Plan, RootfsError> {
        Plan::new("c1", Path::new("/tmp"), mounts, spec, None)
    }

    #[test]
    fn an_overlay_is_shared_and_bound_in_the_guest() {
        let overlay = mount("overlay", "overlay", &["index=off", "lowerdir=/a"]);
        let plan = plan(&[overlay], &spec(&[])).unwrap();
        assert!(plan.needs_share() && matches!(plan.rootfs, Rootfs::Shared(_)));
    }

    #[test]
    fn without_mounts_the_bundle_has_the_rootfs() {
        let bundle = tempfile::tempdir().unwrap();
        let error = Plan::new("c1", bundle.path(), &[], &spec(&[]), None).unwrap_err();
        assert!(matches!(&error, RootfsError::Source { path, .. } if path.ends_with("rootfs")), "{error}");
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        let plan = Plan::new("c1", bundle.path(), &[], &spec(&[]), None).unwrap();
        let Rootfs::Shared(mounts) = plan.rootfs else { panic!("{plan:?}") };
        assert_eq!(Path::new(&mounts[0].source), bundle.path().join("rootfs"));
    }

    #[test]
    fn a_file_system_in_a_file_is_a_disk_and_needs_no_virtiofsd() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let plan = plan(&[mount("ext4", path, &["loop", "ro", "noatime"])], &spec(&[])).unwrap();
        assert!(!plan.needs_share());
        let run_dir = tempfile::tempdir().unwrap();
        let prepared = plan.prepare(run_dir.path(), &Share::of(run_dir.path())).unwrap();
        let disk = &prepared.disks[0];
        assert!(disk.read_only && disk.serial.len() == 20 && disk.serial.is_ascii());
        let guest = &prepared.guest_mounts[0];
        assert_eq!(guest.source, format!("serial:{}", disk.serial));
        assert_eq!(guest.options, ["ro", "noatime"]);
    }

    #[test]
    fn volumes_are_found_and_the_spec_points_to_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().to_str().unwrap();
        let mut spec = spec(&[(source, "/data")]);
        let plan = plan(&[mount("overlay", "overlay", &[])], &spec).unwrap();
        let kept = ["rbind".to_owned(), "ro".to_owned()];
        assert_eq!((plan.volumes[0].index, &plan.volumes[0].mount.options[..]), (1, &kept[..]));
        plan.rewrite_spec(&mut spec);
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(spec["mounts"][1]["source"], "/run/cube/shared/c1/mounts/1");
        // What is a device on the host is another one in the guest, or none.
        assert_eq!(spec["mounts"][1]["options"], json!(["rbind", "ro", "nosuid", "rnodev"]));
    }

    #[test]
    fn a_file_is_masked_with_the_guests_own_null_device() {
        let mut spec = spec(&[("/dev/null", "/etc/secret"), ("/dev/urandom", "/srv/random")]);
        let plan = plan(&[mount("ext4", "/dev/null", &[])], &spec);
        assert!(plan.is_err(), "a rootfs is no device");
        let file = tempfile::NamedTempFile::new().unwrap();
        let plan = self::plan(&[mount("ext4", file.path().to_str().unwrap(), &[])], &spec).unwrap();
        assert!(plan.volumes.is_empty() && !plan.needs_share());
        plan.rewrite_spec(&mut spec);
        assert_eq!(spec["mounts"][1]["source"], "/dev/null");
        assert_eq!(spec["mounts"][1]["options"], json!(["rbind", "ro", "nosuid"]));
        assert_eq!(spec["mounts"][2]["source"], "/dev/urandom");
    }

    #[test]
    fn what_has_its_other_side_in_the_hosts_kernel_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        nix::unistd::mkfifo(Path::new(&path("fifo")), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let node = nix::sys::stat::SFlag::S_IFCHR;
        let kvm = nix::sys::stat::makedev(10, 232);
        nix::sys::stat::mknod(Path::new(&path("kvm")), node, nix::sys::stat::Mode::S_IRUSR, kvm).unwrap();
        for (name, words) in [
            ("socket", ["a socket", "Run the server in the container"]),
            ("fifo", ["a FIFO", "Use stdin and stdout"]),
            ("kvm", ["a device", "null, zero"]),
        ] {
            let error = plan(&[mount("overlay", "overlay", &[])], &spec(&[(&path(name), "/v")])).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(&path(name)) && words.iter().all(|word| error.contains(word)), "{error}");
        }
        // Of a host whose /dev is a file system of its own.
        let dev = |path: &str| fs::metadata(path).unwrap().dev();
        if dev("/dev") != dev("/") {
            let error =
                plan(&[mount("overlay", "overlay", &[])], &spec(&[("/dev", "/host/dev")])).unwrap_err();
            assert!(error.to_string().contains("a directory of devices"), "{error}");
        }
    }

    #[test]
    fn what_cannot_cross_into_a_vm_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let overlay = || mount("overlay", "overlay", &[]);
        let with_target = Mount { target: "sub".into(), ..overlay() };
        for (mounts, spec, named) in [
            (vec![mount("nfs", "host:/x", &[])], spec(&[]), "nfs"),
            (vec![mount("ext4", "/nonexistent", &[])], spec(&[]), "/nonexistent"),
            (vec![mount("ext4", "/dev/null", &[])], spec(&[]), "/dev/null"),
            (vec![mount("erofs", "/etc/passwd", &[]), overlay()], spec(&[]), "erofs"),
            (vec![with_target], spec(&[]), "overlay"),
            (vec![mount("overlay", "overlay", &["uidmap=0:0:1"])], spec(&[]), "uidmap"),
            (vec![overlay()], spec(&[(socket.to_str().unwrap(), "/s")]), "a.sock"),
            (vec![overlay()], spec(&[("/nonexistent/v", "/v")]), "/nonexistent/v"),
            (vec![overlay()], spec(&[("relative", "/v")]), "relative"),
        ] {
            let error = plan(&mounts, &spec).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn an_id_cannot_lead_out_of_the_share() {
        for id in ["", ".", "..", "../x", "a/b", "/a", "a/"] {
            assert!(
                matches!(Plan::new(id, Path::new("/"), &[], &spec(&[]), None), Err(RootfsError::Id(_))),
                "{id:?}"
            );
        }
    }

    #[test]
    fn a_plan_that_fails_half_way_leaves_nothing_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let share = Share::of(dir.path());
        share.prepare().unwrap();
        fs::create_dir(dir.path().join("good")).unwrap();
        let good = dir.path().join("good");
        let overlay = mount("overlay", "overlay", &["lowerdir=/nonexistent/layer"]);
        let bind = mount("bind", good.to_str().unwrap(), &["rbind"]);
        let plan = plan(&[bind, overlay], &spec(&[])).unwrap();
        let error = plan.prepare(dir.path(), &share).unwrap_err();
        assert!(matches!(error, RootfsError::Mount { .. }), "{error}");
        assert!(!share.dir().join("c1").exists());
        share.remove().unwrap();
    }
}
