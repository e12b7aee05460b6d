//! FIFOs for the stdio of a process, with the ends that containerd's client has.

use std::{fs::File, path::Path};

use nix::{sys::stat::Mode, unistd::mkfifo};

/// Those of one process.
#[derive(Debug, Default)]
pub(super) struct Fifos {
    /// Paths for stdin, stdout and stderr in Create or Exec; empty where there is none.
    pub(super) paths: [String; 3],
    /// Other ends, until the shim has its own.
    keep: Vec<File>,
}

impl Fifos {
    /// Makes the FIFO of stdout (1) or stderr (2), and opens it for reading.
    pub(super) fn reader(&mut self, n: usize, path: &Path) -> File {
        // The end of a FIFO that nobody has opened for writing yet must not look like its last.
        self.make(n, path);
        File::open(path).unwrap()
    }

    /// Makes the FIFO of stdin, and opens it for writing.
    pub(super) fn writer(&mut self, path: &Path) -> File {
        self.make(0, path);
        File::options().write(true).open(path).unwrap()
    }

    /// The shim has opened its ends.
    pub(super) fn attached(&mut self) {
        self.keep.clear();
    }

    fn make(&mut self, n: usize, path: &Path) {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        self.paths[n] = path.display().to_string();
        // Opening one end waits for somebody at the other, unless both are opened at once.
        self.keep.push(File::options().read(true).write(true).open(path).unwrap());
    }
}
