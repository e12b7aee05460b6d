//! Readers that stop, go away and come back.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    thread::sleep,
    time::Duration,
};

use cube_test_writer::fill;

use super::conversation::running_behind;
use crate::{
    command::poll,
    direct::Direct,
    lab::{Lab, Setup},
    logs,
    needs::Backend,
    soak,
    verify::compare,
};

/// Longer than the shim waits for a reader that takes nothing.
const STOP: Duration = Duration::from_millis(2500);

const CHUNK: u64 = 1 << 20;

/// What a process that echoes its input has said, and what of it a reader has seen.
struct Echo<'a> {
    lab: &'a Lab,
    direct: Direct<'a>,
    stdin: File,
    said: u64,
    /// Offset of the next byte at the reader.
    read: u64,
    lost: u64,
}

impl<'a> Echo<'a> {
    fn start(lab: &'a Lab) -> (Echo<'a>, File) {
        let mut direct = Direct::new(lab, "c", &["cube-test-writer", "converse", "1", "0"]);
        let (stdin, [_, reader]) = (direct.write_fifo(), direct.read_fifos());
        running_behind(&mut direct);
        (Echo { lab, direct, stdin, said: 0, read: 0, lost: 0 }, reader)
    }

    /// Has the process write so much to stderr, and waits until that is in the log.
    fn say(&mut self, bytes: u64) {
        let mut buffer = vec![0; usize::try_from(bytes).unwrap()];
        fill(2, self.said, &mut buffer);
        self.stdin.write_all(&buffer).unwrap();
        self.said += bytes;
        let logged = || self.retained().is_ok_and(|(_, end)| end == self.said);
        assert!(poll(self.lab.limit(), logged), "the log is at {:?} of {}", self.retained(), self.said);
    }

    /// Begin and end of what the log has. Fails while it is being rotated.
    fn retained(&self) -> io::Result<(u64, u64)> {
        let segments = logs::try_segments(&self.lab.log_dir("c"), "stderr")?;
        let end = segments.last().map_or(0, |last| last.header.first_offset + last.len);
        Ok((segments.first().map_or(0, |first| first.header.first_offset), end))
    }

