//! Pseudo-random byte streams that any range of can be computed without what precedes it.
//!
//! The writer in the container and the verifier on the host share this definition, so a log can be
//! compared byte for byte, whichever part of it is left.

/// Bytes `offset..offset + out.len()` of the stream of `seed`.
pub fn fill(seed: u64, offset: u64, out: &mut [u8]) {
    let lead = (offset % 8) as usize;
    let mut word = offset / 8;
    let mut rest = out;
    if lead != 0 {
        let bytes = block(seed, word);
        let n = rest.len().min(8 - lead);
        rest[..n].copy_from_slice(&bytes[lead..lead + n]);
        rest = &mut rest[n..];
        word += 1;
    }
    for chunk in rest.chunks_mut(8) {
        chunk.copy_from_slice(&block(seed, word)[..chunk.len()]);
        word += 1;
    }
}

/// Sizes of the writes that make up a stream: odd ones, from one byte to 128 KiB, the same for every run.
pub fn write_sizes(seed: u64) -> impl Iterator<Item = usize> {
    (0..).map(move |n| {
        let random = mix(seed ^ mix(n));
        match random % 16 {
            0 => 1 + (random >> 32) as usize % 7,
            1..4 => 1 + (random >> 32) as usize % 5000,
            _ => 1 + (random >> 32) as usize % (128 << 10),
        }
    })
}

fn block(seed: u64, word: u64) -> [u8; 8] {
    mix(seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(word)).to_le_bytes()
}

/// The output function of splitmix64.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_equals_the_same_range_of_the_whole() {
        let mut whole = vec![0; 1000];
        fill(7, 0, &mut whole);
        for from in 0..40 {
            for to in from..60 {
                let mut part = vec![0; to - from];
                fill(7, from as u64, &mut part);
                assert_eq!(part, whole[from..to], "{from}..{to}");
            }
        }
    }

    #[test]
    fn another_seed_is_another_stream() {
        let (mut one, mut two) = ([0; 64], [0; 64]);
        fill(1, 0, &mut one);
        fill(2, 0, &mut two);
        assert_ne!(one, two);
    }
}
