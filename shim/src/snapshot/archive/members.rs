//! Reading a tar archive that may say anything: plain and sparse files with short names, as
//! [`Store::export`](super::super::Store::export) writes them, and nothing else that tar has.
//!
//! The crate tar reads the fields of headers. Its own reader gives a sparse file as a stream in which a hole of
//! exbibytes is as many zeros, and collects names of any length; here a hole costs nothing, and what is kept in
//! memory is the map of one file.

use std::io::{ErrorKind, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::{super::SnapshotError, bad};
use crate::snapshot::digest::BLOCK;

/// What headers and data are padded to.
const RECORD: u64 = 512;

/// Most pieces of data in a sparse file: the map is 16 bytes for each. A memory of 16 GiB of which every other
/// page was written has 2 million.
const PIECES_MAX: usize = 2_800_000;

/// Longest padding behind the end: tar writes records of 10 KiB, or what it is told to.
const END_MAX: u64 = 1 << 20;

/// A file in an archive.
#[derive(Debug)]
pub(super) struct Member {
    /// Its path.
    pub(super) path: Vec<u8>,
    /// Its length, holes included.
    pub(super) bytes: u64,
    map: Map,
}

/// Where a file has data.
#[derive(Debug, Default)]
struct Map {
    pieces: Vec<Piece>,
    /// Bytes in the archive.
    stored: u64,
    /// Behind the last piece.
    end: u64,
    /// Whether that was one without a byte, which says how long the file is.
    is_closed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    at: u64,
    end: u64,
}

impl Member {
    /// Blocks of the digest of which it has any data. All others are holes.
    pub(super) fn blocks(&self) -> u64 {
        let (mut blocks, mut next) = (0, 0);
        for piece in &self.map.pieces {
            let after = piece.end.div_ceil(BLOCK);
            blocks += after.saturating_sub(next.max(piece.at / BLOCK));
            next = after.max(next);
        }
        blocks
    }

    fn block_len(&self, number: u64) -> usize {
        // Not more than BLOCK.
        (self.bytes - number * BLOCK).min(BLOCK) as usize
    }
}

/// The files of an archive, in its order.
pub(super) struct Members<R> {
    input: R,
    is_begun: bool,
}

impl<R: Read> Members<R> {
    pub(super) fn new(input: R) -> Members<R> {
        Members { input, is_begun: false }
    }

    /// The next file. The data of the one before must have been taken with [`take`](Members::take).
    pub(super) fn next(&mut self) -> Result<Option<Member>, SnapshotError> {
        let mut header = Header::new_old();
        self.fill(header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            self.end()?;
            return Ok(None);
        }
        // What fails at the first header is something else altogether, of which nothing is quoted.
        if !has_checksum(&header) {
            return Err(if self.is_begun { bad("the checksum of a header is wrong") } else { no_archive() });
        }
        self.is_begun = true;
        let kind = header.entry_type();
        let path = header.path_bytes().into_owned();
        let size = number(header.entry_size())?;
        let (bytes, map) = match kind {
            EntryType::Regular => {
                let mut map = Map::default();
                map.add(0, size)?;
                (size, map)
            }
            EntryType::GNUSparse => self.sparse(&header)?,
            _ => return Err(bad(&format!("it has {:?}, a {kind:?}, and can only have files", lossy(&path)))),
        };
        if map.end != bytes || map.stored != size {
            return Err(bad(&format!("the sizes of {:?} contradict each other", lossy(&path))));
        }
        Ok(Some(Member { path, bytes, map }))
    }

    fn sparse(&mut self, header: &Header) -> Result<(u64, Map), SnapshotError> {
        let gnu = header.as_gnu().ok_or_else(|| bad("a sparse file has no header of GNU tar"))?;
        let bytes = number(gnu.real_size())?;
        let mut map = Map::default();
        map.add_all(&gnu.sparse)?;
        let mut goes_on = gnu.is_extended();
        while goes_on {
            let mut more = GnuExtSparseHeader::new();
            self.fill(more.as_mut_bytes())?;
            // One without a piece could be followed by any number of them.
            if more.sparse().iter().all(GnuSparseHeader::is_empty) {
                return Err(bad("the map of a sparse file has an empty part"));
            }
            map.add_all(more.sparse())?;
            goes_on = more.is_extended();
        }
        Ok((bytes, map))
    }

    /// Gives each block of `member`, which has come last, that has any data, with its number.
    pub(super) fn take(
        &mut self,
        member: &Member,
        mut give: impl FnMut(u64, &[u8]) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut block = vec![0; BLOCK as usize];
        let mut begun = None;
        for Piece { mut at, end } in member.map.pieces.iter().copied() {
            while at < end {
                let number = at / BLOCK;
                if begun != Some(number) {
                    if let Some(done) = begun.replace(number) {
                        give(done, &block[..member.block_len(done)])?;
                    }
                    block.fill(0);
                }
                let (from, to) = (at % BLOCK, (end - number * BLOCK).min(BLOCK));
                self.fill(&mut block[from as usize..to as usize])?;
                at = number * BLOCK + to;
            }
        }
        if let Some(done) = begun {
            give(done, &block[..member.block_len(done)])?;
        }
        let padding = (RECORD - member.map.stored % RECORD) % RECORD;
        self.fill(&mut [0; RECORD as usize][..padding as usize])
    }

    /// Nothing but zeros follows the last file.
    fn end(&mut self) -> Result<(), SnapshotError> {
        let mut buffer = [0; 4096];
        let mut rest = (&mut self.input).take(END_MAX + 1);
        loop {
            let read = match rest.read(&mut buffer) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                read => read.map_err(input)?,
            };
            match read {
                0 if rest.limit() > 0 => return Ok(()),
                read if read > 0 && buffer[..read].iter().all(|byte| *byte == 0) => {}
                _ => return Err(bad("something follows its end")),
            }
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        self.input.read_exact(buffer).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof if !self.is_begun => no_archive(),
            _ => input(e),
        })
    }
}

