//! What a frontend serves.

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_types::BlockRange;

/// Why a request failed, as a guest is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The attachment has ended: nothing works on this device any more.
    #[error("the device has ended: {0}")]
    Ended(String),
    /// The device is read-only.
    #[error("the device is read-only")]
    ReadOnly,
    /// The request reaches beyond the device's end.
    #[error("the request reaches beyond the device's end")]
    OutOfRange,
    /// Anything else: no quorum within the volume's policy, or a fault.
    #[error("{0}")]
    Failed(String),
}

/// What stands in a run of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunKind {
    /// Data.
    Data,
    /// Zeros that occupy space or shadow older data.
    Zero,
    /// Never written, or trimmed: reads as zeros and takes no space.
    Absent,
}

/// Blocks of one kind in a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Number of blocks.
    pub blocks: u32,
    /// What they are.
    pub kind: RunKind,
}

/// A block device of whole blocks of 4096 bytes. A write has happened, durably, when it is answered.
pub trait Device {
    /// Its size in bytes, whole blocks. May grow.
    fn size_bytes(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Reads at most `limits::REQUEST_BLOCKS_MAX` blocks.
    fn read(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<Bytes, DeviceError>>;
    /// Writes at most `limits::REQUEST_BLOCKS_MAX` blocks.
    fn write(&self, range: BlockRange, data: Bytes) -> LocalBoxFuture<'_, Result<(), DeviceError>>;
    /// Gives at most `limits::TRIM_BLOCKS_MAX` blocks back; they read as zeros afterwards.
    fn trim(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<(), DeviceError>>;
    /// Makes at most `limits::TRIM_BLOCKS_MAX` blocks zero.
    fn zero(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<(), DeviceError>>;
    /// What stands in at most `limits::REQUEST_BLOCKS_MAX` blocks: runs that cover the range exactly.
    fn status(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<Vec<Run>, DeviceError>>;
    /// Why the device has ended, if it has.
    fn ended(&self) -> Option<String>;
}
