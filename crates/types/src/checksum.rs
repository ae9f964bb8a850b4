//! The end-to-end checksum of a block.

use crate::sizes::BlockIndex;

/// CRC-32 (IEEE) of a block's bytes followed by its address, so that a block found at another address than its own
/// fails the check. `data` is one block (4096 bytes). Computed once by the session, checked by every replica.
pub fn block_checksum(block: BlockIndex, data: &[u8]) -> u32 {
    debug_assert_eq!(data.len(), crate::sizes::BLOCK_BYTES);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(data);
    #[cfg(feature = "planted-bugs")]
    if planted::is_address_left_out() {
        return hasher.finalize();
    }
    hasher.update(&block.0.to_le_bytes());
    hasher.finalize()
}

/// A fault for tests.
#[cfg(feature = "planted-bugs")]
pub mod planted {
    use std::cell::Cell;

    thread_local! {
        static ADDRESS_LEFT_OUT: Cell<bool> = const { Cell::new(false) };
    }

    /// From now on checksums of this thread do not contain the address, or contain it again.
    pub fn leave_address_out(yes: bool) {
        ADDRESS_LEFT_OUT.with(|left_out| left_out.set(yes));
    }

    pub(super) fn is_address_left_out() -> bool {
        ADDRESS_LEFT_OUT.with(Cell::get)
    }
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
