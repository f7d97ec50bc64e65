//! nbdkit's random numbers, for what must be the same as nbdkit makes of the same seed. Not for secrets.
//! Source: Blackman and Vigna, xoshiro256** 1.0 and splitmix64, <https://prng.di.unimi.it/>; nbdkit common/include/random.h.

/// A generator and its state.
#[derive(Clone, Debug)]
pub struct Xoshiro {
    state: [u64; 4],
}

impl Xoshiro {
    /// Starts from a seed; the four words of the state are splitmix64's first four numbers.
    pub fn new(mut seed: u64) -> Xoshiro {
        let state = std::array::from_fn(|_| {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        });
        Xoshiro { state }
    }

    /// The next 64 bits.
    #[inline]
    pub fn word(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// The low eight of the next 64 bits.
    #[inline]
    pub fn byte(&mut self) -> u8 {
        self.word() as u8
    }
}

/// A seed for those who gave none: nbdkit's, which is the time in seconds.
pub fn seed() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// splitmix64 of seed 0 is in many of its tests; the numbers are also compared with nbdkit, in tests/black_box/layers.
    #[test]
    fn is_the_generator_that_its_authors_published() {
        let mut random = Xoshiro::new(0);
        assert_eq!(random.state[..2], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
        assert_eq!([random.word(), random.word()], [0x99ec_5f36_cb75_f2b4, 0xbf6e_1f78_4956_452a]);
    }
}
