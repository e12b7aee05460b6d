//! `start`: finds or makes the shim of a sandbox, and answers with its address.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{
    ADDRESS_FILE, BootstrapError, Flags, TTRPC_ADDRESS, delete, io_error, load_config, reply, serve,
    ttrpc_address,
};
use crate::{
    config::PATH_VARIABLE,
    options,
    sandbox::spec,
    state::{RunDir, StateError},
};

/// Most that is read from stdin; containerd sends a few hundred bytes.
const INPUT_MAX: u64 = 10 << 20;

/// How long another `start` or `delete` of the same sandbox is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// How often a directory may vanish under us while we take its lock.
const LOCK_ATTEMPTS: usize = 10;

/// Gives what goes to stdout.
pub(super) fn run(flags: &Flags) -> Result<Vec<u8>, BootstrapError> {
    flags.check()?;
    let bundle = flags.bundle()?;
    let request = reply::Request::parse(&read_stdin()?, flags, &bundle)?;
    let config_path = options::config_path(request.options.as_ref())?;
    let shim_cgroup = options::shim_cgroup(request.options.as_ref())?;
    let config = load_config(config_path.clone())?;
    let events = ttrpc_address(request.ttrpc_address.as_deref(), flags)?;
    let sandbox_id = sandbox_id(flags, &bundle)?;

    let run_dir = RunDir::of(&config.run_dir, &events, &flags.namespace, &sandbox_id);
    let socket = run_dir.socket()?;
    let lock = lock(&run_dir)?;
    let address = format!("unix://{}", socket.display());
    if sandbox_id == flags.id || UnixStream::connect(&socket).is_err() {
        let (sandbox_id, events, socket) = (&*sandbox_id, &*events, &*socket);
        let daemon = Daemon { flags, sandbox_id, events, config_path, shim_cgroup, socket };
        if let Err(e) = daemon.spawn() {
            // containerd runs no `delete` after a `start` that failed.
            let _ = delete::remove_if_unused(&run_dir, &lock);
            return Err(e);
        }
        cube_fault::point("start.daemon_ready");
    }
    let file = bundle.join(ADDRESS_FILE);
    write_address(&file, &address).map_err(io_error("cannot write", file))?;
    cube_fault::point("start.address_written");
    request.protocol.encode(&address)
}

fn read_stdin() -> Result<Vec<u8>, BootstrapError> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(INPUT_MAX).read_to_end(&mut input).map_err(io_error("cannot read", "stdin"))?;
    }
    Ok(input)
}

/// The pod that the container belongs to, else its own id. A spec that cannot be read is Create's to
/// complain about, where the client gets a typed error.
fn sandbox_id(flags: &Flags, bundle: &Path) -> Result<String, BootstrapError> {
    let spec = spec::load(bundle).unwrap_or_default();
    let id = spec::sandbox_id(&spec).unwrap_or(&flags.id);
    crate::task::check_id("sandbox id", id)?;
    Ok(id.into())
}

fn lock(run_dir: &RunDir) -> Result<crate::state::RunDirLock, BootstrapError> {
    for _ in 0..LOCK_ATTEMPTS {
        run_dir.create()?;
        if let Some(lock) = run_dir.lock(LOCK_LIMIT)? {
            return Ok(lock);
        }
    }
    Err(StateError::Locked { path: run_dir.path().into(), limit: LOCK_LIMIT }.into())
}

/// Whole or not at all: containerd reads it when it restarts, whenever that is.
fn write_address(file: &Path, address: &str) -> io::Result<()> {
    let new = file.with_extension("new");
    let mut options = fs::File::options();
    let mut opened = options.write(true).create(true).truncate(true).mode(0o644).open(&new)?;
    io::Write::write_all(&mut opened, address.as_bytes())?;
    fs::rename(new, file)
}

struct Daemon<'a> {
    flags: &'a Flags,
    sandbox_id: &'a str,
    events: &'a str,
    config_path: Option<PathBuf>,
    shim_cgroup: Option<String>,
    socket: &'a Path,
}

impl Daemon<'_> {
    /// Runs the daemon, and returns when it serves.
    ///
    /// The socket is bound here, so that the address is known good, and handed over. The daemon's
    /// stdout is a pipe to us: a line means that it is ready, anything else is its error. Neither of
    /// containerd's ends is inherited, for it waits for the end of our output.
    fn spawn(&self) -> Result<(), BootstrapError> {
        let listener = self.bind()?;
        cube_fault::point("start.socket_bound");
        keep_on_exec(&listener).map_err(io_error("cannot hand over", self.socket))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("containerd-shim-cube-v2")
            .args(["-namespace", &self.flags.namespace, "-id", self.sandbox_id])
            .args(["-address", &self.flags.address, "-bundle"])
            .arg(self.flags.bundle()?)
            .env(TTRPC_ADDRESS, self.events)
            .env(serve::LISTENER, listener.as_raw_fd().to_string())
            // Two arenas are enough for two workers; each costs address space and memory.
            .env("MALLOC_ARENA_MAX", "2")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if let Some(path) = &self.config_path {
            command.env(PATH_VARIABLE, path);
        }
        if let Some(path) = &self.shim_cgroup {
            command.env(serve::CGROUP, path);
        }
        if self.flags.debug {
            command.arg("-debug");
        }
        command.arg(serve::ACTION);
        let mut child = command.spawn().map_err(io_error("cannot run", "/proc/self/exe"))?;
        let mut answer = String::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_string(&mut answer).map_err(io_error("cannot read from", "the shim"))?;
        }
        if answer == serve::READY { Ok(()) } else { Err(BootstrapError::Daemon(answer)) }
    }

    fn bind(&self) -> Result<UnixListener, BootstrapError> {
        match fs::remove_file(self.socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("cannot remove", self.socket)(e));
            }
            _ => {}
        }
        UnixListener::bind(self.socket).map_err(io_error("cannot bind", self.socket))
    }
}

/// Rust opens everything with `FD_CLOEXEC`; this process has one thread, so nobody else execs now.
fn keep_on_exec(listener: &UnixListener) -> io::Result<()> {
    fcntl(listener.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}
