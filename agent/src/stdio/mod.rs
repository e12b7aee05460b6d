//! stdio of the processes in the guest: pipes, retention rings, and the server of the stream port.
//!
//! ```text
//!  child --pipe--> Output::pump --> Ring --> Connection::transmit --> host     (output.rs, ring.rs)
//!  child <--pipe-- Input::pump <-- window <-- Connection::receive <-- host     (input.rs)
//! ```
//!
//! A stream outlives its connections: the pump runs whether or not a host is there, and a connection
//! (`server.rs`) only reads and moves positions in the stream's state. That state is a machine without
//! I/O of its own, behind one lock that is never held across an await.

#[cfg(feature = "fuzzing")]
mod fork;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod input;
mod losses;
mod output;
mod pipe;
mod pool;
mod process;
mod ring;
mod server;
mod session;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use cube_protocol::{
    guest::StreamInfo,
    stream::{self, ErrorCode},
};
use tokio::io::{
    AsyncRead, AsyncWrite, Interest,
    unix::{AsyncFd, AsyncFdRegisterError},
};

use self::{
    input::Input,
    output::{Leftover, Output},
    pool::Pool,
    process::{Endpoint, Process, Terminal},
    session::Refusal,
};
use crate::guest::active_clock::ActiveClock;

/// How long a process that outlives the one that has exited may go on writing to its output. What it waits
/// for the host to take something does not count.
const LEFTOVER_TIMEOUT: Duration = Duration::from_secs(2);

/// How often it is looked at meanwhile: nothing tells whether somebody waits for room in a pipe.
const LEFTOVER_LOOK: Duration = Duration::from_millis(100);

/// Names a process: its container, and its exec id or "" for the init process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the init process.
    pub exec: String,
}

/// What happens to a writer whose output nobody takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// It waits when ring and pipe are full.
    Block,
    /// It never waits; the oldest unacknowledged output is dropped and counted.
    DropOldest,
}

/// Which streams a process gets. The others are /dev/null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// A pseudo terminal: `stdin` and `stdout` are its two directions, `stderr` must be false.
    pub terminal: bool,
    /// Input from the host.
    pub stdin: bool,
    /// Output to the host.
    pub stdout: bool,
    /// Error output to the host.
    pub stderr: bool,
    /// For both output streams.
    pub policy: Policy,
}

/// The ends of the pipes that the child gets. Whoever holds this closes it right after the child
/// is spawned: an end that stays open in the agent would keep EOF from ever coming.
#[derive(Debug)]
pub enum ChildStdio {
    /// fds 0, 1 and 2 of the child; blocking.
    Pipes([OwnedFd; 3]),
    /// The init stage allocates the terminal in the container's devpts and sends the master.
    Terminal,
}

/// Bounds on memory; see docs/architecture.md.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes that all rings together may hold beyond their floors.
    pub ring_budget: usize,
    /// Processes with stdio at once.
    pub processes: usize,
}

