//! A writer for tests of the readers, with the file names and order of work of [`crate::log::format`].

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{Cursor, Dir, Segments, Stream};
use crate::log::{
    format::{Record, RecordKind, SegmentHeader},
    since::since,
};

/// Writes `stdout` of one log directory.
pub(crate) struct TestLog {
    pub(crate) temp: tempfile::TempDir,
    number: u64,
    stream_offset: u64,
    file_offset: u64,
    data: File,
    index: Option<File>,
}

impl TestLog {
    pub(crate) fn new() -> TestLog {
        let temp = tempfile::tempdir().unwrap();
        let (data, index) = begin(&temp.path().join("stdout"), 1, 0);
        TestLog { temp, number: 1, stream_offset: 0, file_offset: 0, data, index: Some(index) }
    }

    pub(crate) fn without_index() -> TestLog {
        let mut log = TestLog::new();
        fs::remove_file(log.path("stdout.idx")).unwrap();
        log.index = None;
        log
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub(crate) fn dir(&self) -> Dir {
        Dir::open(self.temp.path()).unwrap()
    }

    pub(crate) fn segments(&self) -> Segments {
        Segments::open(&self.dir(), Stream::Stdout).unwrap()
    }

    /// Data, then its record.
    pub(crate) fn write(&mut self, time_ns: u64, bytes: &[u8]) {
        let file_offset = self.file_offset;
        self.append(bytes);
        let stream_offset = self.stream_offset - bytes.len() as u64;
        self.record(Record { kind: RecordKind::Write, stream_offset, file_offset, time_ns });
    }

    /// Data without a record.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        self.data.write_all(bytes).unwrap();
        self.file_offset += bytes.len() as u64;
        self.stream_offset += bytes.len() as u64;
    }

    pub(crate) fn gap(&mut self, time_ns: u64, lost: u64) {
        self.stream_offset += lost;
        let (stream_offset, file_offset) = (self.stream_offset, self.file_offset);
        self.record(Record { kind: RecordKind::Gap, stream_offset, file_offset, time_ns });
    }

    pub(crate) fn rotate(&mut self) {
        let number = self.number;
        fs::rename(self.path("stdout"), self.path(&format!("stdout.{number}"))).unwrap();
        if self.index.is_some() {
            fs::rename(self.path("stdout.idx"), self.path(&format!("stdout.{number}.idx"))).unwrap();
        }
        self.number += 1;
        let (data, index) = begin(&self.path("stdout"), self.number, self.stream_offset);
        (self.data, self.index, self.file_offset) = (data, Some(index), 0);
    }

    pub(crate) fn remove_segment(&self, number: u64) {
        for name in [format!("stdout.{number}"), format!("stdout.{number}.idx")] {
            fs::remove_file(self.path(&name)).unwrap();
        }
    }

    fn record(&mut self, record: Record) {
        if let Some(index) = &mut self.index {
            index.write_all(&record.encode()).unwrap();
        }
    }
}

fn begin(path: &std::path::Path, number: u64, first_offset: u64) -> (File, File) {
    let header = SegmentHeader { number, first_offset, timeline: 1, epoch: 1, created_ns: 0 };
    let index = File::create(path.with_extension("idx")).unwrap();
    index.write_all_at(&header.encode(), 0).unwrap();
    let mut index = index;
    std::io::Seek::seek(&mut index, std::io::SeekFrom::End(0)).unwrap();
    (File::create(path).unwrap(), index)
}

/// Everything from the cursor's place to the end, and the bytes reported as lost on the way.
pub(crate) fn read_all(cursor: &mut Cursor) -> (Vec<u8>, u64) {
    let (mut bytes, mut lost) = (Vec::new(), 0);
    loop {
        let block = cursor.fill().unwrap();
        let count = block.len();
        bytes.extend_from_slice(block);
        lost += cursor.take_lost();
        if count == 0 {
            return (bytes, lost);
        }
        cursor.consume(count);
    }
}

/// The lines in `dir` that began at `time_ns` or later.
pub(crate) fn read_since(dir: &Path, time_ns: u64) -> Vec<u8> {
    let segments = Segments::open(&Dir::open(dir).unwrap(), Stream::Stdout).unwrap();
    let start = since(&segments, time_ns).unwrap();
    read_all(&mut Cursor::new(segments, start).unwrap()).0
}

/// Bytes that the calling thread has asked the kernel for, and got, since it began.
pub(crate) fn bytes_read() -> u64 {
    let io = fs::read_to_string("/proc/thread-self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}
