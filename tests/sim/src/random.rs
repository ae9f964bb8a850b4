//! Randomness of a simulation: one independent stream per purpose, all from the seed, so that one more draw in one
//! place changes nothing elsewhere.

use holdfast_scenario::mix;

/// What a stream is for.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Purpose {
    Plan = 1,
    Schedule,
    Timers,
    Network,
    Faults,
    Guests,
    Workers,
    Disk,
    Clock,
    Product,
    Scenes,
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64, purpose: Purpose, number: u64) -> Self {
        let stream = (purpose as u64) << 32 | number;
        let mut random = Self(seed.wrapping_mul(0xd1b5_4a32_d192_ed03) ^ mix(stream));
        random.next();
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which is not zero.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number of `[low, high)`.
    pub(crate) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    /// True so many times in a hundred.
    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// One of them.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Between zero and eight times `mean`, exponentially distributed.
    pub(crate) fn around(&mut self, mean: u64) -> u64 {
        // The logarithm by halving: exact and equal on every machine, unlike floating point.
        let mut sum = 0;
        for _ in 0..8 {
            sum += self.below(mean.max(1));
            if self.percent(50) {
                break;
            }
        }
        sum
    }
}