/// Why a process cannot have the stdio it asked for.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The id is in use.
    #[error("process {0:?} has stdio already")]
    AlreadyExists(ProcessId),
    /// There is no such process.
    #[error("process {0:?} has no stdio")]
    NotFound(ProcessId),
    /// [`Limits::processes`] is reached.
    #[error("{0} processes have stdio already, which is the limit: delete one first")]
    Exhausted(usize),
    /// Resize of a process without a terminal.
    #[error("process {0:?} has no terminal")]
    NoTerminal(ProcessId),
    /// A system call failed.
    #[error("{action}")]
    Io {
        /// What was done.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// All streams of the guest. One per agent; needs a tokio runtime.
#[derive(Debug)]
pub struct Hub {
    limits: Limits,
    timeline: AtomicU64,
    clock: Arc<ActiveClock>,
    pool: Arc<Pool>,
    processes: Mutex<HashMap<ProcessId, Process>>,
    /// Connections being served.
    connections: AtomicUsize,
    /// [`Totals::refused_connections`].
    refused: AtomicU64,
}

impl Hub {
    /// A hub without processes on `timeline`.
    pub fn new(limits: Limits, timeline: u64) -> Arc<Hub> {
        let clock = ActiveClock::start();
        Arc::new(Hub {
            limits,
            timeline: AtomicU64::new(timeline),
            pool: Pool::new(limits.ring_budget, Arc::clone(&clock)),
            clock,
            processes: Mutex::default(),
            connections: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// Makes the streams of a process that is about to be spawned. Undo with [`Hub::close`].
    ///
    /// # Errors
    ///
    /// [`StdioError::AlreadyExists`], [`StdioError::Exhausted`], and [`StdioError::Io`] when the
    /// kernel has no pipe to give. Nothing is left then.
    pub fn open(self: &Arc<Self>, process: &ProcessId, request: Request) -> Result<ChildStdio, StdioError> {
        debug_assert!(!(request.terminal && request.stderr), "a terminal has one output");
        let mut processes = locked(&self.processes);
        if processes.contains_key(process) {
            return Err(StdioError::AlreadyExists(process.clone()));
        }
        if processes.len() >= self.limits.processes {
            return Err(StdioError::Exhausted(processes.len()));
        }
        let (streams, child) = match request.terminal {
            true => (self.promise_terminal(request)?, ChildStdio::Terminal),
            false => self.make_pipes(request)?,
        };
        processes.insert(process.clone(), streams);
        Ok(child)
    }

    /// Hands over the master of the terminal that [`ChildStdio::Terminal`] promised.
    ///
    /// # Errors
    ///
    /// [`StdioError::NotFound`], [`StdioError::NoTerminal`] also for one that has its master
    /// already, and [`StdioError::Io`].
    pub fn attach_terminal(self: &Arc<Self>, process: &ProcessId, master: OwnedFd) -> Result<(), StdioError> {
        let mut processes = locked(&self.processes);
        let streams = processes.get_mut(process).ok_or_else(|| StdioError::NotFound(process.clone()))?;
        let Some(Terminal::Promised { window }) = streams.terminal else {
            return Err(StdioError::NoTerminal(process.clone()));
        };
        let set_up = || {
            pipe::set_nonblocking(&master)?;
            window.map_or(Ok(()), |(width, height)| pipe::set_window(&master, width, height))
        };
        set_up().map_err(failed("cannot set up the master of the terminal"))?;
        let master = watch(master, Interest::READABLE | Interest::WRITABLE)?;
        streams.terminal = Some(Terminal::Attached(Arc::clone(&master)));
        if let Some(stdin) = &streams.stdin {
            stdin.attach(Arc::clone(&master));
        }
        match &streams.stdout {
            Some(stdout) => stdout.attach(master),
            None => self.discard(master),
        }
        Ok(())
    }

    /// Sets the window size in characters. Before the terminal is attached, it is kept until then.
    ///
    /// # Errors
    ///
    /// [`StdioError::NotFound`], [`StdioError::NoTerminal`], and [`StdioError::Io`].
    pub fn resize(&self, process: &ProcessId, width: u16, height: u16) -> Result<(), StdioError> {
        let mut processes = locked(&self.processes);
        let streams = processes.get_mut(process).ok_or_else(|| StdioError::NotFound(process.clone()))?;
        match &mut streams.terminal {
            None => Err(StdioError::NoTerminal(process.clone())),
            Some(Terminal::Promised { window }) => {
                *window = Some((width, height));
                Ok(())
            }
            Some(Terminal::Attached(master)) => pipe::set_window(&**master, width, height)
                .map_err(failed("cannot set the window size of the terminal")),
        }
    }

    /// The process has exited. Streams that another process still holds end after 2 s, TRUNCATED,
    /// with all that was written by then. Time in which it waits, for the host takes nothing, does not count.
    /// Does nothing for a process that is not known.
    pub fn exited(self: &Arc<Self>, process: &ProcessId) {
        let outputs: Vec<_> = match locked(&self.processes).get(process) {
            Some(streams) => streams.outputs().cloned().collect(),
            None => return,
        };
        let clock = Arc::clone(&self.clock);
        tokio::spawn(async move {
            let mut left = LEFTOVER_TIMEOUT;
            while !left.is_zero() {
                let began = clock.now();
                clock.sleep(left.min(LEFTOVER_LOOK)).await;
                let who: Vec<_> = outputs.iter().map(|output| output.leftover()).collect();
                if who.iter().all(|who| *who == Leftover::Nobody) {
                    return;
                }
                if !who.contains(&Leftover::HeldUp) {
                    left = left.saturating_sub(clock.now().saturating_sub(began));
                }
            }
            for output in outputs {
                output.expire();
            }
        });
    }

    /// Forgets a process and drops what the host has not taken: Delete, or a spawn that failed.
    /// Its connections get `NOT_FOUND`. Does nothing for a process that is not known.
    pub fn close(&self, process: &ProcessId) {
        let Some(streams) = locked(&self.processes).remove(process) else { return };
        streams.outputs().for_each(|output| output.close());
        if let Some(stdin) = streams.stdin {
            stdin.close();
        }
    }

    /// Serves one connection of the stream port until it ends. The caller has checked the peer.
    pub async fn serve<S>(self: Arc<Self>, connection: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        server::serve(self, connection).await;
    }

    /// The clock of every timer that changes state.
    pub fn clock(&self) -> &Arc<ActiveClock> {
        &self.clock
    }

    /// Stops the clock, and the dropping of output: the writers stand still, and what they have
    /// written can wait. Streams are served as ever. Can be repeated.
    pub fn hold(&self) {
        self.clock.hold();
    }

    /// Ends a [`Hub::hold`]. Can be repeated.
    pub fn release(&self) {
        self.clock.release();
        for streams in locked(&self.processes).values() {
            streams.outputs().for_each(|output| output.go_on());
        }
    }

    /// The run that this guest is on.
    pub fn timeline(&self) -> u64 {
        self.timeline.load(Ordering::Relaxed)
    }

    /// Begins the run `timeline`. Connections that belong to the one before end with
    /// `OTHER_TIMELINE`; input that they have brought and no process has got is forgotten. Nothing
    /// else changes: a clone goes on with epochs, offsets and attempts.
    pub fn begin_timeline(&self, timeline: u64) {
        let old = self.timeline.swap(timeline, Ordering::Relaxed);
        if old == timeline {
            return;
        }
        let refusal = Refusal::other_timeline(timeline, old);
        for streams in locked(&self.processes).values() {
            streams.outputs().for_each(|output| output.end_connections(&refusal));
            if let Some(stdin) = &streams.stdin {
                stdin.end_connections(&refusal);
            }
        }
    }

    /// Every stream, for `Guest.Info` and `Guest.Quiesce`.
    pub fn streams(&self) -> Vec<StreamInfo> {
        let processes = locked(&self.processes);
        processes.iter().flat_map(|(process, streams)| streams.infos(process)).collect()
    }

    /// Bytes that the rings hold, and connections refused for malformed frames.
    pub fn totals(&self) -> Totals {
        Totals {
            ring_bytes: self.pool.held_bytes(),
            refused_connections: self.refused.load(Ordering::Relaxed),
        }
    }

    fn promise_terminal(&self, request: Request) -> Result<Process, StdioError> {
        Ok(Process {
            stdin: request.stdin.then(|| Ok(Input::new(new_epoch()?, true))).transpose()?,
            stdout: request.stdout.then(|| self.new_output(request.policy)).transpose()?,
            stderr: None,
            terminal: Some(Terminal::Promised { window: None }),
        })
    }

    fn make_pipes(&self, request: Request) -> Result<(Process, ChildStdio), StdioError> {
        let stdin = request.stdin.then(|| {
            let (agent, child) = pipe::input().map_err(failed("cannot make a pipe for stdin"))?;
            Ok((Input::new(new_epoch()?, false), watch(agent, Interest::WRITABLE)?, child))
        });
        let output = |wanted: bool| {
            let make = || {
                let (agent, child) = pipe::output().map_err(failed("cannot make a pipe for output"))?;
                Ok((self.new_output(request.policy)?, watch(agent, Interest::READABLE)?, child))
            };
            wanted.then(make).transpose()
        };
        let (stdin, stdout, stderr) = (stdin.transpose()?, output(request.stdout)?, output(request.stderr)?);
        let (null_in, null_out, null_err) = (null()?, null()?, null()?);

        // Nothing fails from here on, so that no task is left for a stream that never was.
        let mut streams = Process::default();
        let stdin = stdin.map_or(null_in, |(input, sink, child)| {
            input.attach(sink);
            streams.stdin = Some(input);
            child
        });
        let begin = |output: Option<_>, null, slot: &mut Option<Arc<Output>>| match output {
            Some((output, source, child)) => {
                let output: &mut Arc<Output> = slot.insert(output);
                output.attach(source);
                child
            }
            None => null,
        };
        let stdout = begin(stdout, null_out, &mut streams.stdout);
        let stderr = begin(stderr, null_err, &mut streams.stderr);
        Ok((streams, ChildStdio::Pipes([stdin, stdout, stderr])))
    }

    fn new_output(&self, policy: Policy) -> Result<Arc<Output>, StdioError> {
        Ok(Output::new(new_epoch()?, policy, Arc::clone(&self.pool), Arc::clone(&self.clock)))
    }

    /// Drains a terminal whose output nobody wants: its programs would wait otherwise.
    fn discard(&self, master: Arc<AsyncFd<OwnedFd>>) {
        let nowhere = Output::new(0, Policy::Block, Arc::clone(&self.pool), Arc::clone(&self.clock));
        nowhere.close();
        nowhere.attach(master);
    }

    fn endpoint(&self, process: &ProcessId, wanted: stream::Stream) -> Option<Endpoint> {
        locked(&self.processes).get(process)?.endpoint(wanted)
    }

    /// Counts a connection whose host broke the protocol.
    fn count(&self, refusal: &Refusal) {
        if refusal.code == ErrorCode::PROTOCOL {
            tracing::warn!("stream connection broke the protocol: {}", refusal.message);
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Figures over all streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Bytes allocated by rings.
    pub ring_bytes: usize,
    /// Connections closed because of a malformed frame, or silent for 10 s.
    pub refused_connections: u64,
}

/// Locks `mutex`. A panic elsewhere leaves no state half-changed that the next caller could not use.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> StdioError {
    move |source| StdioError::Io { action, source }
}

fn null() -> Result<OwnedFd, StdioError> {
    pipe::null().map_err(failed("cannot open /dev/null"))
}

fn watch(fd: OwnedFd, interest: Interest) -> Result<Arc<AsyncFd<OwnedFd>>, StdioError> {
    // SAFETY: an OwnedFd is open and stays the same descriptor until it is dropped, which the
    // AsyncFd that owns it does last.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    let refused = |error: AsyncFdRegisterError<_>| failed("cannot watch a pipe or terminal")(error.into());
    Ok(Arc::new(watched.map_err(refused)?))
}

/// A random id, not 0: that says "not known" in OPEN.
fn new_epoch() -> Result<u64, StdioError> {
    let epoch = getrandom::u64().map_err(|error| failed("cannot draw a random epoch")(error.into()))?;
    Ok(epoch.max(1))
}
