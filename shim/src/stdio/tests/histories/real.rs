//! The real sinks in place of the simulated log: a log on disk that feeds a reader, and a reader alone.

use std::{
    fs,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use cube_protocol::stream::Stream;
use nix::{fcntl::OFlag, unistd::pipe2};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, sync::watch, task::JoinSet, time::sleep};

use super::{
    byte_at,
    log::{Log, Pace},
};
use crate::{
    log::{
        dir::LogDir,
        format::{HEADER_LEN, RECORD_LEN, Record, RecordKind, SegmentHeader},
        retained::Retained,
        writer::{Limits, LogWriter},
    },
    stdio::{
        Counters, Phases,
        direct::Direct,
        feed::Feed,
        fifo::PipeWriter,
        log_sink,
        outlet::Outlet,
        sink::{Life, Sink, SinkEnd},
        uri::Target,
    },
};

/// Nothing is rotated away: all of it is looked at in the end.
const LIMITS: Limits = Limits { segment_bytes: 16 << 20, segments: 4 };

const NAME: &str = "stdout";

/// A sink of the shim's, and what it should have.
pub(super) enum Real {
    Disk { dir: TempDir, retained: Arc<Retained>, turns: Vec<(u64, u64)>, common: Common },
    Reader { turns: Vec<(u64, u64)>, common: Common },
}

/// What both have.
pub(super) struct Common {
    stream: Stream,
    /// Told what is there, for who looks at it.
    model: Arc<Mutex<Log>>,
    safe: watch::Receiver<u64>,
    counters: Arc<Counters>,
    /// What came out of the pipe.
    read: Arc<Mutex<Vec<u8>>>,
    reader: JoinSet<()>,
}

impl Common {
    pub(super) fn new(
        stream: Stream,
        model: &Arc<Mutex<Log>>,
        sink: &Sink,
        counters: &Arc<Counters>,
    ) -> Common {
        let (model, counters, read) = (Arc::clone(model), Arc::clone(counters), Arc::default());
        Common { stream, model, safe: sink.safe.clone(), counters, read, reader: JoinSet::new() }
    }

    /// A pipe with a reader at its other end that takes its time.
    fn outlet(&mut self, pace: watch::Receiver<Pace>) -> Outlet {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        self.reader.spawn(take(read, pace, Arc::clone(&self.read)));
        Outlet::Pipe(PipeWriter::pipe(write).unwrap())
    }
}

impl Real {
    /// A log with a reader that is fed from it. What fills it must be joined with what is given.
    pub(super) fn disk(
        mut common: Common,
        end: SinkEnd,
        pace: watch::Receiver<Pace>,
        phases: Phases,
        tasks: &mut JoinSet<()>,
    ) -> (Real, log_sink::Log) {
        let begin = *end.safe.borrow();
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let log = LogDir::create(&dir.path().join("log")).unwrap();
        let writer = LogWriter::create(Arc::new(log), NAME, LIMITS, begin).unwrap();
        let retained = writer.retained();
        retained.hold(0);
        let (lives, life) = watch::channel(Life::default());
        let feed = Feed {
            name: NAME,
            retained: Arc::clone(&retained),
            grown: end.safe.subscribe(),
            life,
            rewinds: 0,
            outlet: Some(common.outlet(pace)),
            target: Target::Null,
            counters: Arc::clone(&common.counters),
            phases,
            position: 0,
        };
        tasks.spawn(feed.run());
        let log = log_sink::Log::new(writer, NAME, end, lives, Arc::clone(&common.counters));
        (Real::Disk { dir, retained, turns: vec![(1, begin)], common }, log)
    }

    /// A reader without a log.
    pub(super) fn reader(
        mut common: Common,
        end: SinkEnd,
        pace: watch::Receiver<Pace>,
        phases: Phases,
        tasks: &mut JoinSet<()>,
    ) -> Real {
        let turns = vec![(0, *end.safe.borrow())];
        let outlet = Some(common.outlet(pace));
        let direct = Direct::new(NAME, outlet, Target::Null, Arc::clone(&common.counters), phases);
        tasks.spawn(direct.run(end));
        Real::Reader { turns, common }
    }

    /// The stream goes on at `to`.
    pub(super) fn rewound(&mut self, to: u64) {
        let segments = self.segments();
        match self {
            Real::Disk { turns, .. } => turns.push((segments.last().unwrap().header.number, to)),
            Real::Reader { turns, common } => turns.push((common.counters.written.get(), to)),
        }
    }

    /// Tells the model what is there.
    pub(super) fn look(&self) {
        let safe = *self.common().safe.borrow();
        let (offset, gaps) = match self {
            // A byte may be on the disk that nobody has been told of.
            Real::Disk { turns, .. } => {
                let segments = self.segments();
                let (since, _) = turns.last().unwrap();
                let new = segments.iter().filter(|segment| segment.header.number >= *since);
                (segments.last().unwrap().end, new.flat_map(|segment| segment.gaps.clone()).collect())
            }
            Real::Reader { .. } => (safe, Vec::new()),
        };
        // Nobody may be told of more than there is.
        self.common().model.lock().unwrap().is(offset, safe.min(offset), gaps);
    }

