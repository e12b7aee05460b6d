//! Comparing what arrived with what `cube-test-writer stream` wrote.

use std::{
    io::{self, Read},
    thread,
};

use cube_test_writer::fill;

/// Reads `from` to its end and compares it with the stream of `seed` from `offset` on; gives the
/// number of bytes. Fails at the first byte that differs.
pub fn compare(from: impl Read, seed: u64, offset: u64) -> io::Result<u64> {
    compare_slowly(from, seed, offset, |_| ())
}

/// Like [`compare`]; `pause` is called before every read with the number of bytes so far.
pub fn compare_slowly(
    mut from: impl Read,
    seed: u64,
    offset: u64,
    mut pause: impl FnMut(u64),
) -> io::Result<u64> {
    let (mut got, mut expected) = (vec![0; 256 << 10], vec![0; 256 << 10]);
    let mut at = offset;
    loop {
        pause(at - offset);
        let n = match from.read(&mut got) {
            Ok(0) => return Ok(at - offset),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        fill(seed, at, &mut expected[..n]);
        if let Some(first) = got[..n].iter().zip(&expected).position(|(got, expected)| got != expected) {
            let place = at + first as u64;
            return Err(io::Error::other(format!("stream {seed} differs at offset {place}")));
        }
        at += n as u64;
    }
}

/// Compares both with the streams of the seeds 1 and 2 at once, to their ends. Gives the bytes of each.
pub fn compare_both(
    out: impl Read + Send + 'static,
    err: impl Read + Send + 'static,
    slow: fn(u64),
) -> (u64, u64) {
    let out = thread::spawn(move || compare_slowly(out, 1, 0, slow));
    let err = thread::spawn(move || compare_slowly(err, 2, 0, slow));
    (out.join().unwrap().unwrap(), err.join().unwrap().unwrap())
}
