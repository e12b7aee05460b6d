//! A process that uses all of its streams at once, and the test's part in that.

use std::{
    fs::File,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use cube_test_writer::fill;

use crate::{
    direct::{
        Direct, bind_mount,
        exec::{Ends, Exec},
    },
    lab::Lab,
    scenarios::WAIT,
    verify::compare,
};

/// How much is said by either.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conversation {
    /// Bytes that the process writes to stdout: the stream of seed 1.
    pub(super) output: u64,
    /// Bytes for its stdin, which come back on stderr: the stream of seed 2.
    pub(super) input: u64,
}

/// Short, but more than one frame in each direction.
pub(super) const SHORT: Conversation = Conversation { output: 150_000, input: 100_000 };

impl Conversation {
    /// Bytes that are compared.
    pub(super) fn bytes(self) -> u64 {
        self.output + self.input
    }

    /// Writes and reads until all streams have ended; `close` tells the shim that stdin has. Panics
    /// where a byte differs.
    pub(super) fn hold(self, ends: Ends, close: impl FnOnce()) {
        let Conversation { output, input } = self;
        let Ends { stdin, stdout, stderr } = ends;
        thread::scope(|scope| {
            let said = scope.spawn(|| compare(stdout, 1, 0).unwrap());
            let echoed = scope.spawn(|| compare(stderr, 2, 0).unwrap());
            feed(stdin, input);
            close();
            assert_eq!(said.join().unwrap(), output, "bytes of stdout");
            assert_eq!(echoed.join().unwrap(), input, "bytes of stdin that came back on stderr");
        });
    }
}

fn feed(mut stdin: File, bytes: u64) {
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < bytes {
        let n = buffer.len().min(usize::try_from(bytes - at).unwrap_or(usize::MAX));
        fill(2, at, &mut buffer[..n]);
        stdin.write_all(&buffer[..n]).unwrap();
        at += n as u64;
    }
}

/// A container that waits, for conversations in it.
pub(super) fn running(lab: &Lab) -> Direct<'_> {
    let mut direct = Direct::new(lab, "c", &WAIT);
    running_behind(&mut direct);
    direct
}

/// Starts the container of a test that has put a proxy in front of it.
pub(super) fn running_behind(direct: &mut Direct<'_>) {
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
}

/// Ends what [`running`] began.
pub(super) fn end(lab: &Lab, direct: Direct<'_>) {
    direct.kill(9).unwrap();
    assert_eq!(direct.wait().unwrap(), 137);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}

/// A [`SHORT`] conversation with an exec of this name, which must be exact. Gives its time.
pub(super) fn converse(direct: &Direct<'_>, name: &str) -> Duration {
    let began = Instant::now();
    let output = SHORT.output.to_string();
    let (mut exec, ends) = Exec::new(direct, name, &["cube-test-writer", "converse", "1", &output]);
    exec.create().unwrap();
    exec.start().unwrap();
    SHORT.hold(ends, || exec.close_stdin().unwrap());
    assert_eq!(exec.wait().unwrap(), 0, "{name}");
    exec.delete().unwrap();
    began.elapsed()
}
