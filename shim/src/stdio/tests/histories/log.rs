//! The far end of an output relay: a log that looks at every byte it gets, and takes its time.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use cube_protocol::stream::Stream;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};

use super::byte_at;
use crate::stdio::sink::{Chunk, Halted, Position, SinkEnd};

/// How long a log takes for a part of a chunk.
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
    /// Everything below may be acknowledged.
    pub(super) safe: u64,
    /// Where the stream goes on after a loss, and what was lost.
    pub(super) gaps: Vec<(u64, u64)>,
    /// The first thing that was not as it should be.
    pub(super) wrong: Option<String>,
}

impl Log {
    pub(super) fn new(stream: Stream, offset: u64) -> Arc<Mutex<Log>> {
        Arc::new(Mutex::new(Log { stream, offset, safe: offset, gaps: Vec::new(), wrong: None }))
    }

    fn gap(&mut self, to: u64) {
        match to.checked_sub(self.offset).filter(|lost| *lost > 0) {
            Some(lost) => self.gaps.push((to, lost)),
            None => self.blame(format!("a gap leads to {to}")),
        }
        self.offset = to;
    }

    /// What was found out about a real one.
    pub(super) fn is(&mut self, offset: u64, safe: u64, gaps: Vec<(u64, u64)>) {
        (self.offset, self.safe, self.gaps) = (offset, safe, gaps);
    }

    /// Begins anew at `to`.
    fn rewind(&mut self, to: u64) {
        (self.offset, self.safe) = (to, to);
        self.gaps.clear();
    }

    fn append(&mut self, part: &[u8]) {
        for byte in part {
            if *byte != byte_at(self.stream, self.offset) {
                self.blame("another byte came".into());
            }
            self.offset += 1;
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

/// Writes a log, and takes its time for each part of a chunk unless it is halted: then the rest is not for it.
struct Writer {
    log: Arc<Mutex<Log>>,
    pace: watch::Receiver<Pace>,
    halted: Halted,
    safe: watch::Sender<u64>,
}

/// Writes what comes from `end` into `log`, until the stream has ended.
pub(super) async fn write(end: SinkEnd, log: Arc<Mutex<Log>>, pace: watch::Receiver<Pace>) {
    let SinkEnd { chunks, safe, halted } = end;
    Writer { log, pace, halted, safe }.run(chunks).await;
}

impl Writer {
    async fn run(mut self, mut chunks: mpsc::Receiver<Chunk>) {
        let mut dropping = false;
        while let Some(chunk) = chunks.recv().await {
            match chunk {
                Chunk::Rest(reply) => {
                    dropping = false;
                    let _ = reply.send(self.position());
                    continue;
                }
                Chunk::Rewind(turn, reply) => {
                    dropping = false;
                    self.log.lock().unwrap().rewind(turn.to);
                    self.safe.send_replace(turn.to);
                    let _ = reply.send(Ok(()));
                    continue;
                }
                Chunk::End => continue,
                _ if dropping => continue,
                Chunk::Data(parts) => {
                    for part in parts {
                        dropping = self.is_halted_meanwhile().await;
                        let taken = if dropping { part.len() / 2 } else { part.len() };
                        self.log.lock().unwrap().append(&part[..taken]);
                        if dropping {
                            break;
                        }
                    }
                }
                Chunk::Gap(to) => self.log.lock().unwrap().gap(to),
                Chunk::Identity(_) => {}
            }
            if !dropping {
                self.settle();
            }
        }
    }

    /// A disk that is stuck has bytes and not what belongs to them.
    fn position(&mut self) -> Position {
        if *self.pace.borrow() != Pace::Stuck {
            self.settle();
        }
        let log = self.log.lock().unwrap();
        Position { safe: log.safe, next: log.offset }
    }

    fn settle(&mut self) {
        let mut log = self.log.lock().unwrap();
        log.safe = log.offset;
        self.safe.send_replace(log.safe);
    }

    /// Waits as long as a write takes.
    async fn is_halted_meanwhile(&mut self) -> bool {
        loop {
            let now = *self.pace.borrow_and_update();
            let written = async {
                match now {
                    Pace::Quick => {}
                    Pace::Slow(time) => sleep(time).await,
                    Pace::Stuck => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = written => return false,
                () = self.halted.set() => return true,
                // An owner that is gone changes nothing any more.
                changed = self.pace.changed() => if changed.is_err() { std::future::pending().await },
            }
        }
    }
}
