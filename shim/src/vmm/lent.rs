//! Files of the host that belong to the user of a VMM while that runs: the disks that it writes to.
//!
//! Each is a link in `lent/` of the run directory, made before the file changes hands, whose name says what
//! file it is and whose it was. So whoever cleans up can give it back.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt, symlink},
    },
    path::Path,
};

use nix::{
    fcntl::AtFlags,
    unistd::{Gid, Uid, fchownat},
};

use super::{VmmError, wall::User};
use crate::files;

const DIR: &str = "lent";

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> VmmError + 'a {
    move |source| VmmError::Io { action, path: path.into(), source }
}

/// What the name of a link says.
#[derive(Debug, PartialEq, Eq)]
struct Loan {
    device: u64,
    inode: u64,
    borrower: u32,
    owner: User,
}

impl Loan {
    fn name(&self) -> String {
        let Loan { device, inode, borrower, owner: User { uid, gid } } = self;
        format!("{device}-{inode}-{borrower}-{uid}-{gid}")
    }

    fn parse(name: &str) -> Option<Loan> {
        let mut words = name.split('-');
        let mut word = || words.next();
        let [device, inode] = [word()?.parse().ok()?, word()?.parse().ok()?];
        let [borrower, uid, gid] = [word()?.parse().ok()?, word()?.parse().ok()?, word()?.parse().ok()?];
        Some(Loan { device, inode, borrower, owner: User { uid, gid } })
    }
}

/// Makes the VMM with this run directory the owner of the file `path`, until [`take_back`].
pub(super) fn lend(run_dir: &Path, path: &Path, to: User) -> Result<(), VmmError> {
    let file = handle(path).map_err(failed("cannot open", path))?;
    let meta = file.metadata().map_err(failed("cannot examine", path))?;
    if meta.uid() != to.uid {
        let dir = run_dir.join(DIR);
        files::make_dir(&dir).map_err(failed("cannot create", &dir))?;
        let owner = User { uid: meta.uid(), gid: meta.gid() };
        let loan = Loan { device: meta.dev(), inode: meta.ino(), borrower: to.uid, owner };
        let link = dir.join(loan.name());
        match symlink(path, &link) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed("cannot create", &link)(e)),
            _ => {}
        }
    }
    give(&file, to).map_err(failed("cannot change the owner of", path))
}

/// Gives the files back that were lent to the VMM with this run directory, which has ended. A file that was
/// removed, replaced or given to somebody else meanwhile is left alone. May be repeated.
///
/// # Errors
///
/// The first file that cannot be given back; the others are.
pub(crate) fn take_back(run_dir: &Path) -> Result<(), VmmError> {
    let dir = run_dir.join(DIR);
    let links = match files::entries(&dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        links => links.map_err(failed("cannot list", &dir))?,
    };
    let results: Vec<_> = links.iter().map(|link| return_one(link)).collect();
    results.into_iter().collect::<Result<(), _>>()?;
    fs::remove_dir(&dir).map_err(failed("cannot remove", &dir))
}

fn return_one(link: &Path) -> Result<(), VmmError> {
    let loan = link.file_name().and_then(|name| Loan::parse(name.to_str()?));
    let path = fs::read_link(link).map_err(failed("cannot read", link))?;
    if let Some(loan) = loan
        && let Some(file) = lent(&path, &loan).map_err(failed("cannot open", &path))?
    {
        give(&file, loan.owner).map_err(failed("cannot change the owner of", &path))?;
    }
    files::remove(link).map_err(failed("cannot remove", link))
}

/// The file of a loan, if its borrower still has it.
fn lent(path: &Path, loan: &Loan) -> io::Result<Option<File>> {
    let file = match handle(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let meta = file.metadata()?;
    let is_it = (meta.dev(), meta.ino(), meta.uid()) == (loan.device, loan.inode, loan.borrower);
    Ok((is_it && meta.is_file()).then_some(file))
}

/// What is at `path` itself, to be looked at and to change hands.
fn handle(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)
}

fn give(file: &File, User { uid, gid }: User) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    Ok(fchownat(file.as_fd(), c"", uid, gid, AtFlags::AT_EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{chown, lchown},
        path::PathBuf,
    };

    use super::*;

    const VMM: User = User { uid: 1_900_200_001, gid: 1_900_200_009 };

    fn owner(path: &Path) -> (u32, u32) {
        let meta = fs::symlink_metadata(path).unwrap();
        (meta.uid(), meta.gid())
    }

    struct Place {
        dir: tempfile::TempDir,
        run_dir: PathBuf,
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            let run_dir = dir.path().join("run");
            Place { dir, run_dir }
        }

        fn disk(&self, name: &str) -> PathBuf {
            let path = self.dir.path().join(name);
            fs::write(&path, "disk").unwrap();
            chown(&path, Some(1234), Some(5678)).unwrap();
            path
        }
    }

    #[test]
    fn a_file_goes_back_to_whose_it_was_however_often_it_was_lent() {
        let place = Place::new();
        let disks = ["a", "b"].map(|name| place.disk(name));
        for disk in disks.iter().chain(&disks) {
            lend(&place.run_dir, disk, VMM).unwrap();
            assert_eq!(owner(disk), (VMM.uid, VMM.gid));
        }
        for _ in 0..2 {
            take_back(&place.run_dir).unwrap();
            assert_eq!(disks.each_ref().map(|disk| owner(disk)), [(1234, 5678); 2]);
        }
        assert!(!place.run_dir.join(DIR).exists());
    }

    #[test]
    fn what_is_not_the_borrowers_any_more_is_left_alone() {
        let place = Place::new();
        let [gone, replaced, linked, given] =
            ["gone", "replaced", "linked", "given"].map(|name| place.disk(name));
        let kept = place.disk("kept");
        for disk in [&gone, &replaced, &linked, &given, &kept] {
            lend(&place.run_dir, disk, VMM).unwrap();
        }
        let secret = place.dir.path().join("secret");
        fs::write(&secret, "root's").unwrap();
        chown(&secret, Some(VMM.uid), None).unwrap();
        fs::remove_file(&gone).unwrap();
        fs::rename(&secret, &replaced).unwrap();
        fs::remove_file(&linked).unwrap();
        symlink(&replaced, &linked).unwrap();
        lchown(&linked, Some(VMM.uid), None).unwrap();
        chown(&given, Some(4321), None).unwrap();
        take_back(&place.run_dir).unwrap();
        assert_eq!(owner(&kept), (1234, 5678));
        assert_eq!([owner(&replaced).0, owner(&linked).0, owner(&given).0], [VMM.uid, VMM.uid, 4321]);
    }

    #[test]
    fn a_vmm_that_runs_as_the_owner_borrows_nothing() {
        let place = Place::new();
        let disk = place.disk("a");
        lend(&place.run_dir, &disk, User { uid: 1234, gid: 5678 }).unwrap();
        assert!(!place.run_dir.join(DIR).exists());
    }
}
