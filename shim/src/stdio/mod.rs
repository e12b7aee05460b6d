//! stdio of one process: from the agent's streams to the log, FIFOs, files and log programs, and
//! from the stdin FIFO to the agent.

mod connection;
mod control;
mod direct;
mod feed;
mod fifo;
mod flow;
mod incoming;
mod log_sink;
mod opens;
mod outlet;
mod output;
mod phase;
mod program;
mod registration;
mod relay;
mod rewind;
mod sink;
mod source;
mod status;
mod stdin;
mod sync;
mod uri;

#[cfg(test)]
mod fake_agent;
#[cfg(test)]
mod tests;

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cube_protocol::stream::Stream;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout_at},
};

use self::{
    connection::Endpoint,
    output::Output,
    phase::{GUEST_PATIENCE, Phase, Phases, READER_PATIENCE, TAKEN_PATIENCE, Times},
    program::LogProgram,
    rewind::{Rewinder, Rewinds},
    source::Source,
    status::Counters,
    stdin::{Input, StdinRelay},
};
pub use self::{
    flow::Flows,
    status::{LogStatus, Obstacle, StreamStatus},
};
use crate::{agent::Dial, log::dir::LogError};

/// Time that tasks which were told to give up have to count what they did not deliver.
const LAST_ACCOUNT: Duration = Duration::from_millis(100);

/// What to do with the stdio of one process, as containerd's Create or Exec asks.
#[derive(Debug, Clone)]
pub struct StdioConfig {
    /// containerd namespace; given to log programs.
    pub namespace: String,
    /// Container whose process it is.
    pub container_id: String,
    /// Its id in the guest: another one if that was restored from a snapshot.
    pub guest_container_id: String,
    /// Empty for the init process.
    pub exec_id: String,
    /// One stream for both directions of output, and no stderr.
    pub terminal: bool,
    /// Path of the FIFO, or empty.
    pub stdin: String,
    /// Path of a FIFO, a `fifo://`, `file://` or `binary://` URI, or empty.
    pub stdout: String,
    /// As `stdout`; empty if `terminal`.
    pub stderr: String,
    /// Log directory of the container, to be created; `None` for execs, terminals and containers
    /// with log forwarding off.
    pub log: Option<LogConfig>,
    /// Where the streams begin.
    pub begin: Begin,
}

/// Where the streams of a process begin: at 0, unless the process was running before, in another sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Begin {
    /// Bytes of stdin that the process has taken.
    pub stdin: u64,
    /// First byte of stdout, or of the terminal's output, that the guest still has.
    pub stdout: u64,
    /// The same of stderr.
    pub stderr: u64,
    /// The highest attempt that any of the streams was opened with.
    pub attempt: u64,
}

impl Begin {
    fn output(&self, stream: Stream) -> u64 {
        if stream == Stream::STDERR { self.stderr } else { self.stdout }
    }
}

/// Where and how the log of an init process is kept.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// `<log dir>/<namespace>/<container id>`, or the bundle, or that of a template build.
    pub dir: PathBuf,
    /// Whether another sandbox may want the same directory: then the first keeps it for itself.
    pub exclusive: bool,
    /// Size in bytes at which a segment is closed.
    pub segment_bytes: u64,
    /// Segments kept, the one being written included.
    pub segments: u32,
}

/// Longest time for which a reader delays what [`ProcessIo::taken`] is awaited for, once somebody wants the
/// end of the process.
const TAKEN_LIMIT: Duration = Duration::from_secs(2);

/// Which streams the process needs; the others are /dev/null in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Whether the agent must make a stdin stream.
    pub stdin: bool,
    /// Whether the agent must make a stdout (or terminal) stream.
    pub stdout: bool,
    /// Whether the agent must make a stderr stream.
    pub stderr: bool,
}

/// How much [`ProcessIo::finish`] could deliver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FinishReport {
    /// Whether every stream reached its EOF and its sinks took everything.
    pub complete: bool,
    /// Bytes known to exist that were discarded because a sink took them too slowly.
    pub discarded_bytes: u64,
}

