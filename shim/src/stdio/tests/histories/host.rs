//! The shim's relays of one run of a sandbox, with sinks that check every byte they get.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use cube_agent::stdio::Policy;
use cube_protocol::stream::Stream;
use nix::{fcntl::OFlag, unistd::pipe2};
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{
    byte_at,
    guest::{Guest, OUTPUTS, nonblocking},
    log::{Log, Pace, write},
    real::{Common, Real},
    wire::{Dialled, Wire},
};
use crate::stdio::{
    Counters, Endpoint, Input, Phase, Phases, Rewinder, StdinRelay, flow::Flows, relay::Relay, rewind,
    rewind::Rewind, sink, sink::Turn, source::Source,
};

/// STOP has 2 s for its answer, and the last ACK and the close after it have 2 s.
const REST_LIMIT: Duration = Duration::from_millis(4_100);

/// The client that feeds stdin.
struct Client {
    /// `None` once it has closed its end.
    fifo: Option<File>,
    close: watch::Sender<bool>,
    fed: u64,
}

/// What the outputs go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sinks {
    Simulated,
    Real,
}

/// The shim.
pub(super) struct Host {
    logs: [Arc<Mutex<Log>>; 2],
    counters: [Arc<Counters>; 3],
    pace: [watch::Sender<Pace>; 2],
    phase: watch::Sender<Phase>,
    flows: Flows,
    client: Option<Client>,
    /// Bytes of stdin that the guest had consumed at the beginning.
    consumed: u64,
    rewinders: Vec<Rewinder>,
    relays: JoinSet<()>,
    /// The sinks behind the logs, unless those are simulated.
    real: Vec<Real>,
    pub(super) wire: Arc<Wire>,
}

impl Host {
    /// Begins each log at what `guest` knows to be acknowledged. A process that `hears` has a new client.
    pub(super) fn start(guest: &Guest, timeline: u64, hears: bool, sinks: Sinks) -> Host {
        let wire = Wire::new(Arc::clone(&guest.hub));
        let phase = watch::Sender::new(Phase::Running);
        let flows = Flows::on(timeline);
        let phases = || Phases::new(phase.subscribe(), flows.watch());
        let counters = [(); 3].map(|()| Arc::<Counters>::default());
        let endpoint = |stream| Endpoint {
            container_id: "c".into(),
            exec_id: String::new(),
            stream,
            attempt: guest.info(stream).attempt,
            dial: Arc::new(Dialled(Arc::clone(&wire))),
        };
        let mut relays = JoinSet::new();
        let (mut pace, mut rewinders, mut real) = (Vec::new(), Vec::new(), Vec::new());
        let logs = [0, 1].map(|output: usize| {
            let stream = OUTPUTS[output];
            let info = guest.info(stream);
            let offset = info.acked_offset;
            let log = Log::new(stream, offset);
            let (sink, end) = sink::channel(offset);
            let paced = watch::Sender::new(Pace::Quick);
            let counters = Arc::clone(&counters[output]);
            let (rewinder, rewinds) = rewind::channel();
            rewinders.push(rewinder);
            let common = Common::new(stream, &log, &sink, &counters);
            let relay = Relay::new(endpoint(stream), info.epoch, sink, flows.join(), rewinds, counters);
            let relaying = relay.run(phases());
            let reader = paced.subscribe();
            match sinks {
                // As it is with a log: both end before the stream has.
                Sinks::Simulated => {
                    let writing = write(end, Arc::clone(&log), reader);
                    relays.spawn(async move { _ = tokio::join!(relaying, writing) });
                }
                // A reader alone cannot tell a loss from an error.
                Sinks::Real if output == 0 || guest.policy == Policy::DropOldest => {
                    let (disk, writing) = Real::disk(common, end, reader, phases(), &mut relays);
                    relays.spawn(async move { _ = tokio::join!(relaying, writing.run()) });
                    real.push(disk);
                }
                Sinks::Real => {
                    real.push(Real::reader(common, end, reader, phases(), &mut relays));
                    relays.spawn(relaying);
                }
            }
            pace.push(paced);
            log
        });
        let consumed = guest.info(Stream::STDIN).acked_offset;
        let client = hears.then(|| {
            let (client, input) = Client::new();
            let (rewinder, rewinds) = rewind::channel();
            rewinders.push(rewinder);
            let counters = Arc::clone(&counters[2]);
            let endpoint = endpoint(Stream::STDIN);
            let relay = StdinRelay::new(endpoint, input, consumed, flows.join(), rewinds, counters);
            relays.spawn(relay.run(phases()));
            client
        });
        let pace = pace.try_into().unwrap();
        Host { logs, counters, pace, phase, flows, client, consumed, rewinders, relays, real, wire }
    }

    /// Brings every stream to rest. Whatever hangs, that takes no longer than a guest may take for STOP, the
    /// last ACK and the close.
    pub(super) async fn rest(&self) -> Result<(), String> {
        let late = |_| format!("the streams are not at rest after {REST_LIMIT:?}");
        timeout(REST_LIMIT, self.flows.rest()).await.map_err(late)
    }

    /// Lets them flow again.
    pub(super) fn flow(&self, timeline: u64) {
        self.flows.flow(timeline);
    }

    /// Bytes of its client that a process is known to have got.
    pub(super) fn given(&self) -> u64 {
        self.counters[2].stored.get()
    }

