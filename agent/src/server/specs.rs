//! `config.json` files that come in parts, until the Create that they are for.

use std::sync::Mutex;

use cube_protocol::{guest::PutSpecRequest, spec::BYTES_MAX};

use super::error::Error;
use crate::errors::lock;

/// Copies of a `config.json` that are in memory while a container is made of it: as it came, as the agent
/// understands it, as the init stage gets it, and as that understands it; some of them are larger.
const COPIES: u64 = 8;

/// All that are here, the oldest first: at most [`BYTES_MAX`] together.
#[derive(Debug, Default)]
pub(super) struct Specs(Mutex<Vec<Incoming>>);

#[derive(Debug)]
struct Incoming {
    container: String,
    total: usize,
    bytes: Vec<u8>,
}

impl Specs {
    /// Takes one part. `available` is the memory that the guest has, in bytes.
    pub(super) fn put(&self, request: PutSpecRequest, available: u64) -> Result<(), Error> {
        let PutSpecRequest { container_id: container, total_bytes, offset, part, .. } = request;
        let total = usize::try_from(total_bytes).unwrap_or(usize::MAX);
        if total > BYTES_MAX {
            return Err(Error::SpecTooLong { bytes: total_bytes });
        }
        let mut specs = lock(&self.0);
        if offset == 0 {
            if total_bytes.saturating_mul(COPIES) > available {
                return Err(Error::SpecNeedsMemory { bytes: total_bytes, available });
            }
            specs.retain(|spec| spec.container != container);
            while specs.iter().map(|spec| spec.total).sum::<usize>() + total > BYTES_MAX {
                specs.remove(0);
            }
            specs.push(Incoming { container: container.clone(), total, bytes: Vec::with_capacity(total) });
        }
        let spec = specs.iter_mut().find(|spec| spec.container == container && spec.total == total);
        let have = spec.as_ref().map_or(0, |spec| spec.bytes.len() as u64);
        let end = offset.saturating_add(part.len() as u64);
        match spec {
            // Its answer was lost, and the host repeats it.
            Some(_) if end <= have => Ok(()),
            Some(spec) if offset == have && end <= total_bytes => {
                spec.bytes.extend_from_slice(&part);
                Ok(())
            }
            _ => Err(Error::SpecPart { container, offset, have }),
        }
    }

    /// The whole file of `container`, whose length the Create names. It is not kept.
    pub(super) fn take(&self, container: &str, total: u64) -> Result<Vec<u8>, Error> {
        let mut specs = lock(&self.0);
        let found = specs.iter().position(|spec| spec.container == container);
        let bytes = found.map(|at| specs.remove(at).bytes).unwrap_or_default();
        let have = bytes.len() as u64;
        if have == total {
            Ok(bytes)
        } else {
            Err(Error::SpecPart { container: container.into(), offset: total, have })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: u64 = u64::MAX;

    fn part(container: &str, total: u64, offset: u64, part: &[u8]) -> PutSpecRequest {
        let (container_id, part) = (container.to_owned(), part.to_vec());
        PutSpecRequest { container_id, total_bytes: total, offset, part, ..Default::default() }
    }

    #[test]
    fn parts_become_the_file_also_if_one_is_repeated() {
        let specs = Specs::default();
        specs.put(part("c", 6, 0, b"abc"), PLENTY).unwrap();
        specs.put(part("d", 2, 0, b"xy"), PLENTY).unwrap();
        for _ in 0..2 {
            specs.put(part("c", 6, 3, b"def"), PLENTY).unwrap();
        }
        assert_eq!(specs.take("c", 6).unwrap(), b"abcdef");
        assert_eq!(specs.take("d", 2).unwrap(), b"xy");
        assert!(matches!(specs.take("c", 6), Err(Error::SpecPart { have: 0, .. })));
    }

    #[test]
    fn what_does_not_follow_is_refused_and_a_part_at_the_beginning_begins_anew() {
        let specs = Specs::default();
        let refused = |request| matches!(specs.put(request, PLENTY), Err(Error::SpecPart { .. }));
        assert!(refused(part("c", 6, 3, b"def")));
        specs.put(part("c", 6, 0, b"abc"), PLENTY).unwrap();
        assert!(refused(part("c", 6, 4, b"ef")), "a hole");
        assert!(refused(part("c", 6, 3, b"defg")), "beyond the end");
        assert!(refused(part("c", 7, 3, b"def")), "of another length");
        specs.put(part("c", 2, 0, b"xy"), PLENTY).unwrap();
        assert!(matches!(specs.take("c", 6), Err(Error::SpecPart { have: 2, .. })));
    }

    #[test]
    fn all_together_are_bounded_and_the_oldest_gives_way() {
        let specs = Specs::default();
        let half = BYTES_MAX as u64 / 2;
        for container in ["a", "b", "c"] {
            specs.put(part(container, half, 0, b"x"), PLENTY).unwrap();
        }
        let held: Vec<_> = lock(&specs.0).iter().map(|spec| spec.container.clone()).collect();
        assert_eq!(held, ["b", "c"]);
        let long = specs.put(part("d", BYTES_MAX as u64 + 1, 0, b"x"), PLENTY);
        assert!(matches!(long, Err(Error::SpecTooLong { .. })));
    }

    #[test]
    fn a_guest_without_the_memory_says_so_before_it_takes_anything() {
        let specs = Specs::default();
        let error = specs.put(part("c", 1000, 0, b"x"), 5000).unwrap_err();
        assert!(error.to_string().contains("1000 bytes"), "{error}");
        assert!(lock(&specs.0).is_empty());
    }
}