/// Why the stdio of a process could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A stdio URI of an unknown or refused kind.
    #[error("{name} is {uri:?}: {reason}")]
    Uri {
        /// "stdin", "stdout" or "stderr".
        name: &'static str,
        /// As containerd gave it.
        uri: String,
        /// What is wrong, and what is accepted.
        reason: &'static str,
    },
    /// A file, FIFO or program failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot open" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl From<LogError> for StdioError {
    fn from(e: LogError) -> StdioError {
        StdioError::Io { action: e.action, path: e.path, source: e.source }
    }
}

/// The stdio of one process. Dropping it aborts its tasks and closes its sinks.
#[derive(Debug)]
pub struct ProcessIo {
    config: StdioConfig,
    stdin: Option<Stdin>,
    outputs: Vec<Output>,
    program: Option<LogProgram>,
    phase: watch::Sender<Phase>,
    /// What this process itself sees of it; there from the start of the relays on.
    phases: Option<Phases>,
    tasks: JoinSet<()>,
    /// The directory of the log, if there is one, for as long as there is somebody who owns it.
    log_dir: Option<Arc<Path>>,
}

#[derive(Debug)]
struct Stdin {
    path: PathBuf,
    /// Taken by the relay.
    parts: Option<(Source, Rewinds)>,
    close: watch::Sender<bool>,
    rewinder: Rewinder,
    counters: Arc<Counters>,
}

impl ProcessIo {
    /// Validates the URIs, opens what must exist before the process starts (log files with mode
    /// 0600, FIFOs, log programs), and keeps the far ends of the FIFOs. Nothing goes to the guest.
    ///
    /// A log directory that holds a log already is renamed to `<name>.<unix time>`. Needs a tokio
    /// runtime with I/O and time; may take as long as a log program takes to be ready (10 s at most).
    pub async fn prepare(config: StdioConfig) -> Result<ProcessIo, StdioError> {
        let stdin = uri::parse_input(&config.stdin).map_err(invalid("stdin", &config.stdin))?;
        let stdout = uri::parse_output(&config.stdout).map_err(invalid("stdout", &config.stdout))?;
        // A terminal merges both, whatever containerd gives as stderr.
        let stderr = if config.terminal { "" } else { &config.stderr };
        let stderr = uri::parse_output(stderr).map_err(invalid("stderr", &config.stderr))?;
        let stdin = stdin.map(|path| Stdin::open(&path)).transpose()?;
        let logs = output::create_logs(config.log.clone(), config.begin).await?;
        let (outlets, program) = output::open_outlets(&config, stdout, stderr).await?;
        let outputs = output::assemble(config.terminal, logs, outlets, config.begin)?;
        Ok(ProcessIo::of(config, stdin, outputs, program))
    }

    fn of(
        config: StdioConfig,
        stdin: Option<Stdin>,
        outputs: Vec<Output>,
        program: Option<LogProgram>,
    ) -> ProcessIo {
        let (phase, _) = watch::channel(Phase::Running);
        let log_dir = config.log.as_ref().map(|log| Arc::from(log.dir.as_path()));
        ProcessIo { config, stdin, outputs, program, phase, phases: None, tasks: JoinSet::new(), log_dir }
    }

    /// Takes over the logs of a process whose shim has died, for `shim delete` to drain what the guest
    /// still holds into them. Nothing but the logs is opened; without a log there is nothing to do.
    ///
    /// The index tells where each log ends; the next OPEN goes on there. A log that ends in another timeline
    /// than `timeline`, that of the guest, gets nothing more: its process may have been put back to a snapshot
    /// before the log could say so, and what the guest has at that offset belongs elsewhere.
    pub async fn recover(config: StdioConfig, timeline: u64) -> Result<ProcessIo, StdioError> {
        let logs = output::recover_logs(config.log.clone(), timeline).await?;
        let outputs = output::assemble(config.terminal, logs, [None, None], config.begin)?;
        Ok(ProcessIo::of(config, None, outputs, None))
    }

