//! The thread that writes the log of one stream.
//!
//! write(2) to the page cache takes microseconds until the disk is stuck, and then any time at all. So
//! each log has a thread of its own: a disk that hangs holds up this stream, and neither the others nor
//! a call of containerd. It is no blocking task of tokio, for whose end a runtime would wait.

use std::{io::IoSlice, sync::Arc, thread, time::Duration};

use tokio::sync::{mpsc, watch};

use super::{
    error_chain,
    phase::READER_PATIENCE,
    sink::{Chunk, SinkEnd},
    status::{Counters, Obstacle},
};
use crate::log::{
    retained::Retained,
    writer::{LogWriter, Stalled},
};

/// How often a log that cannot be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How far the log may run ahead of a reader that is at work; the capacity of the process's own pipe.
/// A reader far behind would lose the rest when the process ends: clients of containerd 1.6 close their
/// end of the FIFO as soon as they hear of the exit.
const LEAD: u64 = 1 << 20;

/// The thread calls the kernel and a short stack of ours.
const STACK: usize = 256 << 10;

/// Starts the thread. It ends with the stream, or when [`Retained::abandon`] is called.
pub(super) fn spawn(
    writer: LogWriter,
    name: &'static str,
    end: SinkEnd,
    counters: Arc<Counters>,
) -> std::io::Result<()> {
    let retained = writer.retained();
    let SinkEnd { chunks, safe } = end;
    let log = LogThread { writer, name, retained, safe, counters, told: false };
    thread::Builder::new().name(format!("log-{name}")).stack_size(STACK).spawn(move || log.run(chunks))?;
    Ok(())
}

struct LogThread {
    writer: LogWriter,
    name: &'static str,
    retained: Arc<Retained>,
    safe: watch::Sender<u64>,
    counters: Arc<Counters>,
    /// Whether the trouble that the log has with its disk was reported.
    told: bool,
}

impl LogThread {
    fn run(mut self, mut chunks: mpsc::Receiver<Chunk>) {
        while let Some(chunk) = chunks.blocking_recv() {
            let taken = match chunk {
                Chunk::Identity(identity) => self.insist(|writer| writer.identify(identity)),
                Chunk::Gap(offset) => self.insist(|writer| writer.gap(offset)),
                Chunk::Data(parts) => {
                    self.retained.pace(LEAD, READER_PATIENCE);
                    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
                    let mut rest = &mut slices[..];
                    let before = self.writer.next_offset();
                    let taken = self.insist(|writer| writer.append(&mut rest));
                    self.counters.stored.add(self.writer.next_offset() - before);
                    taken
                }
            };
            if !taken {
                return;
            }
            self.safe.send_replace(self.writer.next_offset());
        }
    }

    /// Does `work` until it succeeds. `false` if the log was abandoned before.
    fn insist(&mut self, mut work: impl FnMut(&mut LogWriter) -> Result<(), Stalled>) -> bool {
        while let Err(stall) = work(&mut self.writer) {
            self.counters.wait_for(Some(match &stall {
                Stalled::Reader => Obstacle::Reader,
                Stalled::Disk(_) => Obstacle::Disk,
            }));
            self.report(&stall);
            // The reader must hear that the log has grown by a part of the work, even where nothing more
            // is safe: what it has not read yet may be what holds the log up.
            match self.writer.safe_offset() {
                Some(offset) => drop(self.safe.send_replace(offset)),
                None => self.safe.send_modify(|_| ()),
            }
            if !self.retained.wait(RETRY, matches!(stall, Stalled::Reader)) {
                return false;
            }
        }
        self.counters.wait_for(None);
        if std::mem::take(&mut self.told) {
            tracing::info!(stream = self.name, "the log is being written again");
        }
        true
    }

    fn report(&mut self, stall: &Stalled) {
        match stall {
            // What a slow reader is meant to do. Nothing for an operator to act on.
            Stalled::Reader => tracing::debug!(stream = self.name, "{stall}"),
            Stalled::Disk(_) if self.told => {}
            Stalled::Disk(_) => {
                self.told = true;
                tracing::warn!(stream = self.name, error = %error_chain(stall), "output waits for the log");
            }
        }
    }
}