    /// Looks at every byte, once the stream has ended.
    pub(super) fn verify(&self) -> Result<(), String> {
        let read = self.common().read.lock().unwrap();
        match self {
            Real::Disk { turns, .. } => {
                let segments = self.segments();
                for pair in segments.windows(2) {
                    let [before, after] = [&pair[0], &pair[1]];
                    let turn = turns.iter().rev().find(|(number, _)| *number == after.header.number);
                    let expected = turn.map_or(before.end, |(_, to)| *to);
                    if after.header.first_offset != expected {
                        return Err(format!("{:?} begins elsewhere than at {expected}", after.header));
                    }
                }
                let all: Vec<(u64, u8)> = segments.iter().flat_map(Segment::bytes).collect();
                let wrong = all.iter().find(|(at, byte)| *byte != byte_at(self.common().stream, *at));
                if let Some((at, _)) = wrong {
                    return Err(format!("the log has another byte at {at}"));
                }
                match all.iter().map(|(_, byte)| byte).eq(read.iter()) {
                    true => Ok(()),
                    false => Err(format!("{} bytes in the log, {} at its reader", all.len(), read.len())),
                }
            }
            Real::Reader { turns, common } => {
                let mut offset = 0;
                for (n, byte) in read.iter().enumerate() {
                    // Several, if nothing came in between: the last counts.
                    let turn = turns.iter().rev().find(|(count, _)| *count == n as u64);
                    offset = turn.map_or(offset, |(_, to)| *to);
                    if *byte != byte_at(common.stream, offset) {
                        return Err(format!("the reader got another byte at {offset}, turns {turns:?}"));
                    }
                    offset += 1;
                }
                Ok(())
            }
        }
    }

    /// Whether the sink has all, and the reader has it from the pipe.
    pub(super) fn is_done(&self) -> bool {
        let Common { counters, read, .. } = self.common();
        counters.complete() && counters.written.get() == read.lock().unwrap().len() as u64
    }

    pub(super) fn abandon(&self) {
        if let Real::Disk { retained, .. } = self {
            retained.abandon();
        }
    }

    fn common(&self) -> &Common {
        match self {
            Real::Disk { common, .. } | Real::Reader { common, .. } => common,
        }
    }

    /// Of the log, oldest first.
    fn segments(&self) -> Vec<Segment> {
        let Real::Disk { dir, .. } = self else { return Vec::new() };
        let path = |name: String| dir.path().join("log").join(name);
        let closed = (1..).map(|number| path(format!("{NAME}.{number}"))).take_while(|path| path.exists());
        closed.chain([path(NAME.into())]).map(Segment::read).collect()
    }
}

/// A segment, by its index.
struct Segment {
    path: PathBuf,
    header: SegmentHeader,
    records: Vec<Record>,
    /// Stream offset after its last byte.
    end: u64,
    /// Where the stream goes on after a loss, and what was lost.
    gaps: Vec<(u64, u64)>,
}

impl Segment {
    fn read(path: PathBuf) -> Segment {
        let len = fs::metadata(&path).unwrap().len();
        let index = fs::read(format!("{}.idx", path.display())).unwrap();
        let header = SegmentHeader::decode(index[..HEADER_LEN].try_into().unwrap()).unwrap();
        let records = index[HEADER_LEN..].chunks_exact(RECORD_LEN);
        let records: Vec<_> =
            records.map(|bytes| Record::decode(bytes.try_into().unwrap()).unwrap()).collect();
        let (mut at, mut stream, mut gaps) = (0, header.first_offset, Vec::new());
        for record in &records {
            let expected = stream + record.file_offset - at;
            if record.kind == RecordKind::Gap {
                gaps.push((record.stream_offset, record.stream_offset - expected));
            }
            (at, stream) = (record.file_offset, record.stream_offset);
        }
        Segment { path, header, records, end: stream + len - at, gaps }
    }

    /// Each with its stream offset.
    fn bytes(&self) -> Vec<(u64, u8)> {
        let mut records = self.records.iter().peekable();
        let mut next = self.header.first_offset;
        let data = fs::read(&self.path).unwrap().into_iter().enumerate();
        data.map(|(at, byte)| {
            while let Some(record) = records.next_if(|record| record.file_offset <= at as u64) {
                next = record.stream_offset;
            }
            next += 1;
            (next - 1, byte)
        })
        .collect()
    }
}

/// Reads a pipe to its end.
async fn take(pipe: OwnedFd, mut pace: watch::Receiver<Pace>, into: Arc<Mutex<Vec<u8>>>) {
    let mut pipe = Receiver::from_owned_fd(pipe).unwrap();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let now = *pace.borrow_and_update();
        match now {
            Pace::Quick => {}
            Pace::Slow(time) => sleep(time).await,
            Pace::Stuck => {
                if pace.changed().await.is_err() {
                    return;
                }
                continue;
            }
        }
        match pipe.read(&mut buffer).await.unwrap() {
            0 => return,
            n => into.lock().unwrap().extend_from_slice(&buffer[..n]),
        }
    }
}
