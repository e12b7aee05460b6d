//! One output stream put together: log, outlet, or both, and the relay that fills them.

use std::{io, path::Path, sync::Arc};

use cube_protocol::stream::Stream;
use tokio::{sync::watch, task::JoinSet};

use super::{
    Begin, LogConfig, StdioConfig, StdioError, cannot,
    connection::Endpoint,
    direct::Direct,
    feed::Feed,
    flow::Member,
    log_sink::LogThread,
    outlet::Outlet,
    phase::Phases,
    program::LogProgram,
    relay::Relay,
    rewind::{self, Rewinder, Rewinds},
    sink::{self, Life, Sink},
    status::{Counter, Counters, LogStatus, StreamStatus},
    uri::Target,
};
use crate::log::{
    dir::{LogDir, LogError},
    retained::Retained,
    writer::{Limits, LogWriter},
};

/// Names of the output streams and of their log files.
const NAMES: [&str; 2] = ["stdout", "stderr"];

/// One for stdout, one for stderr.
type Both<T> = [Option<T>; 2];

/// An output stream and what takes it.
#[derive(Debug)]
pub(super) struct Output {
    name: &'static str,
    stream: Stream,
    counters: Arc<Counters>,
    /// Stream offset of the first byte.
    begin: u64,
    retained: Option<Arc<Retained>>,
    rewinder: Rewinder,
    /// Taken by [`Output::start`].
    parts: Option<Parts>,
}

#[derive(Debug)]
struct Parts {
    log: Option<Log>,
    outlet: Option<Outlet>,
    target: Target,
    rewinds: Rewinds,
}

/// A log whose thread is running.
#[derive(Debug)]
struct Log {
    thread: LogThread,
    sink: Sink,
    life: watch::Receiver<Life>,
    epoch: u64,
}

impl Output {
    /// One that has nowhere to go.
    pub(super) fn discarded_by_design(stream: Stream, begin: Begin) -> Output {
        let name = NAMES[usize::from(stream == Stream::STDERR)];
        let (rewinder, rewinds) = rewind::channel();
        let parts = Some(Parts { log: None, outlet: None, target: Target::Null, rewinds });
        let begin = begin.output(stream);
        Output { name, stream, counters: Arc::default(), begin, retained: None, rewinder, parts }
    }

    pub(super) fn rewinder(&self) -> &Rewinder {
        &self.rewinder
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn stream(&self) -> Stream {
        self.stream
    }

    pub(super) fn status(&self) -> StreamStatus {
        let counters = &*self.counters;
        let log = self.retained.as_ref().map(|retained| retained.usage());
        let lag = match &log {
            _ if counters.is_delivered() => 0,
            Some(usage) => usage.end().saturating_sub(counters.position.get()),
            None => counters.received.get().saturating_sub(counters.stored.get()),
        };
        let log = log.map(|usage| LogStatus { usage, waits_for: counters.obstacle() });
        StreamStatus { lag, log, ..counters.status(self.name) }
    }

    pub(super) fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.counters.complete()
    }

    /// Bytes that came from the guest and did not get everywhere in time.
    pub(super) fn discarded(&self) -> u64 {
        self.stuck().saturating_add(self.counters.discarded.get())
    }

    /// Bytes that came from the guest and that the first sink, the log mostly, does not have yet.
    pub(super) fn stuck(&self) -> u64 {
        self.counters.received.get().saturating_sub(self.counters.stored.get())
    }

    /// Changes whenever bytes go forward.
    pub(super) fn progress(&self) -> u64 {
        let Counters { received, stored, written, .. } = &*self.counters;
        [received, stored, written].into_iter().map(Counter::get).fold(0, u64::wrapping_add)
    }

    /// Ends the waits of the log's thread.
    pub(super) fn abandon(&self) {
        if let Some(retained) = &self.retained {
            retained.abandon();
        }
    }

    /// Spawns the relay, and what delivers to the outlet.
    pub(super) fn start(
        &mut self,
        endpoint: Endpoint,
        phases: Phases,
        flow: Member,
        tasks: &mut JoinSet<()>,
    ) {
        let Some(Parts { log, outlet, target, rewinds }) = self.parts.take() else { return };
        let (name, counters) = (self.name, self.counters.clone());
        let Some(Log { thread, sink, life, epoch }) = log else {
            let (sink, end) = sink::channel(self.begin);
            let direct = Direct::new(name, outlet, target, counters.clone(), phases.clone());
            tasks.spawn(direct.run(end));
            tasks.spawn(Relay::new(endpoint, 0, sink, flow, rewinds, counters).run(phases));
            return;
        };
        match (outlet, &self.retained) {
            (Some(outlet), Some(retained)) => {
                // Before the log's thread has anything to write: it would run ahead of nobody.
                retained.hold(0);
                let feed = Feed {
                    name,
                    retained: retained.clone(),
                    grown: sink.safe.clone(),
                    life,
                    rewinds: 0,
                    outlet: Some(outlet),
                    target,
                    counters: counters.clone(),
                    phases: phases.clone(),
                    position: 0,
                };
                tasks.spawn(feed.run());
            }
            _ => counters.deliver(),
        }
        tasks.spawn(thread.run(Relay::new(endpoint, epoch, sink, flow, rewinds, counters).run(phases)));
    }
}

