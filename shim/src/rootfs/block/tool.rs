//! Programs that make file systems: in the sandbox's cgroup, ended when a create is.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, Read},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use nix::sys::resource::{Resource, setrlimit};

use super::{super::failed, Limits, RootfsError};
use crate::vmm::program;

/// What an error quotes of a program's messages.
const OUTPUT_MAX: u64 = 4096;

/// How often a program that runs is looked after. There is no waitpid(2) with a time limit.
const LOOK: Duration = Duration::from_millis(5);

/// The executable that `name` of `[tools]` means.
pub(super) fn find(name: &Path, hint: &'static str) -> Result<PathBuf, RootfsError> {
    program::find(name, hint).map_err(|e| RootfsError::Program(Box::new(e)))
}

/// A run of a program.
pub(super) struct Tool<'a> {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    /// cgroup v2 directory, a leaf.
    pub(super) cgroup: &'a Path,
    /// What it sees mounted, and nobody else.
    pub(super) mount: Option<PrivateMount>,
    /// Most bytes that a file may have which it writes: setrlimit(2), RLIMIT_FSIZE.
    pub(super) file_limit: u64,
}

/// A mount in a mount namespace of the program's own: it is gone when the program is, however that
/// ends, and the host never sees it.
#[derive(Debug)]
pub(super) struct PrivateMount {
    source: CString,
    target: CString,
    fs_type: CString,
    flags: libc::c_ulong,
    data: CString,
    /// Directory to which paths in `data` are relative.
    base: CString,
}

impl PrivateMount {
    pub(super) fn new(
        (source, target): (&Path, &Path),
        fs_type: &str,
        flags: libc::c_ulong,
        (data, base): (&str, &Path),
    ) -> io::Result<PrivateMount> {
        Ok(PrivateMount {
            source: CString::new(source.as_os_str().as_bytes())?,
            target: CString::new(target.as_os_str().as_bytes())?,
            fs_type: CString::new(fs_type)?,
            flags,
            data: CString::new(data)?,
            base: CString::new(base.as_os_str().as_bytes())?,
        })
    }

    /// In the child, between fork and exec.
    fn make(&self) -> io::Result<()> {
        let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        let none = std::ptr::null();
        // SAFETY: every pointer is null or a string that ends with a zero and outlives the calls.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS))?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            check(libc::mount(none, c"/".as_ptr(), none, private, none.cast()))?;
            check(libc::chdir(self.base.as_ptr()))?;
            check(libc::mount(
                self.source.as_ptr(),
                self.target.as_ptr(),
                self.fs_type.as_ptr(),
                self.flags,
                self.data.as_ptr().cast(),
            ))
        }
    }
}

impl Tool<'_> {
    /// Runs it to its end, which `limits` may bring about. `look` is called meanwhile, many times a
    /// second.
    pub(super) fn run(self, limits: &Limits, mut look: impl FnMut(Duration)) -> Result<(), RootfsError> {
        let procs = self.cgroup.join("cgroup.procs");
        let procs = File::options().write(true).open(&procs).map_err(failed("cannot open", &procs))?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let (mount, file_limit) = (self.mount, self.file_limit);
        let enter = move || {
            nix::unistd::write(&procs, b"0")?;
            nix::unistd::setsid()?;
            setrlimit(Resource::RLIMIT_FSIZE, file_limit, file_limit)?;
            mount.as_ref().map_or(Ok(()), PrivateMount::make)
        };
        // SAFETY: `enter` makes system calls only; it neither allocates nor takes a lock.
        unsafe { command.pre_exec(enter) };
        let started = command.spawn();
        let mut child =
            started.map_err(|source| RootfsError::Start { program: self.program.clone(), source })?;
        let (sender, messages) = mpsc::channel();
        let stderr = child.stderr.take();
        // Read all along, or a full pipe would stop the program.
        thread::spawn(move || sender.send(stderr.map(first_bytes).unwrap_or_default()));
        let begun = std::time::Instant::now();
        let ended = loop {
            let waited = child.try_wait().map_err(failed("cannot wait for", &self.program))?;
            if let Some(status) = waited {
                break status;
            }
            if let Err(e) = limits.check("packing the rootfs") {
                // Fails if it has just ended.
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
            look(begun.elapsed());
            thread::sleep(LOOK);
        };
        if ended.success() {
            return Ok(());
        }
        // A process that it left behind may keep the pipe.
        let output = messages.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        Err(RootfsError::Failed { program: self.program, status: describe(ended), output })
    }
}

fn first_bytes(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    // What could be read is what there is to tell.
    let _ = pipe.by_ref().take(OUTPUT_MAX).read_to_end(&mut bytes);
    let _ = io::copy(&mut pipe, &mut io::sink());
    String::from_utf8_lossy(&bytes).trim().replace('\n', "; ")
}

fn describe(status: ExitStatus) -> String {
    status.to_string()
}