    /// Has the streams, at rest, go on where `guest` is, on another timeline.
    pub(super) async fn rewind(&mut self, guest: &Guest, timeline: u64) {
        self.consumed = guest.info(Stream::STDIN).acked_offset;
        self.wire.lead_to(&guest.hub);
        let streams = OUTPUTS.into_iter().chain([Stream::STDIN]);
        for (stream, rewinder) in streams.zip(&self.rewinders) {
            let info = guest.info(stream);
            let (done, told) = oneshot::channel();
            let turn = Turn { to: info.acked_offset, timeline };
            rewinder.send(Rewind { turn, attempt: info.attempt, done }).unwrap();
            told.await.unwrap().unwrap();
        }
        for (stream, real) in OUTPUTS.into_iter().zip(&mut self.real) {
            real.rewound(guest.info(stream).acked_offset);
        }
    }

    /// The log of an output, as it is now.
    pub(super) fn log(&self, output: usize) -> MutexGuard<'_, Log> {
        if let Some(real) = self.real.get(output) {
            real.look();
        }
        self.logs[output].lock().unwrap()
    }

    /// Once all streams have ended: whether every byte is where it belongs.
    pub(super) fn verify(&self) -> Result<(), String> {
        self.real.iter().try_for_each(Real::verify)
    }

    pub(super) fn pace(&self, output: usize, pace: Pace) {
        self.pace[output].send_replace(pace);
    }

    /// The client writes `len` bytes, or as many as the FIFO takes.
    pub(super) fn feed(&mut self, len: u64) {
        let Some(Client { fifo: Some(fifo), fed, .. }) = &mut self.client else { return };
        let bytes: Vec<u8> = (*fed..*fed + len).map(|offset| byte_at(Stream::STDIN, offset)).collect();
        match fifo.write(&bytes) {
            Ok(written) => *fed += written as u64,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => panic!("nobody reads the FIFO: {e}"),
        }
    }

    /// CloseIO.
    pub(super) fn close_stdin(&mut self) {
        if let Some(client) = &mut self.client {
            client.close.send_replace(true);
            client.fifo = None;
        }
    }

    /// What the client has written, if this host has a stdin.
    pub(super) fn fed(&self) -> Option<u64> {
        self.client.as_ref().map(|client| client.fed)
    }

    /// What must hold at any time.
    pub(super) fn check(&self, guest: &Guest) -> Result<(), String> {
        for (output, stream) in OUTPUTS.into_iter().enumerate() {
            let log = self.log(output);
            if let Some(wrong) = &log.wrong {
                return Err(wrong.clone());
            }
            let info = guest.info(stream);
            if info.acked_offset > log.safe {
                return Err(format!("{info} is acknowledged, but the log is safe up to {}", log.safe));
            }
            if guest.policy == Policy::Block && log.lost() > 0 {
                return Err(format!("{:?} was dropped from a stream that drops nothing", log.gaps));
            }
        }
        for counters in &self.counters {
            if counters.refused.get() > 0 {
                return Err("host and guest accuse each other".into());
            }
        }
        if self.client.is_none() && guest.info(Stream::STDIN).acked_offset > self.consumed {
            return Err("the process has got input that was forgotten with the old timeline".into());
        }
        let given = self.counters[2].acknowledged.get();
        let consumed = guest.info(Stream::STDIN).acked_offset;
        if given > consumed {
            return Err(format!("{given} bytes of stdin are acknowledged, and {consumed} were consumed"));
        }
        Ok(())
    }

    /// Which outputs have a connection.
    pub(super) fn connected(&self) -> [bool; 2] {
        [0, 1].map(|output| self.counters[output].connected.get() > 0)
    }

    /// What must hold at rest of a stream that `tells` the guest: it knows of everything that is in the log.
    pub(super) fn check_rest(&self, guest: &Guest, tells: [bool; 2]) -> Result<(), String> {
        for ((output, stream), tells) in OUTPUTS.into_iter().enumerate().zip(tells) {
            let (info, log) = (guest.info(stream), self.log(output));
            if tells && info.acked_offset != log.safe {
                return Err(format!("at rest {info} is not where its log is, at {}", log.safe));
            }
        }
        Ok(())
    }

    /// Whether every output has its end in its log, and the guest all input.
    pub(super) fn is_done(&self) -> bool {
        let streams = if self.client.is_some() { 3 } else { 2 };
        self.counters[..streams].iter().all(|counters| counters.relayed.get() > 0)
            && self.real.iter().all(Real::is_done)
    }

    /// Lets what has ended go.
    pub(super) fn reap(&mut self) {
        while let Some(ended) = self.relays.try_join_next() {
            ended.unwrap();
        }
    }

    /// Delete whose time is over: everything ends at once, whoever hangs.
    pub(super) async fn abandon(mut self) -> Result<(), String> {
        self.phase.send_replace(Phase::Abandoned);
        self.real.iter().for_each(Real::abandon);
        // A sink that hangs is told by its owner.
        for pace in &self.pace {
            pace.send_replace(Pace::Quick);
        }
        let began = Instant::now();
        let end = async { while self.relays.join_next().await.is_some() {} };
        let ended = timeout(Duration::from_secs(1), end).await;
        if ended.is_err() || began.elapsed() > Duration::from_millis(100) {
            return Err(format!("abandoned relays took {:?} to end", began.elapsed()));
        }
        Ok(())
    }
}

impl Client {
    fn new() -> (Client, Input) {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        // A pipe that is opened by its name is a FIFO.
        let path = PathBuf::from(format!("/proc/self/fd/{}", read.as_raw_fd()));
        let source = Source::open(&path).unwrap();
        let (close, closed) = watch::channel(false);
        let client = Client { fifo: Some(nonblocking(write)), close, fed: 0 };
        (client, Input { path, source, close: closed })
    }
}
