//! Latency histograms with fixed buckets: plain numbers that one thread records and that are copied out whole.

use std::time::Duration;

/// Upper bounds of the buckets, in microseconds; what is longer than the last one falls into one more bucket.
pub const LATENCY_BOUNDS_US: [u64; 20] = [
    25, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1_200, 1_600, 2_500, 5_000, 10_000, 25_000, 100_000,
    500_000, 2_000_000, 10_000_000,
];

/// How long things took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyHistogram {
    buckets: [u64; LATENCY_BOUNDS_US.len() + 1],
    sum_ns: u64,
}

impl LatencyHistogram {
    /// One more, which took so long.
    pub fn record(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = LATENCY_BOUNDS_US.partition_point(|bound| *bound < us);
        self.buckets[bucket] += 1;
        self.sum_ns = self.sum_ns.saturating_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }
    /// How many of each bucket, not cumulative; the last has no bound.
    pub fn buckets(&self) -> &[u64] {
        &self.buckets
    }
    /// How many in all.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
    /// All of them together.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_falls_into_the_first_bucket_that_holds_it() {
        let mut histogram = LatencyHistogram::default();
        for us in [0, 25, 26, 10_000_000, 10_000_001] {
            histogram.record(Duration::from_micros(us));
        }
        assert_eq!(histogram.buckets()[..2], [2, 1]);
        assert_eq!(histogram.buckets()[LATENCY_BOUNDS_US.len() - 1..], [1, 1]);
        assert_eq!((histogram.count(), histogram.sum()), (5, Duration::from_micros(20_000_052)));
        assert!(LATENCY_BOUNDS_US.is_sorted());
    }
}
