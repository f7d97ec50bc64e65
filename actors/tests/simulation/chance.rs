//! What happens by chance: one stream of numbers for each world, from its seed.

pub struct Chance(fastrand::Rng);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(fastrand::Rng::with_seed(seed))
    }

    /// 0 to `count - 1`; `count` is not 0.
    pub fn below(&mut self, count: usize) -> usize {
        self.0.usize(..count)
    }

    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        self.0.u64(least..=most)
    }

    /// `one_in(0)` never comes.
    pub fn one_in(&mut self, count: u32) -> bool {
        count > 0 && self.0.u32(..count) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.usize(..from.len())]
    }

    /// 1 to `most`: often all, often one, else anything between.
    pub fn piece(&mut self, most: usize) -> usize {
        match self.0.u8(..8) {
            0 => 1,
            1 => self.below(most.min(16)) + 1,
            2..=4 => self.below(most) + 1,
            _ => most,
        }
    }

    /// Any number at all.
    pub fn number(&mut self) -> u64 {
        self.0.u64(..)
    }
}
