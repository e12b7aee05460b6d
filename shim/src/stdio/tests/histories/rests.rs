//! Readers that read at random, rest, leave, come back and die, against the output of an init process, which a
//! log keeps, of an exec and of a terminal, which nothing keeps: when an exit is told, and what has arrived.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use cube_agent::stdio::{ChildStdio, Hub, Limits, Policy, ProcessId, Request};
use cube_protocol::stream::Stream;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{mkfifo, pipe2},
};
use proptest::{prelude::*, test_runner::TestRunner};
use tempfile::TempDir;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    byte_at,
    guest::nonblocking,
    record, simulated,
    wire::{Dialled, Wire},
};
use crate::{
    log::{dir::LogDir, writer},
    stdio::{
        Counters, Endpoint, Phase, Phases, TAKEN_LIMIT,
        direct::Direct,
        feed::Feed,
        fifo::PipeWriter,
        flow::Flows,
        log_sink,
        opens::Opens,
        outlet::Outlet,
        relay::Relay,
        rewind,
        sink::{self, Life},
        taken,
        uri::Target,
    },
};

const TIMELINE: u64 = 1;

/// Nothing is rotated away, which it would be while nobody is there.
const LOG: writer::Limits = writer::Limits { segment_bytes: 16 << 20, segments: 4 };

/// What a pipe of the process holds: with the ring of 64 KiB less than most of them write.
const PIPE: i32 = 16 << 10;

/// inotify is of another clock: who comes back is looked for once a second.
static OPENS: Opens = Opens::new(|| Err(io::Error::from_raw_os_error(libc::EMFILE)));

/// How long after its reason an exit may be told: a first reader is waited for for half a second.
const TOLD_LIMIT: Duration = Duration::from_secs(2);

/// How finely the test looks.
const STEP: Duration = Duration::from_millis(100);

/// Whose output it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Init,
    Exec,
    Terminal,
}

impl Kind {
    fn stream(self) -> Stream {
        if self == Kind::Terminal { Stream::TERMINAL } else { Stream::STDOUT }
    }
}

#[derive(Debug, Clone)]
enum Action {
    /// The reader comes, if there is none.
    Attach,
    /// It goes, or is killed.
    Leave,
    Read {
        bytes: usize,
    },
    /// Nobody does anything but the process.
    Rest {
        millis: u64,
    },
    /// A signal that asks for the end. A process that has not exited dies of it.
    Kill,
    /// The sandbox stands still.
    Pause {
        millis: u64,
    },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => Just(Action::Attach),
        2 => Just(Action::Leave),
        8 => prop_oneof![1..5_000usize, 1..200_000usize].prop_map(|bytes| Action::Read { bytes }),
        5 => prop_oneof![1..1_000u64, 1..30_000u64].prop_map(|millis| Action::Rest { millis }),
        1 => Just(Action::Kill),
        1 => (1..10_000u64).prop_map(|millis| Action::Pause { millis }),
    ]
}

/// An exit that was told.
#[derive(Debug, Clone, Copy)]
struct Told {
    at: Instant,
    /// Bytes that the FIFO had been given by then.
    written: u64,
}

struct World {
    kind: Kind,
    hub: Arc<Hub>,
    /// The process's end; `None` once it has exited.
    output: Option<File>,
    /// Bytes that it writes in all, and has written.
    total: u64,
    wrote: u64,
    fifo: PathBuf,
    fifo_size: i32,
    reader: Option<File>,
    read: u64,
    has_end: bool,
    exited: Option<Instant>,
    end_wanted: Option<Instant>,
    /// Since when there is no reader, and whether there was none at any time since the exit.
    absent: Option<Instant>,
    was_absent: bool,
    told: Arc<Mutex<Option<Told>>>,
    counters: Arc<Counters>,
    phase: watch::Sender<Phase>,
    flows: Flows,
    tasks: JoinSet<()>,
    _dir: TempDir,
}

