//! A process in a container whose input or output is a stream here.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use cube_shim::log::locate::Name;
use nix::{
    sys::stat::Mode,
    unistd::{mkdtemp, mkfifo},
};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot::{self, Receiver},
    time::timeout,
};

use super::drain;
use crate::{
    containerd::{Containerd, ContainerdError, Exec},
    error::CliError,
    sandboxes::Sandbox,
};

/// What is kept of an error output.
const SAID_MAX: u64 = 4 << 10;

/// Time for a process to exit that was killed, and for its last words.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What is found where a spec does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

type Stream = Box<dyn FnOnce(File) -> Result<(), CliError> + Send>;

/// What is done with the process's standard output, or input.
pub(super) enum Work {
    Take(Stream),
    Give(Stream),
}

/// A running container.
pub(super) struct Guest<'a> {
    containerd: Containerd,
    name: Name,
    /// `process` of its spec, run by its root.
    process: Value,
    run_dir: &'a Path,
    number: AtomicU32,
}

impl<'a> Guest<'a> {
    pub(super) async fn new(
        containerd: Containerd,
        sandbox: &Sandbox,
        id: &str,
        run_dir: &'a Path,
    ) -> Result<Guest<'a>, CliError> {
        let spec = containerd.spec(id).await?;
        let name = Name { namespace: sandbox.state.namespace.clone(), id: id.into() };
        let process = root_process(spec.get("process").cloned().unwrap_or_default());
        Ok(Guest { containerd, name, process, run_dir, number: AtomicU32::new(0) })
    }

    /// Whether there is a directory of this path in the container.
    pub(super) async fn has_dir(&self, path: &str) -> Result<bool, CliError> {
        let done = Work::Take(Box::new(|from| drain(from).map_err(CliError::Received)));
        match self.run(&["test", "-d", path], done).await {
            Ok(()) => Ok(true),
            Err(CliError::InContainer { status: 1, .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Runs `argv` to its end. It is an error if its status is not 0.
    pub(super) async fn run(&self, argv: &[&str], work: Work) -> Result<(), CliError> {
        let program = if argv[0] == "test" { "test" } else { super::TAR };
        let fifos = Fifos::new(self.run_dir)?;
        let (is_input, stream) = match work {
            Work::Take(stream) => (false, stream),
            Work::Give(stream) => (true, stream),
        };
        let (data, errors) = (fifos.make(if is_input { "stdin" } else { "stdout" })?, fifos.make("stderr")?);
        let mut spec = self.process.clone();
        spec["args"] = json!(argv);
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let exec = Exec {
            id: format!("cp-{}-{number}", std::process::id()),
            spec,
            stdin: Some(data.clone()).filter(|_| is_input),
            stdout: Some(data.clone()).filter(|_| !is_input),
            stderr: Some(errors.clone()),
        };
        // Opening waits for the shim, and so do these threads if none comes: they end with this process.
        let said = in_thread(move || said(&errors));
        let mut done = in_thread(move || {
            let file = OpenOptions::new().read(!is_input).write(is_input).open(&data);
            stream(file.map_err(|source| CliError::File { action: "open", path: data, source })?)
        });
        let containerd = &self.containerd;
        containerd.exec(&self.name.id, &exec).await?;
        let ended = async {
            containerd.start_exec(&self.name.id, &exec.id).await.map_err(|e| self.not_started(e, program))?;
            let mut interrupted = signal(SignalKind::interrupt()).map_err(CliError::Signal)?;
            let mut terminated = signal(SignalKind::terminate()).map_err(CliError::Signal)?;
            let exit = containerd.wait_for_exec(&self.name.id, &exec.id);
            tokio::pin!(exit);
            let mut streamed = None;
            loop {
                tokio::select! {
                    result = &mut done, if streamed.is_none() => {
                        let result = result.unwrap_or(Ok(()));
                        if result.is_err() && !is_input {
                            return result.map(|()| (0, None));
                        }
                        if is_input {
                            containerd.close_stdin(&self.name.id, &exec.id).await?;
                        }
                        streamed = Some(result);
                    }
                    status = &mut exit => return Ok((status?, streamed)),
                    _ = interrupted.recv() => return Err(CliError::Interrupted { signal: libc::SIGINT }),
                    _ = terminated.recv() => return Err(CliError::Interrupted { signal: libc::SIGTERM }),
                }
            }
        };
        let ended = ended.await;
        if ended.is_err() {
            self.end(&exec.id).await;
        }
        // After its exit its output comes to its end, and what was written to it meets nobody.
        let finished = match ended {
            Ok((status, None)) if !is_input => done.await.unwrap_or(Ok(())).map(|()| status),
            // One that ends early says why, and the pipe says that it has.
            Ok((status, Some(Err(e)))) if status == 0 || !is_broken_pipe(&e) => Err(e),
            Ok((status, _)) => Ok(status),
            Err(e) => Err(e),
        };
        let _ = containerd.delete_exec(&self.name.id, &exec.id).await;
        match finished? {
            0 => Ok(()),
            status => {
                let said = timeout(KILL_LIMIT, said).await.ok().and_then(Result::ok).unwrap_or_default();
                Err(CliError::InContainer { container: self.name.clone(), program, status, said })
            }
        }
    }

    fn not_started(&self, error: ContainerdError, program: &'static str) -> CliError {
        match error.is_not_found() {
            true => CliError::NoProgram { container: self.name.clone(), program },
            false => error.into(),
        }
    }

    /// Ends what nobody waits for any more.
    async fn end(&self, exec: &str) {
        let id = &self.name.id;
        if self.containerd.kill_exec(id, exec, libc::SIGKILL.unsigned_abs()).await.is_ok() {
            let _ = timeout(KILL_LIMIT, self.containerd.wait_for_exec(id, exec)).await;
        }
    }
}

/// The process of a spec, without what belongs to the container's own: run by its root, in its root directory.
fn root_process(process: Value) -> Value {
    let mut process = if process.is_object() { process } else { json!({}) };
    process["user"] = json!({"uid": 0, "gid": 0});
    process["cwd"] = "/".into();
    process["terminal"] = false.into();
    if !process["env"].is_array() {
        process["env"] = json!([PATH]);
    }
    process
}

fn is_broken_pipe(error: &CliError) -> bool {
    matches!(error, CliError::Send { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
}

fn said(errors: &Path) -> String {
    let mut said = Vec::new();
    if let Ok(file) = File::open(errors) {
        let mut beginning = file.take(SAID_MAX);
        let _ = beginning.read_to_end(&mut said);
        let _ = drain(beginning.into_inner());
    }
    String::from_utf8_lossy(&said).into_owned()
}

fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (send, receive) = oneshot::channel();
    thread::spawn(move || send.send(work()));
    receive
}

/// A directory for FIFOs, where the shim has its own. It goes with this.
struct Fifos(PathBuf);

impl Fifos {
    fn new(run_dir: &Path) -> Result<Fifos, CliError> {
        let template = run_dir.join("cp.XXXXXX");
        let dir = mkdtemp(&template).map_err(|errno| failed(&template, errno))?;
        Ok(Fifos(dir))
    }

    fn make(&self, name: &str) -> Result<PathBuf, CliError> {
        let path = self.0.join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| failed(&path, errno))?;
        Ok(path)
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        for name in ["stdin", "stdout", "stderr"] {
            let _ = fs::remove_file(self.0.join(name));
        }
        let _ = fs::remove_dir(&self.0);
    }
}

fn failed(path: &Path, errno: nix::errno::Errno) -> CliError {
    CliError::File { action: "make", path: path.into(), source: io::Error::from(errno) }
}