    /// For a process of the guest that nobody here knows: what it writes is taken, counted and dropped, so
    /// that it does not wait for a reader that never comes. `streams` are those of its outputs.
    pub fn discard(config: StdioConfig, streams: &[Stream]) -> ProcessIo {
        let outputs =
            streams.iter().map(|stream| Output::discarded_by_design(*stream, config.begin)).collect();
        ProcessIo::of(config, None, outputs, None)
    }

    /// Which streams to ask the agent for.
    pub fn wanted(&self) -> Wanted {
        let output = |name| self.outputs.iter().any(|output| output.name() == name);
        Wanted { stdin: self.stdin.is_some(), stdout: output("stdout"), stderr: output("stderr") }
    }

    /// Begins to relay, once the agent has made the streams (after its Create or Exec); while the streams
    /// of the sandbox rest, so do these. Once.
    pub fn start(&mut self, dial: Arc<dyn Dial>, flows: &Flows) {
        let endpoint = |stream| Endpoint {
            container_id: self.config.guest_container_id.clone(),
            exec_id: self.config.exec_id.clone(),
            stream,
            attempt: self.config.begin.attempt,
            dial: dial.clone(),
        };
        let phases = Phases::new(self.phase.subscribe(), flows.watch());
        self.phases = Some(phases.clone());
        self.log_dir.iter().for_each(|dir| flows.logs().add(dir));
        for output in &mut self.outputs {
            let (endpoint, flow) = (endpoint(output.stream()), flows.join());
            output.start(endpoint, phases.clone(), flow, &mut self.tasks);
        }
        if let Some(Stdin { path, parts, close, counters, .. }) = &mut self.stdin
            && let Some((source, rewinds)) = parts.take()
        {
            let input = Input { path: path.clone(), source, close: close.subscribe() };
            let begin = self.config.begin.stdin;
            let (endpoint, flow) = (endpoint(Stream::STDIN), flows.join());
            let relay = StdinRelay::new(endpoint, input, begin, flow, rewinds, counters.clone());
            self.tasks.spawn(relay.run(phases));
        }
    }

