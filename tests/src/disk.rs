//! A small disk of a test's own, which fills and empties, hangs and breaks.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount, umount2},
};

use crate::command::{poll, start};

mod ioctls {
    // FIFREEZE and FITHAW of linux/fs.h.
    nix::ioctl_write_int_bad!(freeze, nix::request_code_readwrite!(b'X', 119, size_of::<libc::c_int>()));
    nix::ioctl_write_int_bad!(thaw, nix::request_code_readwrite!(b'X', 120, size_of::<libc::c_int>()));
    use nix::libc;
}

/// A mounted file system. Dropping it unmounts it, whatever state it is in.
#[derive(Debug)]
pub struct Disk {
    point: PathBuf,
    mounted: bool,
}

impl Disk {
    /// A tmpfs of `bytes` bytes at `point`, which is made.
    pub fn tmpfs(point: &Path, bytes: u64) -> Disk {
        fs::create_dir_all(point).unwrap();
        let size = format!("size={bytes}");
        mount(Some("cube-test"), point, Some("tmpfs"), MsFlags::empty(), Some(&*size)).unwrap();
        Disk { point: point.into(), mounted: true }
    }

    /// An ext4 file system of `bytes` bytes in a file beside `point`, which is made.
    pub fn ext4(point: &Path, bytes: u64) -> Disk {
        let image = point.with_extension("ext4");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        start(mkfs.arg("-q").arg(&image)).wait(Duration::from_secs(60)).succeeds();
        fs::create_dir_all(point).unwrap();
        // mount(8) sets the loop device up so that it goes with the mount.
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,errors=remount-ro"]).arg(&image).arg(point);
        start(&mut mount).wait(Duration::from_secs(60)).succeeds();
        Disk { point: point.into(), mounted: true }
    }

    /// Takes what room there is, to the last byte.
    pub fn fill(&self) {
        let mut hog = File::options().create(true).append(true).open(self.hog()).unwrap();
        // Small pieces at the end: a large write may fail where a small one still finds room.
        for size in [64 << 10, 4096, 1] {
            let zeros = vec![0; size];
            loop {
                match hog.write(&zeros) {
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::StorageFull => break,
                    Err(e) => panic!("{}: {e}", self.hog().display()),
                }
            }
        }
    }

    /// Gives back what [`fill`](Disk::fill) has taken.
    pub fn empty(&self) {
        fs::remove_file(self.hog()).unwrap();
    }

    /// Makes every write to it hang until [`thaw`](Disk::thaw). Not with tmpfs.
    pub fn freeze(&self) {
        let dir = File::open(&self.point).unwrap();
        // SAFETY: the call takes an integer, which it does not look at.
        unsafe { ioctls::freeze(dir.as_raw_fd(), 0) }.unwrap();
    }

    /// Ends [`freeze`](Disk::freeze).
    pub fn thaw(&self) {
        let dir = File::open(&self.point).unwrap();
        // SAFETY: as above.
        unsafe { ioctls::thaw(dir.as_raw_fd(), 0) }.unwrap();
    }

    /// Makes it read-only for good, as the kernel does after an I/O error in its metadata. Only ext4.
    pub fn break_down(&self) {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let point = self.point.to_str().unwrap();
        let line = table.lines().find(|line| line.split(' ').nth(4) == Some(point)).unwrap();
        let device = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1)).unwrap();
        let name = device.strip_prefix("/dev/").unwrap();
        fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test").unwrap();
    }

    /// Unmounts it; panics if somebody still uses it.
    pub fn unmount(mut self) {
        let mut result = Ok(());
        let unmounted = poll(Duration::from_secs(15), || {
            result = umount(&self.point);
            result != Err(Errno::EBUSY)
        });
        assert!(unmounted, "{} is in use: {:#?}", self.point.display(), users(&self.point));
        result.unwrap();
        self.mounted = false;
    }

    fn hog(&self) -> PathBuf {
        self.point.join("hog")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        if let Ok(dir) = File::open(&self.point) {
            // SAFETY: as above. It fails if the disk is not frozen.
            let _ = unsafe { ioctls::thaw(dir.as_raw_fd(), 0) };
        }
        if let Err(e) = umount2(&self.point, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {e}", self.point.display());
        }
    }
}

/// Open files below `point`, with the processes that have them.
fn users(point: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            if target.starts_with(point) {
                found.push(format!("{} {}", process.path().display(), target.display()));
            }
        }
    }
    found
}
