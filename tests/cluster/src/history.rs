//! What every block may hold. A write that was acknowledged counts; one whose outcome is unknown may have happened
//! once, until a read under a later attachment has shown whether it did.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

use crate::random::mix;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// The stamp of a block that reads as zeros.
const ZEROS: u64 = 0;

#[derive(Clone, Default)]
struct Block {
    acknowledged: u64,
    /// Outcome unknown.
    perhaps: Vec<u64>,
}

/// All blocks. Each belongs to one worker, so nothing about a block is concurrent.
#[derive(Default)]
pub struct History(Mutex<BTreeMap<u64, Block>>);

/// A block's content for a stamp: every word tells block, stamp and place.
fn content(block: u64, stamp: u64) -> [u8; BLOCK] {
    let mut data = [0; BLOCK];
    if stamp != ZEROS {
        for (place, word) in data.chunks_exact_mut(8).enumerate() {
            let value = if place == 0 { stamp } else { mix(mix(block) ^ mix(stamp) ^ place as u64) };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    data
}

/// Contents of consecutive blocks.
pub fn contents(first: u64, stamps: &[u64]) -> Bytes {
    let mut data = BytesMut::with_capacity(stamps.len() * BLOCK);
    for (n, stamp) in stamps.iter().enumerate() {
        data.extend_from_slice(&content(first + n as u64, *stamp));
    }
    data.freeze()
}

/// The stamp of a block that holds what was written for it, and nothing else.
pub fn stamp_of(block: u64, data: &[u8]) -> Result<u64, String> {
    let stamp = u64::from_le_bytes(data[..8].try_into().map_err(|_| "a short block")?);
    if data != content(block, stamp) {
        return Err(format!("block {block} holds what nobody wrote (stamp {stamp})"));
    }
    Ok(stamp)
}

impl History {
    fn with<T>(&self, block: u64, change: impl FnOnce(&mut Block) -> T) -> T {
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(blocks.entry(block).or_default())
    }

    /// A write was acknowledged. Nothing older may ever be seen again.
    pub fn acknowledged(&self, block: u64, stamp: u64) {
        self.with(block, |state| *state = Block { acknowledged: stamp, perhaps: Vec::new() });
    }

    /// A write failed or its answer never came.
    pub fn unknown(&self, block: u64, stamp: u64) {
        self.with(block, |state| state.perhaps.push(stamp));
    }

    /// A read: `Ok`, or what is wrong with it. What it shows stays.
    pub fn check(&self, block: u64, data: &[u8]) -> Result<(), String> {
        self.shows(block, stamp_of(block, data)?)
    }

    /// A read showed this stamp: `Ok`, or what is wrong with it. What it shows stays.
    pub fn shows(&self, block: u64, stamp: u64) -> Result<(), String> {
        self.with(block, |state| {
            if stamp != state.acknowledged && !state.perhaps.contains(&stamp) {
                let Block { acknowledged, perhaps } = state;
                return Err(format!(
                    "block {block} holds write {stamp}; acknowledged was {acknowledged}, unknown are {perhaps:?}"
                ));
            }
            *state = Block { acknowledged: stamp, perhaps: Vec::new() };
            Ok(())
        })
    }

    /// Every block that was ever written, in order.
    pub fn blocks(&self) -> Vec<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_stale_and_foreign_blocks_are_noticed() {
        let history = History::default();
        history.acknowledged(7, 1);
        history.acknowledged(7, 2);
        assert!(history.check(7, &content(7, 1)).is_err(), "an acknowledged write was lost");
        assert!(history.check(7, &content(7, 0)).is_err(), "an acknowledged write was lost");
        assert!(history.check(7, &content(8, 2)).is_err(), "another block's content");
        history.unknown(7, 3);
        assert_eq!(history.check(7, &content(7, 2)), Ok(()));
        assert!(history.check(7, &content(7, 3)).is_err(), "an abandoned write landed late");
    }
}
