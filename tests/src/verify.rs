//! Comparing what arrived with what `cube-test-writer stream` wrote.

use std::{
    io::{self, Read},
    ops::Range,
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
            // Mostly, what is not of the stream says what it is.
            let found = got[first..n.min(first + 120)].escape_ascii();
            return Err(io::Error::other(format!("stream {seed} differs at offset {place}: {found}")));
        }
        at += n as u64;
    }
}

/// Longest text of [`compare_around_losses`] that says how much is missing.
const NOTE_MAX: usize = 64;

/// Like [`compare`] from the beginning, for the output of `cubecli logs` with its standard error in
/// between: each `[N bytes lost]` stands where so many bytes are missing. Gives the bytes that were
/// there, and those that were missing; `progress` is called with the first before every read.
pub fn compare_around_losses(
    mut from: impl Read,
    seed: u64,
    mut progress: impl FnMut(u64),
) -> io::Result<(u64, u64)> {
    let (mut bytes, mut expected, mut chunk) = (Vec::new(), Vec::new(), vec![0; 256 << 10]);
    let (mut there, mut lost, mut ended) = (0, 0, false);
    while !ended {
        progress(there);
        let n = from.read(&mut chunk)?;
        ended = n == 0;
        bytes.extend_from_slice(&chunk[..n]);
        loop {
            // A note that has only begun is looked at when all of it is there.
            let whole = if ended { bytes.len() } else { bytes.len().saturating_sub(NOTE_MAX) };
            expected.resize(whole, 0);
            fill(seed, there + lost, &mut expected);
            match bytes[..whole].iter().zip(&expected).position(|(got, expected)| got != expected) {
                Some(at) => {
                    let (note, missing) = note_around(&bytes, at).ok_or_else(|| {
                        io::Error::other(format!(
                            "stream {seed} differs at offset {}",
                            there + lost + at as u64
                        ))
                    })?;
                    there += note.start as u64;
                    lost += missing;
                    bytes.drain(..note.end);
                }
                None => {
                    // The first bytes of a note may be what the stream has there.
                    let done = if ended { whole } else { whole.saturating_sub(NOTE_MAX) };
                    there += done as u64;
                    bytes.drain(..done);
                    break;
                }
            }
        }
    }
    Ok((there, lost))
}

/// The note that the byte at `at` belongs to, and its number.
fn note_around(bytes: &[u8], at: usize) -> Option<(Range<usize>, u64)> {
    (at.saturating_sub(NOTE_MAX)..=at).rev().find_map(|start| {
        let rest = bytes[start..].strip_prefix(b"[")?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        rest[digits..].starts_with(b" bytes lost]\n").then_some(())?;
        let missing = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        Some((start..start + 1 + digits + b" bytes lost]\n".len(), missing))
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(from: u64, to: u64) -> Vec<u8> {
        let mut bytes = vec![0; (to - from) as usize];
        fill(5, from, &mut bytes);
        bytes
    }

    #[test]
    fn losses_are_skipped_wherever_they_are() {
        for end in 100_000..100_300 {
            let mut output = stream(0, end);
            output.extend(b"[7 bytes lost]\n[700000 bytes lost]\n");
            output.extend(stream(end + 700_007, 900_000));
            let found = compare_around_losses(&output[..], 5, |_| ()).unwrap();
            assert_eq!(found, (900_000 - 700_007, 700_007));
        }
    }

    #[test]
    fn a_loss_that_is_not_told_or_told_wrongly_is_found() {
        for note in ["", "[6 bytes lost]\n"] {
            let output = [stream(0, 1000), note.into(), stream(1007, 2000)].concat();
            assert!(compare_around_losses(&output[..], 5, |_| ()).is_err());
        }
    }
}