impl World {
    fn new(kind: Kind, total: u64, fifo_size: i32) -> World {
        let hub = Hub::new(Limits { ring_budget: 0, processes: 1 }, TIMELINE);
        let output = start(&hub, kind);
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let fifo = dir.path().join("fifo");
        mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let outlet = Some(Outlet::Pipe(PipeWriter::open_with(&fifo, &OPENS).unwrap()));

        let (phase, flows) = (watch::Sender::new(Phase::Running), Flows::on(TIMELINE));
        let phases = Phases::new(phase.subscribe(), flows.watch());
        let counters = Arc::<Counters>::default();
        let endpoint = Endpoint {
            container_id: "c".into(),
            exec_id: String::new(),
            stream: kind.stream(),
            attempt: 0,
            dial: Arc::new(Dialled(Wire::new(Arc::clone(&hub)))),
        };
        let (sink, end) = sink::channel(0);
        let (_, rewinds) = rewind::channel();
        let (counted, mut tasks) = (Arc::clone(&counters), JoinSet::new());
        if kind == Kind::Init {
            let log = LogDir::create(&dir.path().join("log")).unwrap();
            let writer = writer::LogWriter::create(Arc::new(log), "stdout", LOG, 0).unwrap();
            let retained = writer.retained();
            retained.hold(0);
            let (lives, life) = watch::channel(Life::default());
            let feed = Feed {
                name: "stdout",
                retained,
                grown: end.safe.subscribe(),
                life,
                rewinds: 0,
                outlet,
                target: Target::Null,
                counters: Arc::clone(&counters),
                phases: phases.clone(),
                position: 0,
            };
            tasks.spawn(feed.run());
            let log = log_sink::Log::new(writer, "stdout", end, lives, Arc::clone(&counters));
            let relaying = Relay::new(endpoint, 0, sink, flows.join(), rewinds, counted).run(phases);
            // As it is with a log: both end before the stream has.
            tasks.spawn(async move { _ = tokio::join!(relaying, log.run()) });
        } else {
            let direct = Direct::new("stdout", outlet, Target::Null, Arc::clone(&counters), phases.clone());
            tasks.spawn(direct.run(end));
            tasks.spawn(Relay::new(endpoint, 0, sink, flows.join(), rewinds, counted).run(phases));
        }
        World {
            kind,
            hub,
            output: Some(output),
            total,
            wrote: 0,
            fifo,
            fifo_size,
            reader: None,
            read: 0,
            has_end: false,
            exited: None,
            end_wanted: None,
            absent: Some(Instant::now()),
            was_absent: false,
            told: Arc::default(),
            counters,
            phase,
            flows,
            tasks,
            _dir: dir,
        }
    }

    async fn act(&mut self, action: &Action) -> Result<(), String> {
        match action {
            Action::Attach => self.attach(),
            Action::Leave => {
                self.absent.get_or_insert_with(Instant::now);
                self.was_absent |= self.exited.is_some();
                self.reader = None;
            }
            Action::Read { bytes } => self.read(*bytes).await?,
            Action::Rest { millis } => self.pass(Duration::from_millis(*millis)).await?,
            Action::Kill => {
                if self.output.is_some() {
                    self.total = self.wrote;
                    self.exit();
                }
                self.end_wanted.get_or_insert_with(Instant::now);
                self.phase.send_if_modified(|phase| phase.advance(Phase::Ended));
            }
            Action::Pause { millis } => self.pause(Duration::from_millis(*millis)).await?,
        }
        self.check(false)
    }

