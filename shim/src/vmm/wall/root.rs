//! A root that holds what is listed, at the paths that it has on the host.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs::{self, File},
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use super::{
    SpawnError, User,
    landlock::{self, Rules},
    step::Step,
};

/// Where programs that are linked dynamically find their libraries. Whole directories, which everybody may
/// read: what a program opens by itself later (QEMU's modules) is told by nobody.
const LIBRARIES: [&str; 6] =
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"];

/// `PT_INTERP` of elf(5).
const INTERPRETER: u32 = 3;

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const PLAIN: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

#[derive(Debug)]
struct Bind {
    path: PathBuf,
    attributes: u64,
    recursive: bool,
    /// What [Landlock](landlock) lets be done there.
    accesses: u64,
}

/// The list.
#[derive(Debug)]
pub(crate) struct Root {
    at: PathBuf,
    binds: Vec<Bind>,
    links: Vec<(PathBuf, PathBuf)>,
    nodes: Vec<(PathBuf, u32, User)>,
    proc: bool,
    sealed: bool,
}

impl Root {
    /// An empty one, read-only. `at` is an empty directory on which it is put together, seen by nobody else.
    pub(crate) fn new(at: &Path) -> Root {
        let (binds, links, nodes) = (Vec::new(), Vec::new(), Vec::new());
        Root { at: at.into(), binds, links, nodes, proc: false, sealed: true }
    }

    /// Where it is put together.
    pub(super) fn at(&self) -> &Path {
        &self.at
    }

    /// Something may be [shown](super::inside::show) to the process while it runs.
    pub(crate) fn open(mut self) -> Root {
        self.sealed = false;
        self
    }

    /// A program, and the libraries of one that needs them.
    pub(crate) fn program(self, path: &Path) -> Root {
        let dynamic = needs_libraries(path);
        let root = self.bind(path, READ_ONLY | PLAIN, false, landlock::RUN);
        if !dynamic {
            return root;
        }
        LIBRARIES.iter().map(Path::new).fold(root, |root, path| match fs::read_link(path) {
            Ok(to) => root.link(path, to),
            Err(_) if path.is_dir() => root.bind(path, READ_ONLY | PLAIN, false, landlock::RUN),
            Err(_) => root.data(path),
        })
    }

    fn link(mut self, at: &Path, to: PathBuf) -> Root {
        self.links.push((at.into(), to));
        self
    }

    /// Something to read, if the host has it.
    pub(crate) fn data(self, path: &Path) -> Root {
        if path.exists() { self.read(path) } else { self }
    }

    /// A file or directory to read.
    pub(crate) fn read(self, path: &Path) -> Root {
        let attributes = READ_ONLY | PLAIN | (libc::MOUNT_ATTR_NOEXEC * u64::from(path.is_file()));
        self.bind(path, attributes, false, landlock::READ)
    }

    /// A file, socket or directory to write to.
    pub(crate) fn write(self, path: &Path) -> Root {
        self.bind(path, PLAIN | libc::MOUNT_ATTR_NOEXEC, false, landlock::WRITE)
    }

    /// A directory with what is mounted below it now and later, each with the access that it has.
    pub(crate) fn tree(self, path: &Path) -> Root {
        self.bind(path, PLAIN, true, landlock::WRITE)
    }

    fn bind(mut self, path: &Path, attributes: u64, recursive: bool, accesses: u64) -> Root {
        let known = self.binds.iter().any(|bind| path.starts_with(&bind.path));
        if !known {
            self.binds.push(Bind { path: path.into(), attributes, recursive, accesses });
        }
        self
    }

    /// A node of the process's own for a device of the host, if it has that.
    pub(crate) fn device(mut self, path: &Path, mode: u32, owner: User) -> Root {
        self.nodes.push((path.into(), mode, owner));
        self
    }

    /// The processes of its own pid namespace.
    pub(crate) fn proc(mut self) -> Root {
        self.proc = true;
        self
    }

