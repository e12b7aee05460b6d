//! The shim's relays of one run of a sandbox, with sinks that check every byte they get.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use cube_agent::stdio::Policy;
use cube_protocol::stream::Stream;
use nix::{fcntl::OFlag, unistd::pipe2};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{
    byte_at,
    guest::{Guest, OUTPUTS, nonblocking},
    wire::{Dialled, Wire},
};
use crate::stdio::{
    Counters, Endpoint, Phase, Phases, StdinRelay,
    relay::Relay,
    sink::{self, Chunk, SinkEnd},
    source::Source,
};

/// How long a sink takes for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    Quick,
    Slow(Duration),
    Stuck,
}

/// The log of one stream, by what it would have to hold.
#[derive(Debug)]
pub(super) struct Log {
    stream: Stream,
    /// Offset of the next byte.
    pub(super) offset: u64,
    /// Where the stream goes on after a loss, and what was lost.
    pub(super) gaps: Vec<(u64, u64)>,
    /// The first thing that was not as it should be.
    pub(super) wrong: Option<String>,
}

impl Log {
    fn take(&mut self, chunk: &Chunk) {
        match chunk {
            Chunk::Identity(_) => {}
            Chunk::Gap(to) => {
                let lost = to.checked_sub(self.offset).filter(|lost| *lost > 0);
                match lost {
                    Some(lost) => self.gaps.push((*to, lost)),
                    None => self.blame(format!("a gap leads to {to}")),
                }
                self.offset = *to;
            }
            Chunk::Data(parts) => {
                for byte in parts.iter().flatten() {
                    if *byte != byte_at(self.stream, self.offset) {
                        self.blame("another byte came".into());
                    }
                    self.offset += 1;
                }
            }
        }
    }

    fn blame(&mut self, what: String) {
        let (stream, offset) = (self.stream, self.offset);
        self.wrong.get_or_insert_with(|| format!("{stream:?} at {offset}: {what}"));
    }

    pub(super) fn lost(&self) -> u64 {
        self.gaps.iter().map(|(_, lost)| lost).sum()
    }
}

/// A log that takes its time.
async fn write(mut end: SinkEnd, log: Arc<Mutex<Log>>, mut pace: watch::Receiver<Pace>) {
    while let Some(chunk) = end.chunks.recv().await {
        loop {
            let now = *pace.borrow_and_update();
            match now {
                Pace::Quick => break,
                // Either way it looks again if it is told something else meanwhile.
                Pace::Slow(time) => match timeout(time, pace.changed()).await {
                    Ok(_) => {}
                    Err(_) => break,
                },
                Pace::Stuck => drop(pace.changed().await),
            }
        }
        let offset = {
            let mut log = log.lock().unwrap();
            log.take(&chunk);
            log.offset
        };
        end.safe.send_replace(offset);
    }
}

/// The client that feeds stdin.
struct Client {
    /// `None` once it has closed its end.
    fifo: Option<File>,
    close: watch::Sender<bool>,
    fed: u64,
}

/// The shim.
pub(super) struct Host {
    pub(super) logs: [Arc<Mutex<Log>>; 2],
    counters: [Arc<Counters>; 3],
    pace: [watch::Sender<Pace>; 2],
    phase: watch::Sender<Phase>,
    client: Option<Client>,
    relays: JoinSet<()>,
    pub(super) wire: Arc<Wire>,
}

impl Host {
    /// Begins each log at what `guest` knows to be acknowledged. Input of a guest that has consumed some is
    /// left alone: nobody would have it again.
    pub(super) fn start(guest: &Guest, timeline: u64) -> Host {
        let wire = Wire::new(Arc::clone(&guest.hub));
        let phase = watch::Sender::new(Phase::Running);
        let counters = [(); 3].map(|()| Arc::<Counters>::default());
        let endpoint = |stream| Endpoint {
            container_id: "c".into(),
            exec_id: String::new(),
            stream,
            timeline,
            dial: Arc::new(Dialled(Arc::clone(&wire))),
        };
        let mut relays = JoinSet::new();
        let mut pace = Vec::new();
        let logs = [0, 1].map(|output: usize| {
            let stream = OUTPUTS[output];
            let info = guest.info(stream);
            let offset = info.acked_offset;
            let log = Arc::new(Mutex::new(Log { stream, offset, gaps: Vec::new(), wrong: None }));
            let (sink, end) = sink::channel(offset);
            let paced = watch::Sender::new(Pace::Quick);
            let relay = Relay::new(endpoint(stream), info.epoch, sink, Arc::clone(&counters[output]));
            let writing = write(end, Arc::clone(&log), paced.subscribe());
            let relaying = relay.run(Phases::new(phase.subscribe()));
            // As it is with a log: both end before the stream has.
            relays.spawn(async move {
                tokio::join!(relaying, writing);
            });
            pace.push(paced);
            log
        });
        let client = (guest.info(Stream::STDIN).acked_offset == 0).then(|| {
            let (client, source, closed) = Client::new();
            let counters = Arc::clone(&counters[2]);
            let relay = StdinRelay::new(endpoint(Stream::STDIN), source, closed, counters);
            relays.spawn(relay.run(Phases::new(phase.subscribe())));
            client
        });
        let pace = pace.try_into().unwrap();
        Host { logs, counters, pace, phase, client, relays, wire }
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
        for (output, log) in self.logs.iter().enumerate() {
            let log = log.lock().unwrap();
            if let Some(wrong) = &log.wrong {
                return Err(wrong.clone());
            }
            let info = guest.info(OUTPUTS[output]);
            if info.acked_offset > log.offset {
                return Err(format!("{info} is acknowledged, but the log ends at {}", log.offset));
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
        let given = self.counters[2].acknowledged.get();
        let consumed = guest.info(Stream::STDIN).acked_offset;
        if given > consumed {
            return Err(format!("{given} bytes of stdin are acknowledged, and {consumed} were consumed"));
        }
        Ok(())
    }

    /// Whether every output has its end in its log, and the guest all input.
    pub(super) fn is_done(&self) -> bool {
        self.relays.is_empty() && self.counters[..2].iter().all(|counters| counters.relayed.get() > 0)
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
    fn new() -> (Client, Source, watch::Receiver<bool>) {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        // A pipe that is opened by its name is a FIFO.
        let path = PathBuf::from(format!("/proc/self/fd/{}", read.as_raw_fd()));
        let source = Source::open(&path).unwrap();
        let (close, closed) = watch::channel(false);
        (Client { fifo: Some(nonblocking(write)), close, fed: 0 }, source, closed)
    }
}
