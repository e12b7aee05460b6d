//! Reading logs: the files are written and rotated by another process meanwhile, and may have been
//! tampered with. The data files are the truth; an index that is missing or damaged costs times and
//! counts of lost bytes, never a byte of output.

mod cursor;
mod index;
mod open;
mod segments;

pub use cursor::Cursor;
pub use index::Index;
pub use open::{Dir, ReadError};
pub use segments::{Position, Segment, Segments};

/// One of the two streams that a log directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// Name of the file that is being written.
    pub fn file_name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
