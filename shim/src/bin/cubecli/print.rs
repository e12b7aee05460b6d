//! Printing logs: bytes as they are, or line by line with times.

use std::{
    fs::File,
    io::{BufWriter, Write},
    os::fd::{AsFd, BorrowedFd},
};

use cube_shim::log::reader::{Cursor, Dir, ReadError};
use memchr::memchr;

use crate::{error::CliError, time};

/// Bytes gathered before they are written.
const BUFFER: usize = 256 << 10;

/// One stream that is printed.
#[derive(Debug)]
pub(crate) struct Source {
    cursor: Cursor,
    /// Whether the last byte printed was not a newline.
    in_line: bool,
}

impl Source {
    pub(crate) fn new(cursor: Cursor) -> Source {
        Source { cursor, in_line: false }
    }

    pub(crate) fn goes_on_in(&self, dir: &Dir) -> Result<Option<bool>, ReadError> {
        self.cursor.goes_on_in(dir)
    }

    pub(crate) fn refresh(&mut self, dir: &Dir) -> Result<(), ReadError> {
        self.cursor.refresh(dir)
    }
}

/// What to print of each line, and of how many.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Format {
    /// Begin each line with its time.
    pub(crate) timestamps: bool,
    /// Lines to leave out at the beginning.
    pub(crate) skip: u64,
    /// Lines to print then.
    pub(crate) limit: Option<u64>,
}

/// Prints what sources have, and keeps count of lines.
#[derive(Debug)]
pub(crate) struct Printer {
    output: BufWriter<File>,
    format: Format,
    printed: u64,
}

impl Printer {
    pub(crate) fn new(output: File, format: Format) -> Printer {
        Printer { output: BufWriter::with_capacity(BUFFER, output), format, printed: 0 }
    }

    /// For waiting until its reader is gone.
    pub(crate) fn output(&self) -> BorrowedFd<'_> {
        self.output.get_ref().as_fd()
    }

    /// Whether the times of lines are printed.
    pub(crate) fn needs_times(&self) -> bool {
        self.format.timestamps
    }

    /// Whether all lines that were asked for have been printed.
    pub(crate) fn is_done(&self) -> bool {
        self.format.limit.is_some_and(|limit| self.printed >= limit)
    }

    /// Prints all that `sources` have now: several line by line in the order of their times, if all
    /// have times, else one after the other. Returns the number of bytes taken from them.
    pub(crate) fn print(&mut self, sources: &mut [Source]) -> Result<u64, CliError> {
        let by_time = sources.len() > 1 && sources.iter().all(|source| source.cursor.has_times());
        let mut taken = 0;
        while !self.is_done() {
            let Some(next) = next_source(sources, by_time)? else { break };
            let source = &mut sources[next];
            self.note_loss(source)?;
            taken += if self.is_plain() && !by_time {
                self.print_block(source)?
            } else {
                self.print_line(source)?
            };
        }
        for source in sources {
            self.note_loss(source)?;
        }
        self.output.flush().map_err(CliError::Output)?;
        Ok(taken)
    }

    /// Whether neither times nor numbers of lines matter.
    fn is_plain(&self) -> bool {
        !self.format.timestamps && self.format.limit.is_none() && self.format.skip == 0
    }

    fn print_block(&mut self, source: &mut Source) -> Result<u64, CliError> {
        let bytes = source.cursor.fill()?;
        let count = bytes.len();
        self.output.write_all(bytes).map_err(CliError::Output)?;
        source.cursor.consume(count);
        Ok(count as u64)
    }

    /// Prints to the end of a line, or of what there is of it.
    fn print_line(&mut self, source: &mut Source) -> Result<u64, CliError> {
        let shown = self.format.skip == 0;
        if shown && self.format.timestamps && !source.in_line {
            let time = source.cursor.time_ns()?.map_or_else(|| "-".into(), time::rfc3339);
            write!(self.output, "{time} ").map_err(CliError::Output)?;
        }
        let mut taken = 0;
        loop {
            let bytes = source.cursor.fill()?;
            let newline = memchr(b'\n', bytes);
            let count = newline.map_or(bytes.len(), |newline| newline + 1);
            if shown {
                self.output.write_all(&bytes[..count]).map_err(CliError::Output)?;
            }
            source.cursor.consume(count);
            taken += count as u64;
            source.in_line = newline.is_none();
            if newline.is_some() {
                match shown {
                    true => self.printed += 1,
                    false => self.format.skip -= 1,
                }
            }
            if newline.is_some() || count == 0 {
                return Ok(taken);
            }
            self.note_loss(source)?;
        }
    }

    /// Says on standard error how much is missing at this place of the output.
    fn note_loss(&mut self, source: &mut Source) -> Result<(), CliError> {
        let lost = source.cursor.take_lost();
        if lost > 0 {
            self.output.flush().map_err(CliError::Output)?;
            eprintln!("[{lost} bytes lost]");
        }
        Ok(())
    }
}

/// The source whose next line is to be printed: the one that is oldest, or the first that has any.
fn next_source(sources: &mut [Source], by_time: bool) -> Result<Option<usize>, CliError> {
    let mut next = None;
    for (number, source) in sources.iter_mut().enumerate() {
        if source.cursor.fill()?.is_empty() {
            continue;
        }
        // The rest of a line that has begun comes before any other.
        let time = if by_time && !source.in_line { source.cursor.time_ns()?.unwrap_or(0) } else { 0 };
        if next.is_none_or(|(_, earliest)| time < earliest) {
            next = Some((number, time));
        }
    }
    Ok(next.map(|(number, _)| number))
}
