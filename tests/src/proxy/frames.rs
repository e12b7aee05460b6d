//! Where frames end in a stream of bytes.

use cube_protocol::frame::HEADER_LEN;

/// What has been seen of one direction of a stream connection.
#[derive(Debug, Default)]
pub(super) struct Frames {
    header: [u8; HEADER_LEN],
    /// Bytes of `header` that are there; all of them while a body is awaited.
    have: usize,
    /// Bytes of the body that are to come.
    body: usize,
    whole: u64,
}

impl Frames {
    /// Goes over bytes that follow those before; tells after how many of them `limit` frames in all are
    /// whole, if they are. Does not look at what comes after that.
    pub(super) fn scan(&mut self, bytes: &[u8], limit: u64) -> Option<usize> {
        let mut at = 0;
        while self.whole < limit {
            if at == bytes.len() {
                return None;
            }
            at += self.step(&bytes[at..]);
        }
        Some(at)
    }

    /// Takes the rest of a header or body, or what is there of it.
    fn step(&mut self, bytes: &[u8]) -> usize {
        let taken = if self.have < HEADER_LEN {
            let n = bytes.len().min(HEADER_LEN - self.have);
            self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            self.have += n;
            if self.have == HEADER_LEN {
                self.body = body_len(&self.header);
            }
            n
        } else {
            let n = bytes.len().min(self.body);
            self.body -= n;
            n
        };
        if self.have == HEADER_LEN && self.body == 0 {
            self.have = 0;
            self.whole += 1;
        }
        taken
    }
}

/// The length field, whatever the others are.
pub(super) fn body_len(header: &[u8; HEADER_LEN]) -> usize {
    u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize
}

#[cfg(test)]
mod tests {
    use cube_protocol::frame::{Header, Kind};

    use super::*;

    fn frame(len: usize) -> Vec<u8> {
        let header = Header { len: len as u32, ..Header::new(Kind::Data, 7) };
        [&header.encode()[..], &vec![0xee; len]].concat()
    }

    #[test]
    fn ends_of_frames_are_found_however_the_bytes_are_split() {
        let wire = [frame(3), frame(0), frame(100)].concat();
        for (limit, end) in [(0, 0), (1, 19), (2, 35), (3, 151)] {
            for chunk in 1..wire.len() {
                let (mut frames, mut before, mut found) = (Frames::default(), 0, None);
                for part in wire.chunks(chunk) {
                    if let Some(at) = frames.scan(part, limit) {
                        found = Some(before + at);
                        break;
                    }
                    before += part.len();
                }
                assert_eq!(found, Some(end), "{limit} frames in chunks of {chunk}");
            }
        }
        assert_eq!(Frames::default().scan(&wire, 4), None);
    }
}