    pub(super) fn steps(&self) -> Result<Vec<Step>, SpawnError> {
        let mut steps = vec![Step::Tmpfs { at: text(&self.at)? }];
        let mut made = BTreeSet::new();
        for (at, to) in &self.links {
            self.parents(at, &mut made, &mut steps)?;
            steps.push(Step::Link { at: self.inside(at)?, to: text(to)? });
        }
        for Bind { path, attributes, recursive, .. } in &self.binds {
            self.parents(path, &mut made, &mut steps)?;
            let at = self.inside(path)?;
            steps.push(match path.is_dir() {
                true => Step::Dir { at: at.clone() },
                false => Step::File { at: at.clone() },
            });
            let (attributes, recursive) = (*attributes, *recursive);
            steps.push(Step::Bind { from: text(path)?, at, attributes, recursive });
        }
        for (path, mode, owner) in &self.nodes {
            let Some((kind, device)) = device(path) else { continue };
            self.parents(path, &mut made, &mut steps)?;
            steps.push(Step::Node { at: self.inside(path)?, kind, device, mode: *mode, owner: *owner });
        }
        if self.proc {
            let at = self.inside(Path::new("/proc"))?;
            steps.extend([Step::Dir { at: at.clone() }, Step::Proc { at }]);
        }
        steps.push(Step::Pivot { root: text(&self.at)? });
        if self.sealed {
            steps.push(Step::SealRoot);
        }
        Ok(steps)
    }

    /// What [Landlock](landlock) allows in it.
    pub(super) fn rules(&self) -> Result<Rules, SpawnError> {
        let mut rules = Rules::default();
        for Bind { path, accesses, .. } in &self.binds {
            rules.allow(text(path)?, *accesses, path.is_dir());
        }
        for (path, ..) in self.nodes.iter().filter(|(path, ..)| device(path).is_some()) {
            rules.allow(text(path)?, landlock::WRITE, false);
        }
        if self.proc {
            rules.allow(c"/proc".into(), landlock::READ, true);
        }
        if !self.sealed {
            rules.allow(c"/".into(), landlock::LATER, true);
        }
        Ok(rules)
    }

    fn parents(
        &self,
        path: &Path,
        made: &mut BTreeSet<PathBuf>,
        steps: &mut Vec<Step>,
    ) -> Result<(), SpawnError> {
        let mut parents: Vec<&Path> = path.ancestors().skip(1).filter(|dir| *dir != Path::new("/")).collect();
        parents.reverse();
        for dir in parents {
            if made.insert(dir.into()) {
                steps.push(Step::Dir { at: self.inside(dir)? });
            }
        }
        Ok(())
    }

    fn inside(&self, path: &Path) -> Result<CString, SpawnError> {
        text(&self.at.join(path.strip_prefix("/").unwrap_or(path)))
    }
}

pub(super) fn text(path: &Path) -> Result<CString, SpawnError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| SpawnError::Name { name: path.into() })
}

/// Kind and number of a device that the host has.
fn device(path: &Path) -> Option<(libc::mode_t, libc::dev_t)> {
    let meta = fs::metadata(path).ok()?;
    match meta.file_type() {
        kind if kind.is_char_device() => Some((libc::S_IFCHR, meta.rdev())),
        kind if kind.is_block_device() => Some((libc::S_IFBLK, meta.rdev())),
        _ => None,
    }
}

/// Whether a program names a loader. In doubt, and for a script, it does.
fn needs_libraries(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head));
    let number = |at: usize, length: usize| {
        let bytes = head.get(at..at + length)?;
        Some(bytes.iter().rev().fold(0_usize, |number, byte| number << 8 | usize::from(*byte)))
    };
    // e_phoff, e_phentsize and e_phnum of a 64-bit file, whose magic number says class 2, little-endian.
    let (Some(first), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return true;
    };
    if read.is_err() || !head.starts_with(b"\x7fELF\x02\x01") {
        return true;
    }
    (0..count).any(|index| match number(first.saturating_add(index * size), 4) {
        Some(kind) => kind == INTERPRETER as usize,
        None => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_names_a_loader_is_told_from_one_that_does_not() {
        assert!(needs_libraries(Path::new("/bin/sh")));
        assert!(needs_libraries(Path::new("/etc/passwd")));
        let mut file = fs::read("/bin/sh").unwrap();
        let first = usize::from(file[32]);
        let count = usize::from(file[56]);
        for index in 0..count {
            let at = first + index * usize::from(file[54]);
            if file[at] == 3 {
                file[at] = 4;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let static_one = dir.path().join("static");
        fs::write(&static_one, file).unwrap();
        assert!(!needs_libraries(&static_one));
    }
}
