//! What becomes of the files of an image's layers when they are packed.

use std::{
    ffi::CString,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, UNIX_EPOCH},
};

use containerd_shim_protos::api::Mount;
use nix::{
    libc,
    mount::{MsFlags, mount, umount},
    sys::stat::{Mode, SFlag, makedev, mknod},
    unistd::mkfifo,
};
use serde_json::json;

use crate::{
    command::start,
    direct::{Direct, spec},
    lab::Lab,
    needs::Backend,
};

/// Everything that can be told of the files of a root, but for its mount points. The number of links of
/// a directory and its size are the file system's own business.
const TELL: &str = "cd /; \
    find . -xdev ! -path './proc*' ! -path './dev*' ! -path . -type d | sort | \
        xargs stat -c '%n %a %u %g %F %Y'; \
    find . -xdev ! -path './dev*' ! -type d | sort | xargs stat -c '%N %a %u %g %h %F %t:%T %s %y'; \
    find . -xdev ! -path './dev*' -type f | sort | xargs sha256sum; \
    cube-test-writer xattr noted user.note; cube-test-writer xattr capable security.capability; \
    stat -c '%i' link-a link-b | uniq | wc -l; \
    ls gone hidden/below dir/old";

fn at(path: PathBuf, uid: u32, gid: u32, mode: u32) {
    chown(&path, Some(uid), Some(gid)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let (path, name) = (CString::new(path.as_os_str().as_bytes()).unwrap(), CString::new(name).unwrap());
    // SAFETY: the names end with a zero, and the length is that of the value.
    let set = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

fn node(path: PathBuf, kind: SFlag, mode: u32, major: u64, minor: u64) {
    mknod(&path, kind, Mode::empty(), makedev(major, minor)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

/// What a layer above takes away, by each of the ways that overlayfs has.
fn lower_layer(layer: &Path) {
    for dir in ["hidden", "dir", "kept"] {
        fs::create_dir(layer.join(dir)).unwrap();
    }
    for file in ["gone", "hidden/below", "dir/old", "kept/below", "changed"] {
        fs::write(layer.join(file), "lower\n").unwrap();
    }
}

fn upper_layer(layer: &Path) {
    for dir in ["hidden", "dir", "kept", "sticky"] {
        fs::create_dir_all(layer.join(dir)).unwrap();
    }
    // Whiteouts: linux/Documentation/filesystems/overlayfs.rst.
    node(layer.join("gone"), SFlag::S_IFCHR, 0, 0, 0);
    node(layer.join("dir/old"), SFlag::S_IFCHR, 0, 0, 0);
    set_xattr(&layer.join("hidden"), "trusted.overlay.opaque", b"y");
    for file in ["hidden/above", "kept/above", "changed", "setuid", "setgid", "large-ids", "noted", "capable"]
    {
        fs::write(layer.join(file), format!("{file}\n")).unwrap();
    }
    at(layer.join("setuid"), 1000, 2000, 0o4711);
    at(layer.join("setgid"), 0, 5, 0o2755);
    at(layer.join("large-ids"), 70_000, 4_000_000_000, 0o640);
    at(layer.join("sticky"), 12, 34, 0o1777);
    set_xattr(&layer.join("noted"), "user.note", b"of a user");
    // struct vfs_cap_data of linux/capability.h: revision 2, effective, CAP_NET_RAW permitted.
    let capability: Vec<u8> =
        [0x0200_0001_u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    set_xattr(&layer.join("capable"), "security.capability", &capability);
    fs::write(layer.join("link-a"), "linked\n").unwrap();
    fs::hard_link(layer.join("link-a"), layer.join("link-b")).unwrap();
    symlink("/changed", layer.join("symlink")).unwrap();
    symlink("no/such/file", layer.join("dangling")).unwrap();
    mkfifo(&layer.join("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
    node(layer.join("null"), SFlag::S_IFCHR, 0o666, 1, 3);
    node(layer.join("loop"), SFlag::S_IFBLK, 0o660, 7, 300);
    fs::write(layer.join("empty"), "").unwrap();
    fs::write(layer.join("large"), vec![0x5a; (3 << 20) + 17]).unwrap();
    let time = UNIX_EPOCH + Duration::new(981_173_106, 123_456_789);
    fs::File::options().write(true).open(layer.join("empty")).unwrap().set_modified(time).unwrap();
}

/// A container sees exactly what the host sees when it mounts the same layers.
pub fn files_of_all_kinds_arrive_as_the_layers_have_them(backend: Backend) {
    let lab = Lab::new(backend);
    let argv = ["sh", "-c", TELL];
    let mut direct = Direct::new(&lab, "c", &argv);
    let mut block = spec(&argv);
    block["annotations"] = json!({ "cube.rootfs.mode": "block" });
    direct.write_spec(&block);
    let lower = direct.unpack_image();
    let base = lab.dir().join("direct");
    let [upper, snapshot, work, merged] =
        ["layer-2", "snapshot", "work", "merged"].map(|name| base.join(name));
    for dir in [&upper, &snapshot, &work, &merged] {
        fs::create_dir(dir).unwrap();
    }
    lower_layer(&lower);
    upper_layer(&upper);
    let layers = format!("lowerdir={}:{}", upper.display(), lower.display());

    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::MS_RDONLY, Some(layers.as_str())).unwrap();
    let mut chroot = Command::new("chroot");
    chroot.arg(&merged).args(["/bin/env", "-i", "PATH=/bin:/usr/bin"]).args(argv);
    let expected = start(&mut chroot).wait(lab.limit());
    umount(&merged).unwrap();
    assert!(expected.out().contains("./setuid") && expected.err().contains("gone"), "{expected}");

    let upper_dir = format!("upperdir={}", snapshot.display());
    let options = vec!["index=off".into(), layers, upper_dir, format!("workdir={}", work.display())];
    let rootfs = Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() };
    direct.start_shim();
    direct.create(vec![rootfs]).unwrap();
    direct.start().unwrap();
    assert_eq!(direct.wait().unwrap(), expected.code().cast_unsigned());
    direct.delete().unwrap();
    let told = |stream: &str| fs::read_to_string(lab.log_dir("c").join(stream)).unwrap();
    for (line, (seen, wanted)) in told("stdout").lines().zip(expected.out().lines()).enumerate() {
        assert_eq!(seen, wanted, "line {line}");
    }
    assert_eq!((told("stdout"), told("stderr")), (expected.out(), expected.err()));
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 0, "the snapshot on the host stays empty");
    direct.finish();
    lab.nothing_is_left();
}

/// A view, as snapshotters give it for what shall not be written to.
pub fn layers_without_a_snapshot_are_a_read_only_rootfs(backend: Backend) {
    let lab = Lab::new(backend);
    let argv = ["sh", "-c", "grep ' / ' /proc/mounts; touch /new; exit 4"];
    let mut direct = Direct::new(&lab, "c", &argv);
    let mut block = spec(&argv);
    block["annotations"] = json!({ "cube.rootfs.mode": "block" });
    direct.write_spec(&block);
    let lower = direct.unpack_image();
    let empty = lab.dir().join("direct/empty");
    fs::create_dir(&empty).unwrap();
    let options = vec!["ro".to_owned(), format!("lowerdir={}:{}", empty.display(), lower.display())];
    let rootfs = Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() };
    direct.start_shim();
    direct.create(vec![rootfs]).unwrap();
    direct.start().unwrap();
    assert_eq!(direct.wait().unwrap(), 4);
    direct.delete().unwrap();
    let told = |stream: &str| fs::read_to_string(lab.log_dir("c").join(stream)).unwrap();
    assert!(told("stdout").contains(" / erofs ro"), "{}", told("stdout"));
    assert!(told("stderr").contains("Read-only file system"), "{}", told("stderr"));
    direct.finish();
    lab.nothing_is_left();
}
