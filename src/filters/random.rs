//! Numbers that look random, for filters that do harm at random.

/// Numbers that look random, the same for the same seed on every machine. Not for secrets.
/// Source: Blackman and Vigna, xoshiro256** 1.0, seeded by splitmix64; the sequence is that of nbdkit common/include/random.h.
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

impl Random {
    /// Starts the sequence of `seed`.
    pub fn new(mut seed: u64) -> Random {
        Random(std::array::from_fn(|_| {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        let Random(s) = self;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }
}

/// The seconds since 1970, for what is to differ from run to run.
pub fn seed() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_random_numbers_are_those_of_the_reference() {
        // Made with the C code of the reference implementation, seed 0.
        let mut random = Random::new(0);
        assert_eq!(random.next(), 0x99ec_5f36_cb75_f2b4);
    }
}