impl Map {
    fn add_all(&mut self, headers: &[GnuSparseHeader]) -> Result<(), SnapshotError> {
        headers.iter().filter(|header| !header.is_empty()).try_for_each(|header| {
            let (at, len) = (number(header.offset())?, number(header.length())?);
            self.add(at, len)
        })
    }

    /// Adds a piece of data that comes after all others; one without a byte says where a hole ends.
    fn add(&mut self, at: u64, len: u64) -> Result<(), SnapshotError> {
        let end = at.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        let end = end.ok_or_else(|| bad("a file is larger than files can be"))?;
        if at < self.end || self.is_closed {
            return Err(bad("the pieces of a sparse file overlap, or are not in order"));
        }
        self.is_closed = len == 0;
        if len > 0 {
            if !self.stored.is_multiple_of(RECORD) || self.pieces.len() >= PIECES_MAX {
                return Err(bad("a sparse file is in too many or uneven pieces"));
            }
            self.pieces.push(Piece { at, end });
        }
        self.stored += len;
        self.end = end;
        Ok(())
    }
}

fn has_checksum(header: &Header) -> bool {
    let bytes = header.as_bytes();
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    // The eight bytes of the sum itself count as spaces.
    let found = sum(&bytes[..148]) + 8 * 32 + sum(&bytes[156..]);
    header.cksum().is_ok_and(|expected| expected == found)
}

/// A field of a header. The error of the crate quotes it, whatever it is.
fn number(field: std::io::Result<u64>) -> Result<u64, SnapshotError> {
    field.map_err(|_| bad("a size in a header is no number"))
}

fn no_archive() -> SnapshotError {
    bad("it is no tar archive, compressed with zstd or not")
}

fn input(error: std::io::Error) -> SnapshotError {
    match error.kind() {
        ErrorKind::UnexpectedEof => bad("it ends where more has to come"),
        _ => SnapshotError::Input(error),
    }
}

/// The beginning of a path, for messages.
pub(super) fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(100).collect()
}
