//! Digests of large sparse files.
//!
//! SHA-256 of the bytes would read every hole: minutes for a disk of which a few MiB were ever written. So
//! it is taken of the blocks of 64 KiB that are not all zero, each preceded by its number (64 bits,
//! little-endian). That depends on nothing but the bytes, wherever a file system puts holes.

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::unistd::Whence;
use sha2::{Digest, Sha256};

use crate::files::seek;

const BLOCK: u64 = 64 << 10;

/// Length and digest of `file`, the latter in hex.
pub(super) fn digest(file: &File) -> io::Result<(u64, String)> {
    let len = file.metadata()?.len();
    let (mut hash, mut block, mut next) = (Sha256::new(), vec![0; BLOCK as usize], 0);
    while let Some(data) = seek(file, (next * BLOCK) as i64, Whence::SeekData)? {
        let end = seek(file, data, Whence::SeekHole)?.map_or(len, i64::unsigned_abs);
        for number in (data.unsigned_abs() / BLOCK)..end.div_ceil(BLOCK) {
            let here = usize::try_from(len - number * BLOCK).unwrap_or(usize::MAX).min(block.len());
            file.read_exact_at(&mut block[..here], number * BLOCK)?;
            if block[..here].iter().any(|byte| *byte != 0) {
                hash.update(number.to_le_bytes());
                hash.update(&block[..here]);
            }
        }
        next = end.div_ceil(BLOCK);
    }
    Ok((len, hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
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

    #[test]
    fn holes_are_not_read_and_are_the_same_as_zeros() {
        let sparse = file(1 << 40, &[(5, b"a"), (BLOCK * 7 - 1, b"bc"), (1 << 39, b"d")]);
        let zeros = vec![0; 3 * BLOCK as usize];
        let dense = file(1 << 40, &[(BLOCK, &zeros), (5, b"a"), (BLOCK * 7 - 1, b"bc"), (1 << 39, b"d")]);
        assert_eq!(digest(&sparse).unwrap(), digest(&dense).unwrap());
        assert_eq!(digest(&sparse).unwrap().0, 1 << 40);
    }

    #[test]
    fn every_byte_and_its_place_counts() {
        let base = digest(&file(10 * BLOCK, &[(BLOCK, b"x")])).unwrap().1;
        for other in [
            file(10 * BLOCK, &[(BLOCK, b"y")]),
            file(10 * BLOCK, &[(BLOCK + 1, b"x")]),
            file(10 * BLOCK, &[(2 * BLOCK, b"x")]),
            file(10 * BLOCK, &[(BLOCK, b"x"), (10 * BLOCK - 1, b"x")]),
        ] {
            assert_ne!(digest(&other).unwrap().1, base);
        }
        // A last block that is not whole.
        assert_ne!(digest(&file(7, &[(6, b"x")])).unwrap(), digest(&file(6, &[(5, b"x")])).unwrap());
        // printf "" | sha256sum
        assert!(digest(&file(0, &[])).unwrap().1.starts_with("e3b0c44298fc1c14"));
    }
}