    /// Reads up to `end`, from where the reader is. Once on the way it may go on at `gap`.
    fn read_to(&mut self, reader: &mut File, end: u64, mut gap: Option<u64>) {
        let (mut got, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        while self.read < end {
            let limit = got.len().min((end - self.read) as usize);
            let n = reader.read(&mut got[..limit]).unwrap();
            assert!(n > 0, "the reader's stream ended at {} of {end}", self.read);
            fill(2, self.read, &mut expected[..n]);
            let same = got[..n].iter().zip(&expected).take_while(|(got, expected)| got == expected).count();
            self.read += same as u64;
            if same < n {
                let place = self.read;
                let to = gap.take().unwrap_or_else(|| panic!("the reader's bytes differ at {place}"));
                self.jump(&got[..n], same, to);
            }
        }
        assert_eq!(self.read, end);
    }

    /// `bytes` continue the stream for `same` bytes, and then at offset `to`. Bytes behind the jump may
    /// be those before it by chance.
    fn jump(&mut self, bytes: &[u8], same: usize, to: u64) {
        let mut expected = vec![0; bytes.len()];
        fill(2, to, &mut expected);
        let at = (same.saturating_sub(8)..=same).find(|at| bytes[*at..] == expected[..bytes.len() - at]);
        let at = at.unwrap_or_else(|| panic!("neither goes on at {} nor at {to}", self.read));
        self.lost += to - (self.read - (same - at) as u64);
        self.read = to + (bytes.len() - at) as u64;
    }

    fn end(self, mut reader: File) -> u64 {
        let Echo { lab, direct, stdin, said, read, lost } = self;
        drop(stdin);
        direct.close_stdin("").unwrap();
        assert_eq!(reader.read(&mut [0; 16]).unwrap(), 0, "more than was said");
        assert_eq!(read, said);
        assert_eq!(direct.wait().unwrap(), 0);
        direct.delete().unwrap();
        logs::compare_segments(&lab.log_dir("c"), "stderr", 2, said);
        direct.finish();
        lab.nothing_is_left();
        lost
    }
}

/// It stops for seconds, goes away, and comes back, while the process writes on.
pub fn a_reader_that_stops_and_returns_has_every_byte(backend: Backend) {
    let lab = Lab::with(Setup { log: "segment_bytes = 67108864\nsegments = 4".to_owned(), ..backend.into() });
    let (mut echo, mut reader) = Echo::start(&lab);
    for _ in 0..soak::rounds(2, 20) {
        echo.say(CHUNK / 2);
        sleep(STOP);
        echo.read_to(&mut reader, echo.said - CHUNK / 4, None);
        drop(reader);
        echo.say(3 * CHUNK);
        reader = File::open(echo.direct.fifo("stderr")).unwrap();
        echo.read_to(&mut reader, echo.said, None);
    }
    let said = echo.said;
    assert_eq!(echo.end(reader), 0, "bytes lost");
    soak::record("reader that goes and returns", "bytes compared", said);
}

/// Rotation took the rest: the reader goes on where the log begins, and misses nothing else.
pub fn a_reader_that_returns_too_late_has_what_is_retained(backend: Backend) {
    let lab = Lab::with(Setup { log: "segment_bytes = 1048576\nsegments = 4".to_owned(), ..backend.into() });
    let (mut echo, mut reader) = Echo::start(&lab);
    for _ in 0..soak::rounds(5, 50) {
        echo.say(CHUNK);
        echo.read_to(&mut reader, echo.said - CHUNK / 4, None);
        drop(reader);
        echo.say(8 * CHUNK);
        let (begin, _) = echo.retained().unwrap();
        assert!(begin > echo.read + CHUNK, "nothing was rotated away: {begin}");
        let lost = echo.lost;
        reader = File::open(echo.direct.fifo("stderr")).unwrap();
        echo.read_to(&mut reader, echo.said, Some(begin));
        assert!(echo.lost > lost, "bytes from {begin} on are retained, but nothing is missing");
    }
    let said = echo.said;
    let lost = echo.end(reader);
    soak::record("reader that returns too late", "bytes delivered", said - lost);
    soak::record("reader that returns too late", "bytes lost", lost);
}

/// `binary://`, for seconds.
pub fn a_log_program_that_stops_reading_has_every_byte(backend: Backend) {
    let lab = Lab::new(backend);
    let copy = lab.dir().join("copied");
    let script = format!(
        "cat <&4 >/dev/null &\n(dd bs=1k count=1k iflag=fullblock; sleep 4; cat) <&3 > {} 2>/dev/null\nwait",
        copy.display()
    );
    run_with_log_program(&lab, &script);
    let bytes = compare(File::open(copy).unwrap(), 1, 0).unwrap();
    assert_eq!(bytes, LOGGED, "bytes at the log program");
}

/// containerd's own shim gives the process the pipe itself, and it dies of SIGPIPE. Here a log is kept
/// beside the program: the process writes on, and the log has everything.
pub fn a_log_program_that_dies_costs_the_log_nothing(backend: Backend) {
    let lab = Lab::new(backend);
    run_with_log_program(&lab, "dd bs=1k count=1k iflag=fullblock <&3 >/dev/null 2>&1\nkill -KILL $$");
}

const LOGGED: u64 = 24 << 20;

fn run_with_log_program(lab: &Lab, script: &str) {
    let program = lab.dir().join("logger");
    write_program(&program, &format!("#!/bin/sh\nPATH=/bin:/usr/bin\nexec 5>&-\n{script}\n"));
    let uri = format!("binary://{}", program.display());
    let bytes = LOGGED.to_string();
    lab.detached_with_log(&uri, "c", &["cube-test-writer", "stream", "1", &bytes]);
    lab.wait_for_state("c", Some("STOPPED"));
    lab.delete_stopped("c", 0);
    assert_eq!(logs::compare_segments(&lab.log_dir("c"), "stdout", 1, LOGGED), 0);
    lab.nothing_is_left();
}

fn write_program(path: &Path, script: &str) {
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