    fn attach(&mut self) {
        if self.reader.is_some() || self.has_end {
            return;
        }
        let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&self.fifo).unwrap();
        // Refused while there is more in it.
        let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(self.fifo_size));
        (self.reader, self.absent) = (Some(reader), None);
    }

    /// The process writes what its pipe takes, and exits when it is done.
    fn run(&mut self) {
        let Some(output) = &mut self.output else { return };
        let stream = self.kind.stream();
        while self.wrote < self.total {
            let until = self.total.min(self.wrote + (8 << 10));
            let bytes: Vec<u8> = (self.wrote..until).map(|offset| byte_at(stream, offset)).collect();
            match output.write(&bytes) {
                Ok(written) => self.wrote += written as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => panic!("the agent has closed the output: {e}"),
            }
        }
        self.exit();
    }

    fn exit(&mut self) {
        self.output = None;
        self.hub.exited(&id());
        self.exited = Some(Instant::now());
        self.was_absent = self.reader.is_none();
        self.phase.send_if_modified(|phase| phase.advance(|times| Phase::Exited(times.exit)));
        let phases = Phases::new(self.phase.subscribe(), self.flows.watch());
        let (counters, told) = (Arc::clone(&self.counters), Arc::clone(&self.told));
        self.tasks.spawn(async move {
            taken(std::slice::from_ref(&counters), phases).await;
            *told.lock().unwrap() = Some(Told { at: Instant::now(), written: counters.written.get() });
        });
    }

    async fn pass(&mut self, time: Duration) -> Result<(), String> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.run();
            sleep(STEP.min(until - Instant::now())).await;
            self.check(false)?;
        }
        Ok(())
    }

    /// Reads so much, or what comes within a few steps.
    async fn read(&mut self, bytes: usize) -> Result<(), String> {
        let mut left = bytes;
        let mut buffer = vec![0; 64 << 10];
        let until = Instant::now() + STEP * 3;
        while left > 0 && Instant::now() < until {
            let Some(reader) = &mut self.reader else { return Ok(()) };
            let most = left.min(buffer.len());
            match reader.read(&mut buffer[..most]) {
                // Nobody has written yet, or nobody will any more.
                Ok(0) => {
                    self.has_end = true;
                    return Ok(());
                }
                Ok(n) => {
                    for byte in &buffer[..n] {
                        if *byte != byte_at(self.kind.stream(), self.read) {
                            return Err(format!("another byte came at {}", self.read));
                        }
                        self.read += 1;
                    }
                    left -= n;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.run();
                    sleep(Duration::from_millis(1)).await;
                }
                Err(e) => panic!("{e}"),
            }
        }
        Ok(())
    }

    async fn pause(&mut self, time: Duration) -> Result<(), String> {
        self.hub.hold();
        let late = |_| "the streams do not come to rest".to_owned();
        timeout(Duration::from_secs(5), self.flows.rest()).await.map_err(late)?;
        sleep(time).await;
        self.flows.flow(TIMELINE);
        self.hub.release();
        // What is due is due from now on.
        self.absent = self.absent.map(|_| Instant::now());
        self.check(false)
    }

    /// What must hold at any time; `due` if it has been waited for long enough whatever may be told.
    fn check(&self, due: bool) -> Result<(), String> {
        let (told, now) = (*self.told.lock().unwrap(), Instant::now());
        let Some(exited) = self.exited else { return Ok(()) };
        if let Some(told) = told {
            let given = told.written == self.total;
            let wanted = self.end_wanted.is_some_and(|at| at <= told.at);
            return match given || wanted || self.was_absent {
                true => Ok(()),
                false => {
                    let (total, read) = (self.total, self.read);
                    Err(format!("{told:?}, with a reader that has read {read} of {total} bytes"))
                }
            };
        }
        let past = |since: Instant, limit: Duration| now > since.max(exited) + limit + STEP;
        if self.end_wanted.is_some_and(|at| past(at, TAKEN_LIMIT)) {
            return Err("nothing is told to who wants the end".into());
        }
        if self.absent.is_some_and(|at| past(at, TOLD_LIMIT)) {
            return Err("an exit waits for a reader that is not there".into());
        }
        match due {
            true => Err("an exit is never told".into()),
            false => Ok(()),
        }
    }

    /// The reader comes back and takes everything.
    async fn finish(mut self) -> Result<(), String> {
        self.attach();
        let began = Instant::now();
        while !self.has_end {
            if began.elapsed() > Duration::from_secs(60) {
                return Err(format!("no end after {} of {} bytes", self.read, self.total));
            }
            self.run();
            self.read(usize::MAX).await?;
            self.check(false)?;
        }
        // A FIFO is closed for one that was not there, or took nothing when the end was wanted.
        let excused = self.was_absent || self.end_wanted.is_some();
        if self.read != self.total && !excused || self.output.is_some() {
            return Err(format!("{} of {} bytes have arrived, and the end", self.read, self.total));
        }
        sleep(TOLD_LIMIT + STEP).await;
        self.check(true)?;
        self.phase.send_if_modified(|phase| phase.advance(Phase::Finishing));
        let end = async { while self.tasks.join_next().await.is_some() {} };
        // What a reader that was given up has left is dropped with the process.
        if timeout(Duration::from_secs(5), end).await.is_err() && !excused {
            return Err("the streams do not end".into());
        }
        Ok(())
    }
}

fn id() -> ProcessId {
    ProcessId { container: "c".into(), exec: String::new() }
}

/// Gives the process's end of its output. A terminal is a pipe here: what a real one holds is the kernel's to
/// move, which has a clock of its own.
fn start(hub: &Arc<Hub>, kind: Kind) -> File {
    let terminal = kind == Kind::Terminal;
    let request = Request { terminal, stdin: false, stdout: true, stderr: false, policy: Policy::Block };
    let output = match hub.open(&id(), request).unwrap() {
        ChildStdio::Pipes([_, stdout, _]) => stdout,
        ChildStdio::Terminal => {
            let (master, slave) = pipe2(OFlag::O_CLOEXEC).unwrap();
            hub.attach_terminal(&id(), master).unwrap();
            slave
        }
    };
    fcntl(&output, FcntlArg::F_SETPIPE_SZ(PIPE)).unwrap();
    nonblocking(output)
}

/// Runs in `make test`, and in `make soak`.
const COUNT: u32 = 300;
const SOAK_COUNT: u32 = 10_000;

#[test]
fn a_reader_that_is_there_gets_every_byte_before_the_exit_is_told_however_it_rests() {
    let cases = if std::env::var_os("CUBE_SOAK").is_some() { SOAK_COUNT } else { COUNT };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let kind = prop_oneof![Just(Kind::Init), Just(Kind::Exec), Just(Kind::Terminal)];
    let total = prop_oneof![1 => 0..70_000u64, 3 => 100_000..500_000u64];
    let fifo_size = prop_oneof![Just(4 << 10), Just(16 << 10), Just(64 << 10)];
    let actions = prop::collection::vec(action(), 1..24);
    let began = std::time::Instant::now();
    let result = TestRunner::new(config).run(
        &(kind, total, fifo_size, actions),
        |(kind, total, fifo_size, actions)| {
            let outcome = simulated(async {
                let mut world = World::new(kind, total, fifo_size);
                for action in &actions {
                    world.act(action).await?;
                }
                world.finish().await
            });
            outcome.map_err(TestCaseError::fail)
        },
    );
    if let Err(failure) = result {
        panic!("{failure}");
    }
    record("readers that rest, random histories", cases, began.elapsed());
}
