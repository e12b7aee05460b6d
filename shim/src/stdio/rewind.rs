//! Putting the streams of a process back to where a snapshot has them.

use std::{io, path::Path, time::Duration};

use futures::future::join_all;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Begin, ProcessIo, StdioError, cannot, sink::Turn};

/// Time for the disks of the logs. A disk that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(5);

/// Tells the relay of one stream, at rest, where it goes on.
#[derive(Debug)]
pub(super) struct Rewind {
    pub(super) turn: Turn,
    /// The guest has seen attempts up to this one.
    pub(super) attempt: u64,
    pub(super) done: oneshot::Sender<Result<(), StdioError>>,
}

/// The owner's end. The relay's end is closed once the stream cannot come back.
pub(super) type Rewinder = mpsc::UnboundedSender<Rewind>;

/// The relay's end.
pub(super) type Rewinds = mpsc::UnboundedReceiver<Rewind>;

pub(super) fn channel() -> (Rewinder, Rewinds) {
    mpsc::unbounded_channel()
}

impl ProcessIo {
    /// The sandbox was put back to a snapshot, in which the streams of this process were at `begin`: they go
    /// on there, as part of the new `timeline`, once they flow.
    ///
    /// To be called after [`start`](ProcessIo::start), while all streams of the sandbox rest ([`Flows::rest`](super::Flows::rest)) and the guest
    /// that they belonged to is no more, for a process that lives in both, before anything of the new timeline
    /// can have happened: before its id goes to the state on disk, and before Thaw. Then comes
    /// [`Flows::flow`](super::Flows::flow) with the new timeline. A shim that dies between any two of these
    /// leaves a log that is an exact prefix of either timeline. A process that has exited meanwhile, or that
    /// the snapshot does not have, is not rewound but finished.
    ///
    /// What becomes of the streams:
    ///
    /// - Output: log, FIFO, file and program keep, or still get, what has arrived of the old timeline; what
    ///   comes from `begin` on follows it. A stream that has ended since the snapshot goes on: its FIFO or file
    ///   is opened again when there is something to write. One that had ended in the snapshot ends again, where
    ///   it did.
    /// - stdin: what no process has got, as far as is known, is kept, and is the next that the process gets.
    ///   What a process has got is not repeated. A stdin that was closed ends again after what was kept. One
    ///   that the process has closed since the snapshot is opened again.
    ///
    /// Takes 5 s at most; a disk that hangs is what takes long. An error is a log whose disk does not say yet
    /// that it went back, for it is full, say. Its stream goes back all the same, and waits for the disk
    /// before it acknowledges anything. So the sandbox may go on; but if this process dies before the disk has
    /// recovered, nothing of the new timeline gets into that log.
    pub async fn rewind(&mut self, begin: Begin, timeline: u64) -> Result<(), StdioError> {
        self.config.begin = begin;
        let tell = |rewinder: &Rewinder, to| {
            let (done, told) = oneshot::channel();
            let turn = Turn { to, timeline };
            // One that has ended for good stays as it is.
            rewinder.send(Rewind { turn, attempt: begin.attempt, done }).ok().map(|()| told)
        };
        let outputs = self.outputs.iter().filter_map(|o| tell(o.rewinder(), begin.output(o.stream())));
        let stdin = self.stdin.iter().filter_map(|stdin| tell(&stdin.rewinder, begin.stdin));
        let told: Vec<_> = outputs.chain(stdin).collect();
        let late = |_| cannot("cannot write the log of", Path::new(&self.config.container_id))(hangs());
        let done = timeout(LIMIT, join_all(told)).await.map_err(late)?;
        // A relay that ends meanwhile has nothing to go back to.
        done.into_iter().flatten().collect()
    }
}

fn hangs() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("the disk has not answered for {LIMIT:?}"))
}
