//! Counters of a volume's sessions on one shard: plain numbers on its thread.

use holdfast_types::LatencyHistogram;

/// What sessions did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionUsage {
    /// How long reads took that succeeded, waiting for a free slot included.
    pub reads: LatencyHistogram,
    /// How long writes took that succeeded.
    pub writes: LatencyHistogram,
    /// How long trims and zeroings took that succeeded.
    pub clears: LatencyHistogram,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Calls to replicas that were repeated.
    pub repeats: u64,
}