/// Makes the outputs that have a log or an outlet, and starts the threads of the logs.
pub(super) fn assemble(
    terminal: bool,
    logs: Both<LogWriter>,
    outlets: Both<(Outlet, Target)>,
    begin: Begin,
) -> Result<Vec<Output>, StdioError> {
    let streams = [if terminal { Stream::TERMINAL } else { Stream::STDOUT }, Stream::STDERR];
    let mut outputs = Vec::new();
    for (((name, stream), writer), outlet) in NAMES.into_iter().zip(streams).zip(logs).zip(outlets) {
        if writer.is_none() && outlet.is_none() {
            continue;
        }
        let counters = Arc::<Counters>::default();
        let retained = writer.as_ref().map(LogWriter::retained);
        let log = writer.map(|writer| start_log(writer, name, &counters)).transpose();
        let log = log.map_err(cannot("cannot start a thread for the log of", Path::new(name)))?;
        let (outlet, target) = outlet.map_or((None, Target::Null), |(outlet, target)| (Some(outlet), target));
        let (rewinder, rewinds) = rewind::channel();
        let parts = Some(Parts { log, outlet, target, rewinds });
        let begin = begin.output(stream);
        outputs.push(Output { name, stream, counters, begin, retained, rewinder, parts });
    }
    Ok(outputs)
}

fn start_log(writer: LogWriter, name: &'static str, counters: &Arc<Counters>) -> io::Result<Log> {
    let epoch = writer.identity().epoch;
    let (sink, end) = sink::channel(writer.next_offset());
    counters.acknowledged.set(writer.next_offset());
    let (lives, life) = watch::channel(Life::default());
    let thread = LogThread::spawn(writer, name, end, lives, counters.clone())?;
    Ok(Log { thread, sink, life, epoch })
}

/// Begins new logs in a new directory.
pub(super) async fn create_logs(
    config: Option<LogConfig>,
    begin: Begin,
) -> Result<Both<LogWriter>, StdioError> {
    let from = move |stream| if stream == NAMES[0] { begin.stdout } else { begin.stderr };
    let create = move |dir, stream, limits| LogWriter::create(dir, stream, limits, from(stream));
    let exclusive = config.as_ref().is_some_and(|config| config.exclusive);
    open_logs(config, if exclusive { LogDir::create_alone } else { LogDir::create }, create).await
}

/// Opens the logs that another process has left, and completes what it was doing. Leaves out those that end in
/// another timeline; in none is the end of one that has not been connected yet.
pub(super) async fn recover_logs(
    config: Option<LogConfig>,
    timeline: u64,
) -> Result<Both<LogWriter>, StdioError> {
    let exclusive = config.as_ref().is_some_and(|config| config.exclusive);
    let open = if exclusive { LogDir::open_alone } else { LogDir::open };
    let logs = open_logs(config, open, LogWriter::recover).await?;
    Ok(logs.map(|log| log.filter(|log| [0, timeline].contains(&log.identity().timeline))))
}

async fn open_logs(
    config: Option<LogConfig>,
    open_dir: fn(&Path) -> Result<LogDir, LogError>,
    open_log: impl Fn(Arc<LogDir>, &'static str, Limits) -> Result<LogWriter, LogError> + Send + 'static,
) -> Result<Both<LogWriter>, StdioError> {
    let Some(LogConfig { dir: path, segment_bytes, segments, .. }) = config else { return Ok([None, None]) };
    let limits = Limits { segment_bytes, segments };
    let for_error = path.clone();
    // The disk may take its time, and other calls are served meanwhile.
    let opened = tokio::task::spawn_blocking(move || {
        let dir = Arc::new(open_dir(&path)?);
        let [stdout, stderr] = NAMES;
        Ok([Some(open_log(dir.clone(), stdout, limits)?), Some(open_log(dir, stderr, limits)?)])
    });
    match opened.await {
        Ok(result) => result.map_err(|e: LogError| e.into()),
        Err(e) => Err(cannot("cannot open the log in", &for_error)(io::Error::other(e))),
    }
}

/// Opens what the URIs name, and starts the log program.
pub(super) async fn open_outlets(
    config: &StdioConfig,
    stdout: Target,
    stderr: Target,
) -> Result<(Both<(Outlet, Target)>, Option<LogProgram>), StdioError> {
    let (stdout, stderr) = match (stdout, stderr) {
        (Target::Program(stdout), Target::Program(stderr)) if stdout != stderr => {
            return Err(StdioError::Uri {
                name: "stderr",
                uri: config.stderr.clone(),
                reason: "stdout and stderr must name the same log program, with the same arguments",
            });
        }
        both => both,
    };
    let program = [&stdout, &stderr].into_iter().find_map(|target| match target {
        Target::Program(program) => Some(program.clone()),
        Target::Null | Target::Path(_) | Target::File(_) => None,
    });
    let (program, mut pipes) = match program {
        None => (None, [None, None]),
        Some(program) => {
            let started = LogProgram::start(&program, &config.namespace, &config.container_id).await;
            let (running, pipes) = started.map_err(cannot("cannot start the log program", &program.path))?;
            (Some(running), [Some(pipes.stdout), Some(pipes.stderr)])
        }
    };
    let mut outlets = [None, None];
    for ((outlet, target), pipe) in outlets.iter_mut().zip([stdout, stderr]).zip(&mut pipes) {
        let opened = match (&target, pipe.take()) {
            (Target::Program(_), pipe) => pipe.map(Outlet::Pipe),
            (Target::Null, _) => None,
            (Target::Path(path) | Target::File(path), _) => {
                Outlet::open(&target).map_err(cannot("cannot open for output", path))?
            }
        };
        *outlet = opened.map(|outlet| (outlet, target));
    }
    Ok((outlets, program))
}
