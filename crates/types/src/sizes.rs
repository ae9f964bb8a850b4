//! Sizes and addresses: blocks of 4 KiB, chunks of 256 KiB, bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Writer};
use crate::error::{ErrorCode, UserError};
use crate::limits;

/// Bytes of a block, the unit of addressing, checksums and atomicity.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks of a chunk, the unit of allocation, change tracking and comparison.
pub const CHUNK_BLOCKS: u64 = 64;
/// Bytes of a chunk: 256 KiB.
pub const CHUNK_BYTES: u64 = CHUNK_BLOCKS * BLOCK_BYTES as u64;

/// Address of a block within a volume, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// Offset of the block's first byte.
    pub fn byte_offset(self) -> u64 {
        self.0 * BLOCK_BYTES as u64
    }
    /// The chunk that holds the block.
    pub fn chunk(self) -> ChunkIndex {
        ChunkIndex(self.0 / CHUNK_BLOCKS)
    }
    /// Position within its chunk, 0 to 63.
    pub fn within_chunk(self) -> usize {
        (self.0 % CHUNK_BLOCKS) as usize
    }
}

/// Address of a chunk within a volume, in chunks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ChunkIndex(pub u64);

impl ChunkIndex {
    /// The chunk's first block.
    pub fn first_block(self) -> BlockIndex {
        BlockIndex(self.0 * CHUNK_BLOCKS)
    }
}

/// A run of blocks: `[start, start + count)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockRange {
    /// First block.
    pub start: BlockIndex,
    /// Number of blocks; at least 1 in any command.
    pub count: u32,
}

impl BlockRange {
    /// `count` blocks from `start`.
    pub fn new(start: BlockIndex, count: u32) -> Self {
        Self { start, count }
    }
    /// One past the last block. Saturates: a range that wraps is beyond every volume.
    pub fn end(self) -> BlockIndex {
        BlockIndex(self.start.0.saturating_add(self.count.into()))
    }
    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.count) * BLOCK_BYTES as u64
    }
    /// The blocks of the range.
    pub fn blocks(self) -> impl Iterator<Item = BlockIndex> {
        (self.start.0..self.end().0).map(BlockIndex)
    }
    /// Appends start and count, 12 bytes.
    pub fn encode(self, out: &mut Writer) {
        out.u64(self.start.0);
        out.u32(self.count);
    }
    /// Reads what [`Self::encode`] wrote.
    pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { start: BlockIndex(input.u64()?), count: input.u32()? })
    }
}

/// A size in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// Whole blocks that this size holds.
    pub fn blocks(self) -> u64 {
        self.0 / BLOCK_BYTES as u64
    }
    /// Chunks that hold this size, the last one perhaps in part.
    pub fn chunks(self) -> u64 {
        self.0.div_ceil(CHUNK_BYTES)
    }
    /// The size of a volume that somebody asked for: rounded up to whole blocks, as CSI expects; refused if zero or
    /// beyond the limit.
    pub fn for_volume(requested: u64) -> Result<Self, UserError> {
        if requested == 0 {
            return Err(UserError::new(ErrorCode::InvalidArgument, "a volume cannot be 0 bytes")
                .hint("give a size, for example --size 10GiB"));
        }
        let max = limits::VOLUME_BYTES_MAX;
        if requested > max {
            return Err(UserError::new(
                ErrorCode::OutOfRange,
                format!("{} is larger than the largest volume, {}", Self(requested), Self(max)),
            )
            .hint("ask for at most 16TiB, or split the data over several volumes"));
        }
        Ok(Self(requested.next_multiple_of(BLOCK_BYTES as u64)))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 4] =
            [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        for (unit, size) in UNITS {
            if self.0 >= size {
                let whole = self.0 as f64 / size as f64;
                return if self.0.is_multiple_of(size) {
                    write!(f, "{whole} {unit}")
                } else {
                    write!(f, "{whole:.1} {unit}")
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl FromStr for ByteSize {
    type Err = String;
    /// A whole number with an optional unit: `KiB`, `MiB`, `GiB`, `TiB` (also `K`, `Ki`, …), `KB` … for powers of ten.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let bad = || format!("'{text}' is not a size: write for example 1GiB, 512MiB or a number of bytes");
        let number: u64 = number.parse().map_err(|_| bad())?;
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "ki" | "kib" => 1 << 10,
            "m" | "mi" | "mib" => 1 << 20,
            "g" | "gi" | "gib" => 1 << 30,
            "t" | "ti" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(bad()),
        };
        number.checked_mul(factor).map(Self).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in [("1GiB", 1 << 30), ("4096", 4096), ("3 MB", 3_000_000), ("2Ti", 2 << 40)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "1.5GiB", "99999999999TiB", "-1"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(ByteSize(1 << 30).to_string(), "1 GiB");
        assert_eq!(ByteSize(1536 << 20).to_string(), "1.5 GiB");
    }

    #[test]
    fn a_volume_is_whole_blocks() {
        assert_eq!(ByteSize::for_volume(1).map_err(|e| e.code), Ok(ByteSize(4096)));
        assert_eq!(ByteSize::for_volume(0).map_err(|e| e.code), Err(ErrorCode::InvalidArgument));
        assert_eq!(ByteSize::for_volume((16 << 40) + 1).map_err(|e| e.code), Err(ErrorCode::OutOfRange));
    }
}
