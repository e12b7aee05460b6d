//! Digests of large sparse files.
//!
//! SHA-256 of the bytes would read every hole: minutes for a disk of which a few MiB were ever written. So
//! it is taken of the blocks of 64 KiB that are not all zero, each preceded by its number (64 bits,
//! little-endian). That depends on nothing but the bytes, wherever a file system puts holes.

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::unistd::Whence;
use sha2::{Digest as _, Sha256};

use crate::files::seek;

/// Bytes in a block.
pub(super) const BLOCK: u64 = 64 << 10;

static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Digest of a file that goes by block by block.
#[derive(Default)]
pub(super) struct Digest {
    sha: Sha256,
    data: u64,
}

/// What there is to know of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digested {
    /// Its length.
    pub(super) bytes: u64,
    /// Bytes of the blocks that are not all zero.
    pub(super) data: u64,
    /// The digest, in hex.
    pub(super) sha256: String,
}

impl Digest {
    /// Takes block `number`, if there is anything in it; tells whether there was.
    pub(super) fn block(&mut self, number: u64, block: &[u8]) -> bool {
        // A memcmp(3), many times as fast as looking at each byte.
        let has_data = ZEROS.get(..block.len()) != Some(block);
        if has_data {
            self.sha.update(number.to_le_bytes());
            self.sha.update(block);
            self.data += block.len() as u64;
        }
        has_data
    }

    /// Bytes of the blocks that had anything in them.
    pub(super) fn data(&self) -> u64 {
        self.data
    }

    /// That of a file of so many bytes.
    pub(super) fn finish(self, bytes: u64) -> Digested {
        let sha256 = self.sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Digested { bytes, data: self.data, sha256 }
    }
}

/// The digest of `file`. `read` is told how many bytes were read, and may end it.
pub(super) fn digest(file: &File, read: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<Digested> {
    let len = file.metadata()?.len();
    let (mut digest, mut block, mut next) = (Digest::default(), vec![0; BLOCK as usize], 0);
    while let Some(data) = seek(file, (next * BLOCK) as i64, Whence::SeekData)? {
        let end = seek(file, data, Whence::SeekHole)?.map_or(len, i64::unsigned_abs);
        for number in (data.unsigned_abs() / BLOCK)..end.div_ceil(BLOCK) {
            let here = usize::try_from(len - number * BLOCK).unwrap_or(usize::MAX).min(block.len());
            file.read_exact_at(&mut block[..here], number * BLOCK)?;
            digest.block(number, &block[..here]);
            read(here as u64)?;
        }
        next = end.div_ceil(BLOCK);
    }
    Ok(digest.finish(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64, data: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        for (at, bytes) in data {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    fn of(file: &File) -> io::Result<Digested> {
        digest(file, &mut |_| Ok(()))
    }

    #[test]
    fn holes_are_not_read_and_are_the_same_as_zeros() {
        let sparse = file(1 << 40, &[(5, b"a"), (BLOCK * 7 - 1, b"bc"), (1 << 39, b"d")]);
        let zeros = vec![0; 3 * BLOCK as usize];
        let dense = file(1 << 40, &[(BLOCK, &zeros), (5, b"a"), (BLOCK * 7 - 1, b"bc"), (1 << 39, b"d")]);
        assert_eq!(of(&sparse).unwrap(), of(&dense).unwrap());
        let Digested { bytes, data, .. } = of(&sparse).unwrap();
        // Of two of them, "bc" has a byte each.
        assert_eq!((bytes, data), (1 << 40, 4 * BLOCK));
    }

    #[test]
    fn every_byte_and_its_place_counts() {
        let base = of(&file(10 * BLOCK, &[(BLOCK, b"x")])).unwrap().sha256;
        for other in [
            file(10 * BLOCK, &[(BLOCK, b"y")]),
            file(10 * BLOCK, &[(BLOCK + 1, b"x")]),
            file(10 * BLOCK, &[(2 * BLOCK, b"x")]),
            file(10 * BLOCK, &[(BLOCK, b"x"), (10 * BLOCK - 1, b"x")]),
        ] {
            assert_ne!(of(&other).unwrap().sha256, base);
        }
        // A last block that is not whole.
        assert_ne!(of(&file(7, &[(6, b"x")])).unwrap(), of(&file(6, &[(5, b"x")])).unwrap());
        // printf "" | sha256sum
        assert!(of(&file(0, &[])).unwrap().sha256.starts_with("e3b0c44298fc1c14"));
    }
}
