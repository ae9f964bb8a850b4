//! The end-to-end checksum of a block.

use crate::sizes::BlockIndex;

/// CRC-32 (IEEE) of a block's bytes followed by its address, so that a block found at another address than its own
/// fails the check. `data` is one block (4096 bytes). Computed once by the session, checked by every replica.
pub fn block_checksum(block: BlockIndex, data: &[u8]) -> u32 {
    debug_assert_eq!(data.len(), crate::sizes::BLOCK_BYTES);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(data);
    hasher.update(&block.0.to_le_bytes());
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_part_of_the_checksum() {
        let data = [7; crate::sizes::BLOCK_BYTES];
        assert_ne!(block_checksum(BlockIndex(1), &data), block_checksum(BlockIndex(2), &data));
    }
}
