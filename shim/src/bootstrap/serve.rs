//! `serve`, our own action: the daemon that lives as long as its sandbox.

use std::{
    env,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{Backlog, listen},
    },
    unistd::{dup2_stdout, setsid},
};
use tracing::{info, warn};
use ttrpc::asynchronous::{Server, transport::Listener};

use super::{BootstrapError, Flags, expired, io_error, load_config, ttrpc_address};
use crate::{
    control::SandboxService,
    events::Publisher,
    logging,
    sandbox::{Identity, LinuxHost, Sandbox},
    state::RunDir,
    task::TaskService,
};

/// The action's name. Not for users, so not in the usage.
pub(super) const ACTION: &str = "serve";

/// Environment variable with the number of the listening socket's descriptor.
pub(super) const LISTENER: &str = "CUBE_SHIM_LISTENER";

/// What a daemon that serves says on stdout.
pub(super) const READY: &str = "ready\n";

/// Threads: one may be in a slow file system call of a log while the other answers containerd.
const WORKERS: usize = 2;

/// How long the last events may keep the daemon alive.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn run(flags: &Flags) -> Result<(), BootstrapError> {
    // Fails only if we lead a group already, and then we have what it is for: containerd's terminal
    // and process group are not ours.
    let _ = setsid();
    // Else ps and pgrep show "exe", after the link that was executed.
    let _ = nix::sys::prctl::set_name(c"containerd-shim");
    let prepared = prepare(flags);
    let (listener, daemon) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => {
            // `start` shows it; our stderr is nobody's.
            let _ = write!(io::stdout(), "{}", crate::errors::chain(&e));
            return Err(e);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(1))
        .enable_all()
        .build()
        .map_err(io_error("cannot make", "the runtime"))?;
    runtime.block_on(daemon.serve(listener))
}

/// Each stream of each process is a connection, a FIFO and a log with its index: 1024 open files, which is what
/// a process has by default, are used up by some hundred execs.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        warn!("cannot raise the limit of open files: {errno}");
    }
}

struct Daemon {
    identity: Identity,
    config: crate::config::Config,
    events: String,
}

fn prepare(flags: &Flags) -> Result<(UnixListener, Daemon), BootstrapError> {
    flags.check()?;
    let listener = inherited_listener()?;
    let config = load_config(None)?;
    let events = ttrpc_address(None, flags)?;
    logging::init(&flags.bundle()?.join("log"), flags.debug);
    // The bundle is containerd's, and may be on a file system that it wants to unmount.
    env::set_current_dir("/").map_err(io_error("cannot change to", "/"))?;
    let run_dir = RunDir::of(&config.run_dir, &events, &flags.namespace, &flags.id);
    let identity = Identity { namespace: flags.namespace.clone(), id: flags.id.clone(), run_dir };
    Ok((listener, Daemon { identity, config, events }))
}

fn inherited_listener() -> Result<UnixListener, BootstrapError> {
    let number = env::var(LISTENER).ok().and_then(|text| text.parse::<RawFd>().ok());
    let number = number.filter(|number| *number > 2).ok_or(BootstrapError::Missing(LISTENER))?;
    // SAFETY: `start` made the descriptor for us and nothing in this process has used it yet; the
    // call below fails if it is none.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let inherited = |e: nix::Error| io_error("cannot inherit", "the listening socket")(e.into());
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(inherited)?;
    // Once more, for it is whoever called it last that SO_PEERCRED of unix(7) names to clients: cubecli
    // learns in this way which process does not answer.
    listen(&fd, Backlog::MAXCONN).map_err(inherited)?;
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true).map_err(io_error("cannot inherit", "the listening socket"))?;
    Ok(listener)
}

impl Daemon {
    async fn serve(self, listener: UnixListener) -> Result<(), BootstrapError> {
        raise_open_files();
        survive_file_size_limit()?;
        let listener = Listener::try_from(listener).map_err(io_error("cannot listen on", "the socket"))?;
        let publisher = Publisher::new(&self.events, &self.identity.namespace);
        let (id, config) = (self.identity.id.clone(), self.config.clone());
        let (sandbox, over) =
            Sandbox::spawn(self.identity, self.config, Arc::new(LinuxHost), publisher.clone());
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(TaskService::services(sandbox.clone()))
            .register_service(SandboxService::services(sandbox));
        server.start().await?;
        say_ready()?;
        info!(id, version = env!("CARGO_PKG_VERSION"), "shim started");
        tokio::task::spawn_blocking(move || {
            expired::remove_run_dirs(&config);
            expired::remove_logs(&config);
        });

        // A panic in the owner ends the sandbox as well; `shim delete` cleans up then.
        let _ = over.await;
        if !publisher.flush(FLUSH_LIMIT).await {
            warn!("containerd has not taken the last events");
        }
        info!(id, "shim ends");
        // Answers that are being written go out first.
        let _ = server.shutdown().await;
        Ok(())
    }
}

/// Writing beyond RLIMIT_FSIZE, which containerd's unit may have set, ends a process by SIGXFSZ, unless
/// it is caught: then the write fails with EFBIG. Caught and not ignored, for what is ignored stays so in
/// the programs that are started.
fn survive_file_size_limit() -> Result<(), BootstrapError> {
    let sigxfsz = tokio::signal::unix::SignalKind::from_raw(libc::SIGXFSZ);
    // The handler stays when nobody listens to it any more.
    tokio::signal::unix::signal(sigxfsz).map(drop).map_err(io_error("cannot catch", "SIGXFSZ"))
}

/// Tells `start`, and lets go of the pipe: it reads until the end.
fn say_ready() -> Result<(), BootstrapError> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(READY.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(io_error("cannot write to", "stdout"))?;
    let null = Path::new("/dev/null");
    let file = File::options().write(true).open(null).map_err(io_error("cannot open", null))?;
    dup2_stdout(&file).map_err(|e| io_error("cannot replace", "stdout")(e.into()))
}