    /// containerd's CloseIO: EOF goes to the process once the FIFO is drained. Idempotent; nothing
    /// happens on a terminal.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin
            && !self.config.terminal
        {
            stdin.close.send_replace(true);
        }
    }

    /// The process has exited. A reader that is attached has from now on the time that it needs; a FIFO that
    /// nobody reads is closed after 2 s.
    pub fn process_exited(&self) {
        self.advance(|Times { exit, .. }| Phase::Exited(exit));
    }

    /// Somebody wants the end of the process, which has exited: from now on its readers have 2 s of no progress
    /// before FIFOs are closed.
    pub fn end_wanted(&self) {
        self.advance(Phase::Ended);
    }

    /// Resolves when the exit of the process need not be held back any longer: when each reader that is
    /// attached has been given all of the output, which is then in its pipe at the latest, or has gone. One
    /// that nobody has opened is waited for for 500 ms. 2 s after [`end_wanted`](ProcessIo::end_wanted) in any
    /// case. For use after [`process_exited`](ProcessIo::process_exited).
    pub fn taken(&self) -> impl Future<Output = ()> + Send + use<> {
        let counters: Vec<_> = self.outputs.iter().map(Output::counters).collect();
        let phases = self.phases.clone();
        async move {
            // Streams that were never started have nothing for anybody.
            if let Some(phases) = phases {
                taken(&counters, phases).await;
            }
        }
    }

    /// Whether output has come from the guest that is not with those who take it.
    pub fn is_behind(&self) -> bool {
        self.outputs.iter().any(|output| output.status().lag > 0)
    }

    /// Counters of each stream that the process has.
    pub fn status(&self) -> Vec<StreamStatus> {
        let stdin = self.stdin.iter().map(Stdin::status);
        stdin.chain(self.outputs.iter().map(Output::status)).collect()
    }

    /// Delivers what is left for at most `limit`, then closes everything. Called by Delete.
    ///
    /// Ends after 4 s in which nothing went forward, or 2 s if it is a sink that takes nothing: `limit` is
    /// for what still flows, which may be as much as the guest buffers, and slowly. FIFOs that nobody reads are closed at once. A guest that
    /// cannot be reached any more is waited for as long as any other: give no `limit` if it is known to
    /// be gone.
    pub async fn finish(mut self, limit: Duration) -> FinishReport {
        let now = Instant::now();
        self.advance(Phase::Finishing);
        // A log program ends after its pipes have been closed, and within the same limit.
        let delivery = if self.program.is_some() { limit.mul_f32(0.75) } else { limit };
        if !self.all_delivered(now + delivery).await {
            self.abandon();
            let _ = timeout_at(Instant::now() + LAST_ACCOUNT, self.tasks_end()).await;
        }
        self.tasks.shutdown().await;
        if let Some(program) = self.program.take() {
            program.finish((now + limit).min(Instant::now() + READER_PATIENCE)).await;
        }
        FinishReport {
            complete: self.outputs.iter().all(Output::is_complete),
            discarded_bytes: self.outputs.iter().map(Output::discarded).fold(0, u64::saturating_add),
        }
    }

    /// Whether everything was delivered, until `deadline` and as long as it went forward.
    async fn all_delivered(&mut self, deadline: Instant) -> bool {
        loop {
            let before = self.progress();
            // The guest sends nothing more while a disk is full.
            let stuck = self.outputs.iter().any(|output| output.stuck() > 0);
            let patience = if stuck { READER_PATIENCE } else { GUEST_PATIENCE };
            let look = deadline.min(Instant::now() + patience);
            if timeout_at(look, self.tasks_end()).await.is_ok() {
                return true;
            }
            if look == deadline || self.progress() == before {
                return false;
            }
        }
    }

    /// Changes whenever output goes forward.
    fn progress(&self) -> u64 {
        self.outputs.iter().map(Output::progress).fold(0, u64::wrapping_add)
    }

    async fn tasks_end(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    fn abandon(&self) {
        self.advance(|_| Phase::Abandoned);
        self.outputs.iter().for_each(Output::abandon);
    }

    fn advance(&self, next: impl FnOnce(Times) -> Phase) {
        self.phase.send_if_modified(|phase| phase.advance(next));
    }
}

/// Resolves when the exit of a process whose outputs have these `counters` need not be held back.
async fn taken(counters: &[Arc<Counters>], phases: Phases) {
    let mut also = phases.clone();
    let all =
        futures::future::join_all(counters.iter().map(|counters| counters.taken(TAKEN_PATIENCE, &phases)));
    tokio::select! {
        _ = all => {}
        () = also.over(TAKEN_LIMIT) => {}
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        // The threads of the logs are no tasks: they end when they are told to.
        self.abandon();
    }
}

impl Stdin {
    fn open(path: &Path) -> Result<Stdin, StdioError> {
        let source = Source::open(path).map_err(cannot("cannot open stdin", path))?;
        let (close, _) = watch::channel(false);
        let (rewinder, rewinds) = rewind::channel();
        let counters = Arc::default();
        Ok(Stdin { path: path.into(), parts: Some((source, rewinds)), close, rewinder, counters })
    }

    fn status(&self) -> StreamStatus {
        let status = self.counters.status("stdin");
        let lag = status.received.saturating_sub(self.counters.stored.get()).saturating_sub(status.lost);
        StreamStatus { lag, ..status }
    }
}

fn invalid(name: &'static str, uri: &str) -> impl FnOnce(uri::Reason) -> StdioError {
    move |reason| StdioError::Uri { name, uri: uri.to_owned(), reason }
}

fn cannot(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StdioError {
    move |source| StdioError::Io { action, path: path.to_owned(), source }
}

/// An error with all of its causes, for the log.
fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
